"""Fields of the configuration that read what is typed: sizes."""

import pytest

from luthier.config import load_config
from luthier.config.schema import CheckpointsConfig
from luthier.errors import UserError

SIZES = [("20GB", 20 * 10**9), ("1.5 tb", 15 * 10**11), ("500MB", 5 * 10**8), (None, None)]


@pytest.mark.parametrize(("typed", "size"), SIZES)
def test_a_budget_is_a_size(typed, size):
    assert CheckpointsConfig(budget=typed).bytes == size


@pytest.mark.parametrize("typed", ["20", 20, "GB", "-1GB", "20GiB", "much"])
def test_a_budget_without_a_unit_is_refused(typed):
    with pytest.raises(ValueError, match="20GB"):
        CheckpointsConfig(budget=typed)


def test_a_budget_without_a_unit_is_named_with_its_key():
    with pytest.raises(UserError, match=r"trainer\.checkpoints\.budget: 20 does not fit: .* 20GB"):
        load_config(["recipe=quickstart", "trainer.checkpoints.budget=20"])
