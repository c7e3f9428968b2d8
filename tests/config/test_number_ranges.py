"""The ranges of numbers hold what the libraries themselves choose."""

import pytest

from luthier.config.methods import METHODS
from luthier.config.number_ranges import number_complaint
from luthier.memory.workload import trainer_defaults


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_every_trainer_are_in_their_ranges(method):
    complaints = {
        name: number_complaint(name, value) for name, value in trainer_defaults(method).items()
    }
    # luthier sets the seeds; -1 is what transformers calls no rank.
    wrong = {name: text for name, text in complaints.items() if text and name != "local_rank"}
    assert wrong == {}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("learning_rate", 0, None),
        ("learning_rate", -1e-9, "-1e-09 is too small; the least is 0."),
        ("max_steps", -1, None),
        ("max_steps", -2, "-2 is too small; the least is 1 (or -1)."),
        ("top_p", 0, "0 is too small; it must be more than 0."),
        ("top_p", 1, None),
        ("num_train_epochs", 1e9, "1000000000.0 is too large; the most is 1,000,000."),
        ("warmup_steps", float("nan"), "nan is not a finite number."),
        ("a_setting_of_tomorrow", float("inf"), "inf is not a finite number."),
        ("fp16", True, None),
        ("optim", "sgd", None),
    ],
)
def test_a_number(name, value, text):
    assert number_complaint(name, value) == text
