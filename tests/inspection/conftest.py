"""The real command, run on rows that a test writes."""

import json
from functools import cache

import pytest

from luthier.config.schema import ModelConfig
from luthier.inspection import dataset
from luthier.model.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


@cache
def loaded(config):
    """The tokenizer that a model config says; half of a command's time goes into loading it."""
    return load_tokenizer(ModelConfig.model_validate_json(config))


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(monkeypatch):
    monkeypatch.setattr(dataset, "load_tokenizer", lambda config: loaded(config.model_dump_json()))


@pytest.fixture
def write(tmp_path):
    """Write rows of messages to a file, one object a line."""

    def write(rows, name="rows.jsonl"):
        lines = [json.dumps(row if isinstance(row, dict) else {"messages": row}) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


@pytest.fixture
def on_rows(luthier, write):
    """Run a command on a file of these rows with the real tokenizer of smollm2_135m."""

    def on_rows(command, rows, *words):
        write(rows)
        settings = ["model=smollm2_135m", "dataset=jsonl", "dataset.path=rows.jsonl"]
        whole = ["dataset.eval.share=null", "trainer.args.eval_strategy=no"]
        return luthier(command, *settings, *whole, *words)

    return on_rows
