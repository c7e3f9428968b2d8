"""A tiny tuned run, its rows, and the real command."""

import pytest

from helpers import adapter_runs as material
from helpers.chatml import jsonl
from helpers.evaluation_rows import ROWS


@pytest.fixture(scope="session")
def run(tmp_path_factory, base_model):
    """A run with an adapter that held out the last rows of its file's neighbour."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    folder.mkdir()
    jsonl(folder / "held.jsonl", ROWS)
    groups = {
        "dataset": {"path": str(folder / "rows.jsonl"),
                    "eval": {"path": str(folder / "held.jsonl")}},
        "trainer": {"evaluation": {"metrics": ["token_f1"], "max_new_tokens": 7}},
    }  # fmt: skip
    return material.run(folder, base_model, jsonl(folder / "rows.jsonl", ROWS), **groups)
