"""Tiny models and adapters as a run leaves them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random Llama with ChatML's tokens."""
    from helpers.export_runs import make_base

    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def assets_templates():
    """The folder with real chat templates."""
    folder = os.environ.get("LUTHIER_ASSETS")
    if not folder:
        pytest.skip("LUTHIER_ASSETS names no folder")
    return Path(folder) / "chat_templates"
