"""A tiny tuned run, its rows, and the real command."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))

import infer_material as material
from evaluate_material import ROWS

from luthier import cli


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return material.base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny):
    """A run with an adapter that held out the last rows of its file's neighbour."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    folder.mkdir()
    material.jsonl(folder / "held.jsonl", ROWS)
    groups = {
        "dataset": {"path": str(folder / "rows.jsonl"),
                    "eval": {"path": str(folder / "held.jsonl")}},
        "trainer": {"evaluation": {"metrics": ["token_f1"], "max_new_tokens": 7}},
    }  # fmt: skip
    return material.run(folder, tiny, material.jsonl(folder / "rows.jsonl", ROWS), **groups)


@pytest.fixture
def luthier(monkeypatch, capsys):
    """Run the command as typed; gives back exit code, output and errors."""

    def luthier(*words):
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return luthier
