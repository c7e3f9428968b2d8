"""A tiny base and a run on it, made once; the real command, run as typed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import infer_material as material

from tiny_material import jsonl


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return material.base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny):
    """A finished run with an adapter; its rows are questions with replies."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    rows = [{"prompt": text, "completion": text[::-1]} for text in material.questions(12)]
    folder.mkdir()
    return material.run(folder, tiny, jsonl(folder / "rows.jsonl", rows))


@pytest.fixture(scope="session")
def llm(run):
    """The tuned model, loaded once for all tests that only ask it."""
    from luthier.infer import LLM

    with LLM(str(run)) as llm:
        yield llm
