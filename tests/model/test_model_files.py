"""A damaged model is named in words before a library reserves memory for it or reads a pickle."""

import json
import pickle
import shutil
import struct

import pytest

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.model_files import check_model_folder
from luthier.model.source import check_model_path


class Payload:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def header_of(folder, **changes):
    """Write the weights again, with other entries in the head."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    head["lm_head.weight"] |= changes
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "weights cut short": (cut, "model.safetensors: damaged"),
    "weights that are empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: damaged",
    ),
    "a page of HTML for weights": (
        lambda f: (f / "model.safetensors").write_text("<html>not found</html>" * 9),
        "its first bytes are not those of the format",
    ),
    "a header of 2^60 bytes": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}" * 99),
        "its first bytes are not those of the format",
    ),
    "a header that is no JSON": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"notjson!"),
        "model.safetensors: it is no JSON",
    ),
    "a header that is a list": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        "it must be a mapping",
    ),
    "a shape of text": (lambda f: header_of(f, shape="x"), "lm_head.weight.shape must be a list"),
    "a shape of other numbers": (
        lambda f: header_of(f, shape=[2**40, 2**20]), "lm_head.weight does not have the bytes",
    ),
    "offsets beyond the file": (
        lambda f: header_of(f, data_offsets=[0, 2**50]), "are not where it says, or are cut",
    ),
    "a billion layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1,000",
    ),
    "a vocabulary of a trillion": (
        lambda f: edit(f / "config.json", vocab_size=10**12), "vocab_size is 1,000,000,000,000",
    ),
    "a width of a million": (
        lambda f: edit(f / "config.json", hidden_size=10**6), "hidden_size is 1,000,000",
    ),
    "a negative size": (
        lambda f: edit(f / "config.json", intermediate_size=-1), "intermediate_size is -1",
    ),
    "a billion labels": (
        lambda f: edit(f / "config.json", num_labels=10**9), "num_labels is 1,000,000,000",
    ),
    "an absurd part of a model of several": (
        lambda f: edit(f / "config.json", text_config={"num_hidden_layers": 10**7}),
        "num_hidden_layers is 10,000,000",
    ),
    "architectures of another type": (
        lambda f: edit(f / "config.json", architectures="Llama"), "architectures must be a list",
    ),
    "an end token of text": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "generation_config.json: eos_token_id must be",
    ),
    "an index that names a file elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../etc/passwd"}}'
        ),
        "is no file of this folder",
    ),
    "an index of a file that is gone": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
        ),
        "model-00002-of-00002.safetensors is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_model_is_named_before_anything_is_loaded(base_model, tmp_path, what):
    damage, text = DAMAGES[what]
    folder = shutil.copytree(base_model, tmp_path / "model")
    check_model_folder(folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        check_model_path(ModelConfig(path=str(folder)))
    assert text in str(error.value)
    assert str(folder) in str(error.value)


def hostile_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))


def cut_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")


def one_layer_more(folder):
    edit(folder / "config.json", num_hidden_layers=3)


def other_width(folder):
    edit(folder / "config.json", intermediate_size=80)


UNREADABLE = {
    "a pickle that runs code": (hostile_pickle, "its weights cannot be read"),
    "a pickle that is cut": (cut_pickle, "its weights cannot be read"),
    "fewer layers than config.json says": (one_layer_more, "its weight files lack model.layers.2"),
    "other widths than config.json says": (other_width, "are not those of its config.json"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_weights_that_cannot_be_loaded_are_told_in_words(base_model, tmp_path, what):
    from luthier.model.device import choose_machine
    from luthier.model.load import load_model

    damage, text = UNREADABLE[what]
    folder = shutil.copytree(base_model, tmp_path / "model")
    damage(folder)
    config = ModelConfig(path=str(folder), device="cpu", dtype="float32")
    with pytest.raises(UserError) as error:
        load_model(config, {}, choose_machine(config))
    assert text in str(error.value)
    assert str(folder) in str(error.value)
    assert not (folder / "ran").exists()
