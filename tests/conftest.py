"""What all tests share: no network, no telemetry, a cache that the machine keeps."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Threads that wait must not spin: on a shared machine two trainings would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TRAINING = ("train", "launch/test_real_launches.py", "model/test_adapters_training.py")
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
    from luthier import cli

    def luthier(*words):
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return luthier
