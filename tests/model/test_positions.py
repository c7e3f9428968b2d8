"""A length beyond the model's positions is refused; without a length these are the bound."""

import json
import struct

import pytest

from luthier.config.schema import ChatSettings, DatasetConfig, ModelConfig, RunConfig, TrainerConfig
from luthier.errors import UserError
from luthier.model.positions import (
    bounded_length,
    check_max_length,
    find_positions,
    read_max_positions,
)

CONFIGS = {
    "plain": ({"max_position_embeddings": 512}, 512),
    "gpt2": ({"n_positions": 1024}, 1024),
    "none named": ({"vocab_size": 5}, None),
    "null": ({"max_position_embeddings": None}, None),
    "negative": ({"max_position_embeddings": -1}, None),
    "true": ({"max_position_embeddings": True}, None),
    "text": ({"max_position_embeddings": "512"}, None),
    "no scaling": ({"max_position_embeddings": 8, "rope_scaling": None}, 8),
    "linear": ({"max_position_embeddings": 8, "rope_scaling": {"type": "linear", "factor": 4}}, 32),
    "yarn on the original": (
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            },
        },
        131072,
    ),
    "llama 3 holds the longer one": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    "longrope without a factor": (
        {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope"}}, 131072,
    ),
    "mrope": ({"max_position_embeddings": 8, "rope_scaling": {"type": "mrope", "factor": 9}}, 8),
    "rope_parameters": (
        {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "yarn", "factor": 2}}, 16,
    ),
    "for each kind of layers": (
        {
            "max_position_embeddings": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8},
                "sliding_attention": {"rope_type": "default"},
            },
        },
        64,
    ),
    "odd scaling": ({"max_position_embeddings": 8, "rope_scaling": "yarn"}, 8),
}  # fmt: skip


def run_config(path, max_length=None, method="sft", **kwargs):
    return RunConfig(
        model=ModelConfig(path=str(path), kwargs=kwargs),
        dataset=DatasetConfig(path="x.jsonl"),
        chat=ChatSettings(max_length=max_length),
        trainer=TrainerConfig(method=method),
        output_dir="runs/x",
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return tmp_path


@pytest.mark.parametrize(("content", "positions"), CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_allows(content, positions):
    assert find_positions(content) == positions


def test_a_length_beyond_them_is_refused(folder):
    with pytest.raises(UserError) as error:
        check_max_length(run_config(folder, 513))
    assert str(error.value).startswith(f"chat.max_length=513: {folder} has 512 positions")
    assert "Set chat.max_length=512 or less" in str(error.value)
    check_max_length(run_config(folder, 512))
    check_max_length(run_config(folder, 1024, max_position_embeddings=1024))
    check_max_length(run_config(folder, 513, method="classify"))


def test_they_are_the_bound_where_no_length_is_set(folder):
    assert bounded_length(run_config(folder)) == 512
    assert bounded_length(run_config(folder, 100)) == 100
    assert bounded_length(run_config(folder, method="tag")) is None


def test_the_config_of_a_text_model_within_another(folder):
    inner = {"text_config": {"max_position_embeddings": 64}}
    (folder / "config.json").write_text(json.dumps(inner))
    assert read_max_positions(ModelConfig(path=str(folder))) == 64


@pytest.mark.parametrize("content", ["", "[]", "{", '{"text_config": 5}', "\x00"])
def test_what_cannot_be_read_names_none(folder, content):
    (folder / "config.json").write_text(content)
    assert read_max_positions(ModelConfig(path=str(folder))) is None
    check_max_length(run_config(folder, 100_000))


def test_a_folder_without_a_config_names_none(tmp_path):
    assert read_max_positions(ModelConfig(path=str(tmp_path))) is None


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


def gguf_file(*fields):
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + b"".join(fields)


FIELDS = [
    gguf_text(b"general.name") + struct.pack("<I", 8) + gguf_text(b"lute"),
    gguf_text(b"general.tags") + struct.pack("<IIQ", 9, 8, 2) + gguf_text(b"a") + gguf_text(b"bc"),
    gguf_text(b"general.sizes") + struct.pack("<IIQ", 9, 5, 3) + b"x" * 12,
    gguf_text(b"general.is_it") + struct.pack("<I?", 7, True),
    gguf_text(b"llama.context_length") + struct.pack("<II", 4, 8192),
]


def test_the_context_of_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_file(*FIELDS))
    assert read_max_positions(ModelConfig(path=str(file))) == 8192
    file.write_bytes(gguf_file(*FIELDS[:-1]))
    assert read_max_positions(ModelConfig(path=str(file))) is None


def test_a_damaged_gguf_file_names_none(tmp_path):
    file, whole = tmp_path / "model.gguf", gguf_file(*FIELDS)
    for size in range(0, len(whole), 3):
        file.write_bytes(whole[:size])
        assert read_max_positions(ModelConfig(path=str(file))) in (None, 8192)
