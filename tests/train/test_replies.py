"""Which held-out rows a run answers."""

import pytest

from luthier.config.schema import EvaluationConfig
from luthier.errors import UserError
from luthier.infer.score import questions
from luthier.train.replies import asked

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}
ROW = ({"messages": [USER, REPLY]}, {})


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
def test_how_many_are_asked(settings, count):
    sets = asked(EvaluationConfig(**settings), {"": [ROW] * 9}, "ddp")
    assert sum(len(one.questions) for one in sets) == count


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"messages": [USER, REPLY]}, "a"),
        ({"messages": [USER]}, None),
        ({"messages": [REPLY]}, None),
        ({"messages": [USER, CALL]}, None),
        ({"messages": [USER, {"role": "assistant", "content": ["a"]}]}, None),
        ({"text": "a"}, None),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [CALL]}, "a"),
        ({"prompt": [USER], "chosen": [REPLY, USER, REPLY], "rejected": [REPLY]}, None),
        ({"prompt": [USER], "completion": [REPLY], "label": True}, "a"),
        ({"prompt": [USER], "completion": [REPLY], "label": False}, None),
    ],
    ids=["a reply", "no reply", "no prompt", "a call", "parts", "a document", "the chosen one",
         "several messages", "a good one", "a bad one"],
)  # fmt: skip
def test_what_is_asked_of_a_row(example, expected):
    found = [question.expected for question in questions([(example, {})], 5)]
    assert found == ([] if expected is None else [expected])


def test_a_question_knows_its_row():
    (question,) = questions([({"messages": [USER, REPLY]}, {"level": 3, "messages": "as text"})], 1)
    assert question.row == {"messages": "as text", "level": 3}
    assert question.messages == [USER]


def test_each_set_has_its_own_metrics_and_names():
    config = EvaluationConfig(metrics=["exact_match"], sets={"sums": ["number"], "other": []})
    row = ({"messages": [USER, {"role": "assistant", "content": "7"}]}, {})
    sets = asked(config, {"": [row], "sums": [row], "other": [row]}, "none")
    names = [(one.prefix, one.label, [metric.name for metric in one.metrics]) for one in sets]
    assert names == [("eval", "", ["exact_match"]), ("eval_sums", "sums/", ["number"])]


def test_a_reference_that_no_metric_can_compare_with_stops_the_run():
    with pytest.raises(UserError, match="metric number: 1 of 1 references"):
        asked(EvaluationConfig(metrics=["number"]), {"": [ROW]}, "none")


def test_metrics_need_rows_with_a_reply():
    config = EvaluationConfig(sets={"texts": ["exact_match"]})
    with pytest.raises(UserError, match=r"evaluation\.sets\.texts: no row of the evaluation set"):
        asked(config, {"": [ROW], "texts": [({"text": "a"}, {})]}, "none")


def test_fsdp1_answers_nothing():
    assert asked(EvaluationConfig(), {"": [ROW]}, "fsdp1") == []
    with pytest.raises(UserError, match="replies are not generated under fsdp1"):
        asked(EvaluationConfig(metrics=["exact_match"]), {"": [ROW]}, "fsdp1")


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3", "fsdp2"])
def test_other_sharding_answers(sharding):
    (one,) = asked(EvaluationConfig(), {"": [ROW]}, sharding)
    assert len(one.questions) == 1
