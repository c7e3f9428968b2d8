"""Which held-out rows a run answers."""

from types import SimpleNamespace

import pytest

from luthier.config.schema import EvaluationConfig, RunConfig
from luthier.errors import UserError
from luthier.infer.questions import read_questions
from luthier.metrics import parse_metrics
from luthier.train.evaluation import (
    Patience,
    select_eval_prompts,
    select_example,
    set_best_model_metric,
)

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
    sets = select_eval_prompts(EvaluationConfig(**settings), {"": [ROW] * 9})
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
    metrics = parse_metrics(["exact_match"])
    found = [question.expected for question in read_questions([(example, {})], 5, metrics)]
    assert found == ([] if expected is None else [expected])


TOOLS = [{"type": "function", "function": {"name": "f"}}]
RESULT = {"role": "tool", "content": "1"}
TRACE = [USER, CALL, RESULT, REPLY]
TURNS = {
    # example -> the messages before each turn that is asked, and what metrics of text compare with
    "each turn of a trace": ({"messages": TRACE}, [(1, None), (3, "a")]),
    "a turn that does not train": (
        {"messages": [USER, {**CALL, "train": False}, RESULT, REPLY], "tools": TOOLS}, [(3, "a")]),
    "a text where tools are offered": ({"messages": [USER, REPLY], "tools": TOOLS}, [(1, "a")]),
    "a call at the end": ({"messages": [USER, REPLY, USER, CALL], "tools": TOOLS},
                          [(1, None), (3, None)]),
    "a question at the end": ({"messages": [USER, CALL, RESULT], "tools": TOOLS}, [(1, None)]),
    "a chosen call": ({"prompt": [USER], "chosen": [CALL], "rejected": [REPLY]}, [(1, None)]),
    "no tools and no calls": ({"messages": [USER, REPLY]}, []),
}  # fmt: skip


@pytest.mark.parametrize(("example", "turns"), TURNS.values(), ids=TURNS)
def test_metrics_of_tool_calls_ask_each_turn_behind_the_rows_own_messages(example, turns):
    metrics = parse_metrics(["tool_call_accuracy"])
    found = read_questions([(example, {})], 5, metrics)
    assert [(len(q.messages), q.expected) for q in found] == turns
    assert all(q.messages == example.get("messages", [USER])[: len(q.messages)] for q in found)


def test_rows_are_counted_and_not_their_turns():
    metrics = parse_metrics(["tool_call_accuracy"])
    row = ({"messages": TRACE, "tools": TOOLS}, {})
    assert len(read_questions([row] * 5, 3, metrics)) == 6
    # Metrics of text ask the last reply alone, as ever; both together ask each turn once.
    text = parse_metrics(["exact_match"])
    assert [q.expected for q in read_questions([row], 3, text)] == ["a"]
    assert len(read_questions([row], 3, metrics + text)) == 2


def test_what_is_shown_of_a_call():
    (question,) = read_questions([({"messages": [USER, CALL]}, {})], 5)
    assert question.expected_text == 'a\n{"name": "f", "arguments": null}'


def test_a_question_knows_its_row():
    (question,) = read_questions(
        [({"messages": [USER, REPLY]}, {"level": 3, "messages": "as text"})], 1
    )
    assert question.row == {"messages": "as text", "level": 3}
    assert question.messages == [USER]


def test_a_question_has_what_its_row_has_for_the_template():
    inputs = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    (question,) = read_questions([({"messages": [USER, REPLY], **inputs}, {})], 1)
    assert question.template_inputs == inputs


def test_each_set_has_its_own_metrics_and_names():
    config = EvaluationConfig(metrics=["exact_match"], sets={"sums": ["number"], "other": []})
    row = ({"messages": [USER, {"role": "assistant", "content": "7"}]}, {})
    sets = select_eval_prompts(config, {"": [row], "sums": [row], "other": [row]})
    names = [(one.prefix, one.label, [metric.name for metric in one.metrics]) for one in sets]
    assert names == [("eval", "", ["exact_match"]), ("eval_sums", "sums/", ["number"])]


def test_a_reference_that_no_metric_can_compare_with_stops_the_run():
    with pytest.raises(UserError, match="metric number: 1 of 1 references"):
        select_eval_prompts(EvaluationConfig(metrics=["number"]), {"": [ROW]})


def test_metrics_need_rows_with_a_reply():
    config = EvaluationConfig(sets={"texts": ["exact_match"]})
    with pytest.raises(UserError, match=r"evaluation\.sets\.texts: no row of the evaluation set"):
        select_eval_prompts(config, {"": [ROW], "texts": [({"text": "a"}, {})]})


def best(metrics=(), sets=None, patience=None, **args):
    config = RunConfig(
        model={"path": "m"}, output_dir="o",
        dataset={"path": "d", "eval": {"sets": {name: {"path": name} for name in sets or {}}}},
        trainer={
            "args": args,
            "evaluation": {"metrics": list(metrics), "sets": sets or {}, "patience": patience},
        },
    )  # fmt: skip
    args = {"metric_for_best_model": None, "greater_is_better": None} | args
    found = SimpleNamespace(**args)
    set_best_model_metric(found, config)
    return found.metric_for_best_model, found.greater_is_better


SHORT = {"length": {"greater_is_better": False}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (best(), (None, None)),
        (best(patience=2), ("loss", False)),
        (best(["exact_match"], metric_for_best_model="exact_match"), ("exact_match", True)),
        (best([SHORT], metric_for_best_model="eval_length"), ("eval_length", False)),
        (best([SHORT], metric_for_best_model="length", greater_is_better=True), ("length", True)),
        (best([], {"sums": [SHORT]}, metric_for_best_model="sums_length"), ("sums_length", False)),
        (best(["json_f1"], metric_for_best_model="json_f1/valid"), ("json_f1/valid", True)),
    ],
    ids=["nothing asked", "patience alone", "a metric", "one that falls", "the user knows better",
         "of another set", "a part of a metric"],
)  # fmt: skip
def test_which_way_the_best_checkpoint_lies(found, expected):
    assert found == expected


def test_patience_passes_over_the_measures_of_other_sets():
    patience, control = Patience(1), SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    state = SimpleNamespace(best_metric=1.0)
    patience.on_evaluate(args, state, control, {"eval_other_loss": 9.0})
    assert not control.should_training_stop
    patience.on_evaluate(args, state, control, {"eval_loss": 2.0})
    assert control.should_training_stop


WHO, SYSTEM = {"role": "user", "content": "Who?"}, {"role": "system", "content": "Be brief."}
SELF = {"role": "assistant", "content": "I."}
EXAMPLES = {
    "one message": ([[WHO]], "Who?"),
    "behind a system prompt": ([[SYSTEM, WHO]], "Who?"),
    "the first that is one": ([[WHO, SELF, WHO], [{**WHO, "content": "Why?"}]], "Why?"),
    "none that is short": ([[{**WHO, "content": "a" * 401}]], ""),
    "none at all": ([], ""),
}


@pytest.mark.parametrize("conversations, example", EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_of_a_card_is_a_short_held_out_prompt(conversations, example):
    questions = [SimpleNamespace(messages=messages) for messages in conversations]
    assert select_example([SimpleNamespace(questions=questions)]) == example
