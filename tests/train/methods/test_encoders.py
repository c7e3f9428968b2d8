"""Which methods and models take rows with images, and what a run says where they do not."""

import pytest

from helpers.chatml import jsonl
from helpers.model_families import save_family
from helpers.vision_families import picture, save_vision_processor
from luthier.config.schema import RunConfig
from luthier.data.prepare import find_largest_rows, prepare
from luthier.errors import UserError
from luthier.model.tokenizer import load_tokenizer
from luthier.train.methods.encoders import (
    find_images,
    make_chat_encoder,
    make_row_encoders,
    read_saved_settings,
)

TEXT = {"role": "user", "content": "What is it?"}
IMAGE = {
    "role": "user",
    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
}
REPLY, OTHER = {"role": "assistant", "content": "A boat."}, {"role": "assistant", "content": "No."}


def row(method, turn):
    if method in ("dpo", "orpo", "cpo", "reward"):
        return {"prompt": [turn], "chosen": [REPLY], "rejected": [OTHER]}
    if method == "kto":
        return {"prompt": [turn], "completion": [REPLY], "label": True}
    return {"messages": [turn, REPLY]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save = save_family if family == "qwen3" else save_vision_processor
            made[family] = save(folder, family)
        return made[family]

    return get


def prepared(models, folder, family, method, turns, **trainer):
    picture(60, 40).save(folder / "a.png")
    jsonl(folder / "rows.jsonl", [row(method, turn) for turn in turns])
    config = RunConfig.model_validate({
        "model": {"path": str(models(family))},
        "dataset": {"path": str(folder / "rows.jsonl"), "cache": str(folder / "cache")},
        "trainer": {"method": method, **trainer}, "output_dir": "none",
    })  # fmt: skip
    tokenizer = load_tokenizer(config.model)
    encoders = make_row_encoders(config, tokenizer)
    return config, tokenizer, encoders


@pytest.mark.parametrize("method", ["kto", "orpo", "cpo", "reward", "grpo", "rloo", "distill"])
def test_a_method_of_text_alone_names_the_row_with_an_image(models, tmp_path, method):
    config, tokenizer, encoders = prepared(models, tmp_path, "gemma3", method, [TEXT, IMAGE])
    with pytest.raises(UserError) as raised:
        prepare(config.dataset, encoders, tokenizer, config.seed)
    text = str(raised.value)
    assert "rows.jsonl:2" in text
    assert f"the message has an image, and trainer.method={method} trains on text only" in text
    assert "Use trainer=sft or trainer=dpo" in text


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_model_of_text_alone_names_the_row_with_an_image(models, tmp_path, method):
    config, tokenizer, encoders = prepared(models, tmp_path, "qwen3", method, [TEXT, IMAGE])
    assert find_images(config) is None
    with pytest.raises(UserError) as raised:
        prepare(config.dataset, encoders, tokenizer, config.seed)
    text = str(raised.value)
    assert "rows.jsonl:2" in text
    assert "this model takes text only" in text


@pytest.mark.parametrize("method", ["sft", "dpo", "python:own.py:Own"])
def test_images_of_rows_are_found_again(models, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text('class Own:\n    base_method = "sft"\n')
    config, tokenizer, encoders = prepared(models, tmp_path, "gemma3", method, [TEXT, IMAGE])
    assert find_largest_rows(config.dataset, encoders, tokenizer) is None
    rows = prepare(config.dataset, encoders, tokenizer, config.seed)
    assert rows.has_images
    assert rows.largest_images == ((40, 60),)
    largest = find_largest_rows(config.dataset, encoders, tokenizer)
    assert largest == (rows.train_counts.longest, ((40, 60),))
    (example,) = rows.sources["dataset"].examples([1])
    (turn,) = [t for t in example.get("prompt", example.get("messages")) if t["role"] == "user"]
    assert rows.read_image(turn["content"][0]["image"]) == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("family", ["gemma3", "llava_clip"])
def test_rows_of_text_need_no_processor(models, tmp_path, monkeypatch, family):
    def refuse(model):
        raise UserError("no processor")

    monkeypatch.setattr("luthier.model.model_images.find_vision_processor", refuse)
    config, tokenizer, encoders = prepared(models, tmp_path, family, "sft", [TEXT])
    rows = prepare(config.dataset, encoders, tokenizer, config.seed)
    assert not rows.has_images
    assert rows.train_counts.sequences == 1


def test_what_is_saved_of_the_encoder_says_nothing_of_images(models, tmp_path):
    config, tokenizer, _ = prepared(models, tmp_path, "gemma3", "sft", [TEXT])
    encoder = make_chat_encoder(config, tokenizer)
    assert "images" in encoder.settings()
    assert "images" not in read_saved_settings(encoder)
