"""Which held-out rows a run answers."""

import pytest

from luthier.config.schema import EvaluationConfig
from luthier.errors import UserError
from luthier.train.replies import asked

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"metrics": ["exact_match"], "rows": 4}, 4),
        ({"metrics": ["exact_match"], "rows": 50}, 9),
        ({"samples": 2}, 2),
        ({"samples": 0}, 0),
    ],
    ids=["as many as are scored", "no more than there are", "those shown", "none"],
)
def test_questions(settings, count):
    assert len(asked(EvaluationConfig(**settings), [ROW] * 9, "ddp")) == count


@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2", "zero3"])
def test_split_weights_answer_nothing(sharding):
    assert asked(EvaluationConfig(), [ROW], sharding) == []
    with pytest.raises(UserError, match="replies are not generated under"):
        asked(EvaluationConfig(metrics=["exact_match"]), [ROW], sharding)


def test_optimizer_sharding_answers():
    assert len(asked(EvaluationConfig(), [ROW], "zero2")) == 1
