"""One process that forks runs, and one model, for all tests of runs."""

import pytest
import runs_material
from forks import Forks


@pytest.fixture(scope="session")
def forks():
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a model and rows; runs are written beside them."""
    folder = tmp_path_factory.mktemp("runs")
    runs_material.make(folder)
    return folder


@pytest.fixture(scope="session")
def whole(forks, tiny):
    """A run that was never disturbed, with dropout, accumulation and lines between checkpoints."""
    assert (
        forks.run(tiny, *runs_material.words(tiny), *runs_material.WAY, "output_dir=whole") == 0
    ), runs_material.said(tiny)
    return tiny / "whole"
