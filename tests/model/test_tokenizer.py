import json
import shutil

import pytest

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.model.tokenizer import check_vocabulary_fits, load_tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def settings(folder, **change):
    """Change tokenizer_config.json; None removes a key."""
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) | change
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))
    return ModelConfig(path=str(folder))


def test_a_folder_gives_its_tokenizer_and_template(tiny_model):
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    assert tokenizer.decode(tokenizer("the other").input_ids) == "the other"
    assert tokenizer.chat_template


def test_a_template_of_the_processor_alone_is_the_tokenizers(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = settings(folder, chat_template=None)
    assert load_tokenizer(config).chat_template is None
    file = folder / "chat_template.json"
    file.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_tokenizer(config).chat_template == "{{ messages[0].content }}"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"chat_template\.json cannot be read"):
        load_tokenizer(config)


def test_another_tokenizer_can_be_named(tiny_model, tmp_path):
    config = ModelConfig(path=str(tmp_path / "nowhere"), tokenizer=str(tiny_model))
    assert load_tokenizer(config).pad_token == "<|im_end|>"


PADDING = {
    "its own stays": ({"pad_token": "<|im_start|>"}, "<|im_start|>"),
    "one that is like it": ({"pad_token": None}, "<|endoftext|>"),
}


@pytest.mark.parametrize(("change", "padding"), PADDING.values(), ids=PADDING)
def test_there_is_always_a_padding_token_that_exists(folder, change, padding):
    config = settings(folder, **change)
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == padding
    assert len(tokenizer) == len(load_tokenizer(ModelConfig(path=str(folder))))


def without(folder, token):
    """Rename a token of the folder's vocabulary."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace(token, "<|other|>"))


def test_the_end_token_is_the_last_resort(folder):
    without(folder, "<|endoftext|>")
    config = settings(folder, pad_token=None, unk_token=None)
    assert load_tokenizer(config).pad_token == "<|im_end|>"


def test_neither_padding_nor_end_is_told(folder):
    without(folder, "<|endoftext|>")
    config = settings(folder, pad_token=None, unk_token=None, eos_token=None)
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        load_tokenizer(config)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told(folder, file):
    (folder / file).write_text('{"version": ')
    with pytest.raises(UserError, match=r"model\.path=.*the tokenizer cannot be read"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_a_tokenizer_that_is_larger_than_the_model_is_told(tiny_model):
    config = ModelConfig(path=str(tiny_model))
    tokenizer = load_tokenizer(config)
    model = load_model(config, {}, Machine("cpu", "float32", "sdpa"))
    check_vocabulary_fits(tokenizer, model)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="do not belong together"):
        check_vocabulary_fits(tokenizer, model)


def test_a_tokenizer_of_another_model_is_told(folder, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    without(other, "<|im_start|>")
    config = ModelConfig(path=str(folder), tokenizer=str(other))
    with pytest.raises(UserError, match="belongs to another model") as told:
        load_tokenizer(config)
    assert "'<|im_start|>', for the model 1, has the id 266 there" in str(told.value)


def test_a_tokenizer_with_more_tokens_is_the_models(folder, tiny_model, tmp_path):
    other = tmp_path / "other"
    more = load_tokenizer(ModelConfig(path=str(tiny_model)))
    more.add_tokens(["<new>"])
    more.save_pretrained(other)
    assert (
        "<new>" in load_tokenizer(ModelConfig(path=str(folder), tokenizer=str(other))).get_vocab()
    )
