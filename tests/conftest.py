"""What all tests share: no network, no telemetry, a cache that the machine keeps."""

import os
import sys
from pathlib import Path

import pytest

from luthier.chat.template_probe import share_passed_templates
from luthier.storage.cache import KeyFolder, cache_root

os.environ["HF_HUB_OFFLINE"] = "1"
# Only the recipes of the checkout count.
os.environ.pop("LUTHIER_RECIPES", None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Threads that wait must not spin: on a shared machine two trainings would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Hundreds of templates are each tried once, and not in each worker.
share_passed_templates(KeyFolder(cache_root() / "templates"))

TRAINING = (
    "end_to_end",
    "model/test_adapter_training.py",
    "train/methods",
    "train/test_dataloaders.py",
    "train/test_dataloaders_resume.py",
    "train/test_evaluation_sharded.py",
    "train/test_document_masking.py",
    "train/test_packing_check.py",
    "train/test_run.py",
)
"""Folders and files below this one in which every test trains, or starts processes that could."""


def pytest_collection_modifyitems(items):
    """Mark what trains by where it stands, and begin with the longest test.

    So no worker is left alone with it at the end.
    """
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here)
        if any(place.is_relative_to(part) for part in TRAINING):
            item.add_marker(pytest.mark.train)
    items.sort(key=lambda item: "quickstart_learns" not in item.name)


@pytest.fixture
def luthier(monkeypatch, capsys):
    """Run the command as typed; gives back exit code, output and errors."""
    from luthier.cli import main

    def luthier(*words):
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return luthier


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and a way to put YAML files into it."""
    monkeypatch.chdir(tmp_path)

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """The folder of a tiny chat model."""
    from helpers import adapter_runs

    return adapter_runs.base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory, base_model):
    """A finished run with an adapter; its rows are questions with replies."""
    from helpers import adapter_runs
    from helpers.chatml import jsonl

    folder = tmp_path_factory.mktemp("runs") / "tuned"
    rows = [{"prompt": text, "completion": text[::-1]} for text in adapter_runs.questions(12)]
    folder.mkdir()
    return adapter_runs.run(folder, base_model, jsonl(folder / "rows.jsonl", rows))


@pytest.fixture(scope="session")
def tuned_llm(tuned_run):
    """The tuned model, loaded once for all tests that only ask it."""
    from luthier.infer import LLM

    with LLM(str(tuned_run)) as llm:
        yield llm
