"""When a path is right, and what becomes of one that is not."""

import math

import pytest

from luthier.config import load_config
from luthier.doctor.path_tests import judge_path, result_as_values
from luthier.doctor.training_paths import Tolerance, TrainingPath, list_training_paths

PATH = TrainingPath("nf4", (), Tolerance(loss=1e-3, gradient=1e-2), "train without it")
NUMBERS = {
    "within both bounds": (1e-4, 1e-3, "right", None),
    "at the bounds": (1e-3, 1e-2, "right", None),
    "another loss": (2e-3, 1e-3, "wrong", "its loss differs by 2.0e-03, and 1e-03 is allowed"),
    "another gradient": (
        1e-4, 0.5, "wrong", "its gradient differs by 5.0e-01, and 1e-02 is allowed",
    ),
    "both": (
        2e-3, 0.5, "wrong",
        "its loss differs by 2.0e-03, and 1e-03 is allowed; "
        "its gradient differs by 5.0e-01, and 1e-02 is allowed",
    ),
    "no number": (math.nan, 0.0, "wrong", "its loss differs by nan, and 1e-03 is allowed"),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "gradient", "state", "reason"), NUMBERS.values(), ids=NUMBERS)
def test_a_path_is_held_to_its_tolerance(loss, gradient, state, reason):
    line = {"name": "nf4", "loss_difference": loss, "gradient_difference": gradient}
    result = judge_path(PATH, line)
    assert (result.state, result.reason) == (state, reason)


def test_what_a_path_raised_is_its_reason():
    result = judge_path(PATH, {"name": "nf4", "problem": "RuntimeError: no kernel image"})
    assert result_as_values(result) == {
        "name": "nf4", "state": "wrong", "reason": "RuntimeError: no kernel image",
        "advice": "train without it", "tolerance": {"loss": 1e-3, "gradient": 1e-2},
    }  # fmt: skip


@pytest.mark.parametrize("path", list_training_paths(), ids=lambda path: path.name)
def test_every_path_is_a_valid_config(path):
    config = load_config(path.overrides("somewhere", "cache")).config
    assert config.trainer.args.per_device_train_batch_size * path.processes == 8
    assert config.trainer.args.packing is path.name.startswith("packed")
    assert config.quantization.is_enabled is (path.name in ("nf4", "int8"))
