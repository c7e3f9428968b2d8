"""Rows of a known form, planned without running the template, are what running it gives."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.conversations import (
    FAMILIES,
    SPACE,
    WORDS,
    all_templates,
    bot,
    pair,
    system,
    trl,
    user,
)
from luthier.chat import ChatEncoder, ChatError
from luthier.chat.fast_path.symbolic import (
    NeedsConcreteText,
    SymbolicField,
    SymbolicText,
    TextConditions,
    concat_symbolic,
)
from luthier.chat.provenance import mark_safe, trace_field

TEMPLATES = all_templates()
ODD = st.sampled_from(
    ["</think>", "<tool_response>", "<|im_end|>", "<", "|>", "assistant", "[INST]", "</s>", "<|",
     "im_start", "\x00", "\U000f0000"]
)  # fmt: skip
TEXT = st.builds(lambda before, text, after: before + text + after, SPACE, WORDS | ODD, SPACE)


@st.composite
def plain_rows(draw):
    """Rows of texts alone, some with reasoning, some with turns that do not train."""
    messages = [system(draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXT)))
        more = draw(
            st.sampled_from([{}, {}, {"train": False}, {"train": True}, {"reasoning_content": "r"}])
        )
        messages.append(bot(draw(TEXT), **more))
    return messages


def encoder_of(tokenizer, template, **settings):
    try:
        return ChatEncoder(tokenizer, template, on_lost="keep", date="2025-01-02", **settings)
    except ChatError as error:
        pytest.skip(str(error))


def outcome(encoder, row):
    """All that a row makes."""
    try:
        return [(s.input_ids, s.labels, s.replies, s.segments) for s in encoder.encode(row)]
    except ChatError as error:
        return str(error)


def both_of(tokenizer, template, **settings):
    """Two encoders: one may know forms, the other may not."""
    quick, slow = (encoder_of(tokenizer, template, **settings) for _ in range(2))
    slow._pipelines.default.fast_path.match = lambda row: None
    return quick, slow


def assert_same(encoders, rows):
    """Both make the same of all rows."""
    quick, slow = encoders
    for row in rows:
        assert outcome(quick, row) == outcome(slow, row), row


ROWS = [
    [user("How are you?"), bot("Fine.")],
    [system("Be brief."), user(" How? \n"), bot("\n\nFine. ")],
    [user("1"), bot("2"), user("3"), bot("4"), user("5"), bot("6")],
    [user("1"), bot("2", train=False), user("3"), bot("4")],
    [user("1"), bot("2", reasoning_content="because"), user("3"), bot("4")],
    [user("1"), bot("<think>\nso\n</think>\n\n2"), user("<tool_response>"), bot("3 < 4")],
    [user("1"), bot("2"), user("3")],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template(template):
    tokenizer = pair("gpt2-words", TEMPLATES[template])
    assert_same(both_of(tokenizer, TEMPLATES[template]), ROWS)


@pytest.mark.parametrize("template", [*FAMILIES, "qwen3_5_think"])
@pytest.mark.parametrize("tokenizer_name", ["gpt2-words", "llama3-words", "sentencepiece"])
def test_any_text(tokenizer_name, template):
    encoders = both_of(pair(tokenizer_name, trl(template)), trl(template))

    @settings(
        max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(plain_rows(), min_size=1, max_size=3))
    def check(rows):
        assert_same(encoders, rows)

    check()


@pytest.mark.parametrize(
    "given_settings",
    [
        {"train_on": "last"},
        {"train_on": ["user", "assistant"]},
        {"boundaries": "segments"},
        {"max_length": 40},
        {"max_length": 12, "on_long": "drop"},
        {"variables": {"enable_thinking": False}},
    ],
    ids=str,
)
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3"])
def test_every_setting(template, given_settings):
    tokenizer = pair("gpt2-words", trl(template))
    assert_same(both_of(tokenizer, trl(template), **given_settings), ROWS)


@pytest.mark.parametrize(
    "template",
    [
        "qwen2_5",
        "qwen3",
        "qwen3_5_think",
        "llama3",
        "llama3_1",
        "gemma3",
        "phi3",
        "gptoss",
        "cohere",
    ],
)
def test_forms_of_common_templates_are_known(template):
    source = TEMPLATES.get(f"chat_templates/{template}")
    if source is None:
        pytest.skip("this TRL does not ship the template")
    forms = ChatEncoder(pair("gpt2-words", source), on_lost="keep")._pipelines.default.fast_path
    row = {"messages": [user("1"), bot("2"), user("3"), bot("4")]}
    assert forms.match(row) is not None
    assert forms.match(row | {"tools": [{"name": "f"}]}) is None


@pytest.mark.parametrize(
    "messages",
    [
        [user("1"), bot(" \n")],
        [user(""), bot("2")],
        [user("1"), {"role": "assistant", "content": None}],
        [user("1"), {"role": "assistant", "content": [{"type": "text", "text": "2"}]}],
        [user("1"), bot("2", name="Ann")],
        [user("1"), {"content": "2", "train": True, "role": "assistant"}],
        [user("1"), bot("\ud83d")],
        [user("1"), bot("so </think> 2")],
        [user("<tool_response>"), bot("2")],
        [user("1")],
        [],
        ["text"],
    ],
    ids=repr,
)
def test_other_rows_are_left_to_the_template(messages):
    forms = ChatEncoder(
        pair("gpt2-words", trl("qwen3")), on_lost="keep"
    )._pipelines.default.fast_path
    assert forms.match({"messages": messages}) is None


def opaque(*parts):
    return SymbolicText(parts, TextConditions())


ONE = SymbolicField(0, "content")


@pytest.mark.parametrize(
    ("question", "answer", "condition"),
    [
        (lambda t: bool(t), True, TextConditions()),
        (lambda t: t.startswith("<a>"), False, TextConditions(starts={(): {"<a>"}})),
        (lambda t: t.endswith(("a", "b")), False, TextConditions(ends={(): {"a", "b"}})),
        (lambda t: "</a>" in t, False, TextConditions(contains={"</a>"})),
        (lambda t: t == "a", False, TextConditions(equals={(): {"a"}})),
        (lambda t: t != "a", True, TextConditions(equals={(): {"a"}})),
        (lambda t: t in ["a", "b"], False, TextConditions(equals={(): {"a", "b"}})),
        (lambda t: t is None or t == 3, False, TextConditions()),
        (lambda t: len(t.split("</a>")), 1, TextConditions(contains={"</a>"})),
        (lambda t: t.replace("a", "b") is t, True, TextConditions(contains={"a"})),
        (
            lambda t: t.strip().startswith("a"),
            False,
            TextConditions(starts={(("lstrip", None), ("rstrip", None)): {"a"}}),
        ),
        (lambda t: ("<a>" + t).startswith("<"), True, TextConditions()),
        (lambda t: (t + "b").endswith("c"), False, TextConditions()),
    ],
)
def test_questions_that_most_texts_answer_alike(question, answer, condition):
    text = opaque(ONE)
    assert question(text) == answer
    assert text.conditions == condition


@pytest.mark.parametrize(
    "question",
    [
        lambda t: len(t),
        lambda t: t[0],
        lambda t: t[1:],
        lambda t: list(t),
        lambda t: t.upper(),
        lambda t: f"{t}",
        lambda t: f"{t!r}",
        lambda t: "%s" % t,  # noqa: UP031
        lambda t: {t: 1},
        lambda t: t < "a",
        lambda t: t * 2,
        lambda t: t == t + "",
        lambda t: t + 1,
        lambda t: t.strip("a"),
        lambda t: t.split(),
        lambda t: "a" in ("b" + t),
        lambda t: (t + "b").startswith("ab"),
        lambda t: ("<" + t).startswith("<a"),
        lambda t: t + mark_safe(trace_field(None, "&")),
    ],
)
def test_questions_that_only_the_text_can_answer(question):
    with pytest.raises(NeedsConcreteText):
        question(opaque(ONE))


def test_strips_reach_through_the_templates_own_text():
    text = concat_symbolic([" \n", opaque(ONE), "x ", trace_field(None, " \n")], TextConditions())
    assert text.strip().pieces == (ONE._replace(chain=(("lstrip", None),)), "x")
    assert concat_symbolic([" ", " "], TextConditions()).strip().pieces == ()
    both = ("lstrip", None), ("rstrip", None)
    assert opaque(ONE).rstrip().strip().lstrip().pieces == (ONE._replace(chain=both),)
