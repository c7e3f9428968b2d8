"""Tiny models and adapters as a run leaves them."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
for place in ("model", "evaluate", "train/methods"):
    sys.path.insert(0, str(Path(__file__).parents[1] / place))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random Llama with ChatML's tokens."""
    from export_material import make_base

    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def assets_templates():
    """The folder with real chat templates."""
    folder = os.environ.get("LUTHIER_ASSETS")
    if not folder:
        pytest.skip("LUTHIER_ASSETS names no folder")
    return Path(folder) / "chat_templates"
