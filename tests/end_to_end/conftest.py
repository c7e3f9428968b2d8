"""One process that forks runs, and one model, for all tests of runs."""

import pytest

from helpers import train_command
from helpers.fork_server import Forks


@pytest.fixture(scope="session")
def forks():
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a model and rows; runs are written beside them."""
    folder = tmp_path_factory.mktemp("runs")
    train_command.make(folder)
    return folder


@pytest.fixture(scope="session")
def whole(forks, tiny):
    """A run that was never disturbed, with dropout, accumulation and lines between checkpoints."""
    assert (
        forks.run(tiny, *train_command.words(tiny), *train_command.WAY, "output_dir=whole") == 0
    ), train_command.said(tiny)
    return tiny / "whole"
