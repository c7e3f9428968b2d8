"""Tiny models and adapters as a run leaves them."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random Llama with ChatML's tokens."""
    from export_material import make_base

    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture
def luthier(monkeypatch, capsys):
    """Run the command as typed; gives back exit code, output and errors."""
    from luthier import cli

    def luthier(*words):
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return luthier


@pytest.fixture(scope="session")
def assets_templates():
    """The folder with real chat templates."""
    folder = os.environ.get("LUTHIER_ASSETS")
    if not folder:
        pytest.skip("LUTHIER_ASSETS names no folder")
    return Path(folder) / "chat_templates"
