"""Trackers: none of them is needed."""

import importlib.util

import pytest

from luthier.config.schema import DatasetConfig, ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.train.trackers import check_trackers_installed


def config(*trackers):
    return RunConfig(
        model=ModelConfig(path="m"), dataset=DatasetConfig(path="d"), output_dir="o",
        tracker={"to": list(trackers)},
    )  # fmt: skip


def test_a_tracker_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'luthier\[trackio\]'"):
        check_trackers_installed(config("trackio"))


def test_no_tracker_needs_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers_installed(config())
