"""A tiny tuned run, its rows, and the real command."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train" / "methods"))

import infer_material as material
from evaluate_material import ROWS

from tiny_material import jsonl


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return material.base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny):
    """A run with an adapter that held out the last rows of its file's neighbour."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    folder.mkdir()
    jsonl(folder / "held.jsonl", ROWS)
    groups = {
        "dataset": {"path": str(folder / "rows.jsonl"),
                    "eval": {"path": str(folder / "held.jsonl")}},
        "trainer": {"evaluation": {"metrics": ["token_f1"], "max_new_tokens": 7}},
    }  # fmt: skip
    return material.run(folder, tiny, jsonl(folder / "rows.jsonl", ROWS), **groups)
