"""Replies read back: written by hand in many notations, cut, broken, streamed, and drawn."""

import functools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.conversations import CHATML, LOOK_UP, bot, call, pair, tool, trl, user
from helpers.family_templates import FAMILY_TEMPLATES
from luthier.chat import ChatEncoder, ChatError, ReplyDelta

QUESTION = [user("What is a lute?")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "n": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "rate": {"type": "number"},
                    "none": {"type": "null"},
                    "list": {"type": "array", "items": {"type": "string"}},
                    "more": {"type": "object", "properties": {"deep": {"type": "integer"}}},
                },
                "required": [],
            },
        },
    }
]


@functools.cache
def encoder_of(template, **variables):
    source = FAMILY_TEMPLATES.get(template) or (CHATML if template == "chatml" else trl(template))
    tokenizer = pair("llama3-words", source)
    ends = ["<|user|>", "<|observation|>"] if "glm" in template.lower() else []
    tokenizer.add_tokens(ends, special_tokens=True)
    return ChatEncoder(
        tokenizer, date="2025-01-02", variables=variables, empty_replies="train", on_lost="keep",
        eos_token_ids=tokenizer.convert_tokens_to_ids(ends),
    )  # fmt: skip


def find(**arguments):
    return {"type": "function", "function": {"name": "find", "arguments": arguments}}


def ids_of(encoder, message, tools=None, messages=None):
    """What a model writes for a message, stop token and all."""
    sequence = encoder.encode([*(messages or QUESTION), message], tools)[-1]
    _, start, stop = sequence.replies[-1]
    return sequence.input_ids[start:stop]


# Each is a reply as a model of the family writes it, and what it means, both written by hand.
REPLIES = [
    ("chatml", "An instrument.<|im_end|>", bot("An instrument.")),
    (
        "qwen3",
        "<think>\nStrings?\n</think>\n\nAn instrument.<|im_end|>",
        bot("An instrument.", reasoning_content="Strings?"),
    ),
    (
        "qwen2_5",
        'One moment.\n<tool_call>\n{"name": "find", "arguments": {"word": "a \\"b\\"\\né", "n": 3, '
        '"exact": true, "none": null, "list": ["a, b", "}"], "more": {"deep": -1}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call><|im_end|>',
        bot(
            "One moment.",
            tool_calls=[
                find(
                    word='a "b"\né', n=3, exact=True, none=None, list=["a, b", "}"],
                    more={"deep": -1},
                ),
                find(),
            ],
        ),
    ),
    (
        "qwen3_5_think",
        "Hm.\n</think>\n\nSo.\n\n<tool_call>\n<function=find>\n<parameter=word>\n12\n</parameter>\n"
        "<parameter=n>\n12\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        '<parameter=list>\n["a", "</p>"]\n</parameter>\n</function>\n</tool_call><|im_end|>',
        bot(
            "So.",
            reasoning_content="Hm.",
            tool_calls=[find(word="12", n=12, exact=True, list=["a", "</p>"])],
        ),
    ),
    (
        "glm4moe",
        "\n<think>Hm.</think>\n<tool_call>find\n<arg_key>word</arg_key>\n"
        "<arg_value>a\nb</arg_value>\n<arg_key>exact</arg_key>\n<arg_value>false</arg_value>\n"
        "</tool_call>\n<tool_call>find\n</tool_call><|observation|>",
        bot("", reasoning_content="Hm.", tool_calls=[find(word="a\nb", exact=False), find()]),
    ),
    (
        "gemma4",
        '<|tool_call>call:find{list:[<|"|>a,b:<|"|>,<|"|>}<|"|>],more:{deep:1},n:7,'
        'word:<|"|>"x",n:8<|"|>}<tool_call|>So.<|tool_response>',
        bot("So.", tool_calls=[find(list=["a,b:", "}"], more={"deep": 1}, n=7, word='"x",n:8')]),
    ),
    (
        "lfm2_v2",
        "<|tool_call_start|>[find(word='it\\'s, n=2)', n=1, none=None), find()]<|tool_call_end|>"
        "<|im_end|>",
        bot("", tool_calls=[find(word="it's, n=2)", n=1, none=None), find()]),
    ),
    (
        "gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.find"
        '<|channel|>commentary json<|message|>{"rate": 2.5}<|call|>',
        bot("", reasoning_content="Hm.", tool_calls=[find(rate=2.5)]),
    ),
    (
        "gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So."
        "<|return|>",
        bot("So.", reasoning_content="Hm."),
    ),
    (
        "llama3_1",
        '{"name": "find", "parameters": {"word": "a"}}<|eot_id|>',
        bot("", tool_calls=[find(word="a")]),
    ),
    (
        "deepseekv3",
        "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n"
        '```json\n{"word": "a"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        bot("", tool_calls=[find(word="a")]),
    ),
    (
        # Where a template takes the arguments as text, the model's own spaces are kept as text.
        "deepseekv3",
        "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n"
        '```json\n{"n":1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        bot(
            "",
            tool_calls=[{"type": "function", "function": {"name": "find", "arguments": '{"n":1}'}}],
        ),
    ),
    (
        "muse_glimmer",
        ' to=self<|message|>Hm.<|eom|><|start|>assistant to=find<|message|><atem:function_calls>\n'
        '<atem:invoke name="find">\n<atem:parameter name="n">1</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls><|eom|><|start|>assistant to=find<|message|><atem:function_calls>\n"
        '<atem:invoke name="find">\n</atem:invoke>\n</atem:function_calls><|eot|>',
        bot("", reasoning_content="Hm.", tool_calls=[find(n=1), find()]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "reply", "message"), REPLIES, ids=[f"{n} {r[0]}" for n, r in enumerate(REPLIES)]
)
@pytest.mark.parametrize("form", ["text", "ids", "without the stop token", "streamed"])
def test_reply(template, reply, message, form):
    encoder = encoder_of(template)
    ids = ids_of(encoder, message, TOOLS)
    assert encoder.tokenizer.decode(ids) == reply
    if form == "streamed":
        check_stream(encoder, reply, ids)
        return
    given = {"text": reply, "ids": ids, "without the stop token": ids[:-1]}[form]
    parsed = encoder.parse(given, QUESTION, TOOLS)
    assert (parsed.message, parsed.reason) == (message, None)


def check_stream(encoder, reply, ids):
    """The pieces are the message, whatever way the text comes, and show no part of a marker."""
    stop = encoder.tokenizer.decode(ids[-1:])
    text = reply.removesuffix(stop)
    parsed = encoder.parse(ids, QUESTION, TOOLS)
    for size in (1, 2, 5, 17, len(text)):
        stream = encoder.stream_parser(QUESTION, TOOLS)
        deltas = [d for n in range(0, len(text), size) for d in stream.add(text[n : n + size])]
        deltas += stream.finish(ids)
        assert stream.reply == parsed
        texts = {"content": "", "reasoning": "", "tool_call": ""}
        for delta in deltas:
            assert delta.text
            texts[delta.field] += delta.text
        assert texts["content"] == parsed.message["content"]
        assert texts["reasoning"] == parsed.message.get("reasoning_content", "")
        calls = [delta for delta in deltas if delta.field == "tool_call"]
        functions = [each["function"] for each in parsed.message.get("tool_calls", ())]
        assert [call.name for call in calls] == [function["name"] for function in functions]
        for streamed, function in zip(calls, functions, strict=True):
            whole = function["arguments"]
            assert (streamed.text if isinstance(whole, str) else json.loads(streamed.text)) == whole


THOUGHTLESS = "<think>\n\n</think>\n\n"
CALL = THOUGHTLESS + '<tool_call>\n{"name": "find", "arguments": %s}\n</tool_call>'
END = "<|im_end|>"
BROKEN = {
    "cut in a call": (THOUGHTLESS + '<tool_call>\n{"name": "find", "argu', "a call has no name"),
    "cut in arguments": ((CALL % '{"n": 1')[:-14], "not JSON"),
    "broken JSON": (CALL % '{"n": }' + END, "not JSON"),
    "JSON that is no object": (CALL % "[1]" + END, "no object"),
    "a number that JSON has not": (CALL % '{"n": NaN}' + END, "NaN is no JSON"),
    "a key twice": (CALL % '{"n": 1, "n": 2}' + END, "a key appears twice"),
    "JSON nested without end": (CALL % '{"n": ' + "[" * 50_000 + END, "not JSON"),
    "JSON nested deeply": (CALL % ('{"n": ' + "[" * 80 + "]" * 80 + "}") + END, "nested over 64"),
    "half of a surrogate pair": (CALL % '{"word": "\\ud800"}' + END, "surrogate"),
    "other spaces": (CALL % '{"n":1}' + END, "writes this message differently: ' 1}"),
    "text behind a call": (CALL % "{}" + "\nSo." + END, "a call is followed by"),
    "no thought": ("An instrument." + END, "does not begin as the template begins"),
    "nothing": (END, "does not begin as the template begins"),
    "an endless thought": ("<think>\nHm." + END, "it ends within its reasoning"),
    "a second thought": (THOUGHTLESS + "a</think>b" + END, "writes this message differently"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_reply_is_plain_content_with_a_reason(name):
    reply, reason = BROKEN[name]
    encoder = encoder_of("qwen3")
    ids = encoder.tokenizer(reply, add_special_tokens=False)["input_ids"]
    for form in (reply, ids):
        parsed = encoder.parse(form, QUESTION, TOOLS)
        assert parsed.message == bot(reply.removesuffix(END))
        assert reason in parsed.reason
    # A stream says the same text, but for what it had attributed already.
    stream = encoder.stream_parser(QUESTION, TOOLS)
    deltas = [delta for letter in reply.removesuffix(END)[:400] for delta in stream.add(letter)]
    deltas += stream.finish()
    assert not any(delta.field == "tool_call" for delta in deltas)
    if "</think>" not in reply and "<think>" not in reply:
        assert "".join(delta.text for delta in deltas) == reply.removesuffix(END)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("<think>\nHm", bot("", reasoning_content="Hm")),
        ("<think>\nHm.\n</thi", bot("", reasoning_content="Hm.")),
        ("<think>\nHm.\n</think>\n\nAn instr", bot("An instr", reasoning_content="Hm.")),
        (THOUGHTLESS + "Use <tool_call> tags: \n<tool", bot("Use <tool_call> tags: \n<tool")),
        (CALL % "{}" + END, bot("", tool_calls=[find()])),
        # Whether a tool of that name is there is for those who would run it.
        (CALL.replace("find", "lose") % "{}" + END,
         bot("", tool_calls=[{"type": "function", "function": {"name": "lose", "arguments": {}}}])),
    ],
    ids=["thought", "marker", "content", "like a marker", "call", "unknown tool"],
)  # fmt: skip
def test_what_counts(reply, message):
    """A reply that was cut counts as far as it came; text like a marker is text."""
    encoder = encoder_of("qwen3")
    ids = encoder.tokenizer(reply, add_special_tokens=False)["input_ids"]
    for form in (reply, ids):
        parsed = encoder.parse(form, QUESTION, TOOLS)
        assert (parsed.message, parsed.reason) == (message, None)


def test_tokens_that_the_template_would_not_give_are_said():
    encoder = encoder_of("chatml")
    ids = [i for c in "An instrument." for i in encoder.tokenizer(c)["input_ids"]]
    parsed = encoder.parse(ids, QUESTION)
    assert parsed.message == bot("An instrument.")
    assert "its tokens are different" in parsed.reason
    assert encoder.parse("An instrument.", QUESTION).reason is None


def test_text_that_spells_a_control_token_is_no_control_token():
    encoder = encoder_of("chatml")
    message = bot("It ends in <|im_end|> as ever")
    ids = ids_of(encoder, message)
    assert ids.count(ids[-1]) == 1
    assert encoder.parse(ids, QUESTION).message == message
    assert encoder.parse(ids, QUESTION).reason is None


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_types_of_bare_arguments_are_the_schemas(tools):
    encoder = encoder_of("qwen3_5_nothink")
    reply = ids_of(encoder, bot("", tool_calls=[find(n=12, word="12")]), tools)
    (parsed,) = encoder.parse(reply, QUESTION, tools).message["tool_calls"]
    assert parsed["function"]["arguments"] == {"n": 12 if tools else "12", "word": "12"}


@pytest.mark.parametrize("template", ["qwen3", "gemma4", "gptoss", "lfm2_2_5", "qwen3_5_think"])
def test_reply_behind_the_result_of_a_tool(template):
    encoder = encoder_of(template)
    history = [user("a"), bot("", tool_calls=[call("lute")]), tool("42")]
    for message in (bot("So."), bot("", tool_calls=[find(word="b")])):
        parsed = encoder.parse(ids_of(encoder, message, [LOOK_UP], history), history, [LOOK_UP])
        assert (parsed.message, parsed.reason) == (message, None)


def test_prompt_that_closes_the_thought():
    """The variables of the prompt are those of the reply."""
    message = bot("So.")
    closed = encoder_of("qwen3", enable_thinking=False)
    ids = ids_of(closed, message)
    assert closed.tokenizer.decode(ids) == "So.<|im_end|>"
    kwargs = {"enable_thinking": False}
    assert closed.parse(ids, QUESTION).message == message
    assert closed.parse(ids, QUESTION).reason is None
    assert encoder_of("qwen3").parse(ids, QUESTION, None, kwargs).reason is None
    assert encoder_of("qwen3").parse(ids, QUESTION).reason is not None


SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if '/no_think' not in messages[0].content %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if '/no_think' in messages[0].content %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_prompt_that_ends_otherwise_for_this_row():
    """SmolLM3's system prompt switches its thoughts off: such replies have another grammar."""
    encoder = ChatEncoder(pair("llama3-words", SWITCHED))
    for front, reply, message in (
        ([], "<think>\nHm.\n</think>\n\nSo.<|im_end|>", bot("So.", reasoning_content="Hm.")),
        ([{"role": "system", "content": "/no_think"}], "So.<|im_end|>", bot("So.")),
    ):
        parsed = encoder.parse(reply, [*front, *QUESTION])
        assert (parsed.message, parsed.reason) == (message, None)
        stream = encoder.stream_parser([*front, *QUESTION])
        assert ReplyDelta("content", "So") in stream.add(reply.removesuffix(".<|im_end|>"))


def test_ids_and_numbers_of_calls():
    """Ids that the template writes come back, and numbers that it counts calls by are its own."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[CALL {{ loop.index }}]{{ c.id }}:{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = ChatEncoder(pair("llama3-words", source), on_lost="keep")
    calls = [{"id": f"c{n}", **find(n=n)} for n in range(4)]
    message = bot("So:", tool_calls=calls)
    parsed = encoder.parse(ids_of(encoder, message, TOOLS), QUESTION, TOOLS)
    assert (parsed.message, parsed.reason) == (message, None)


QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TEXT = st.text(
    st.sampled_from("ab 1.,:'\"\\<>[]{}()/|=\n\té琵") | st.characters(codec="utf-8"), max_size=12
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 10**6) | st.floats(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
TYPED = st.fixed_dictionaries(
    {},
    optional={
        "word": TEXT, "n": st.integers(-99, 99), "exact": st.booleans(), "rate": st.floats(-9, 9),
        "list": st.lists(TEXT, max_size=3),
        "more": st.fixed_dictionaries({"deep": st.integers(0, 9)}),
    },
)  # fmt: skip
MESSAGES = st.builds(
    lambda content, reasoning, calls: {
        **bot(content),
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": [find(**each) for each in calls]} if calls else {}),
    },
    TEXT,
    TEXT,
    st.lists(TYPED | st.dictionaries(TEXT, JSON, max_size=2), max_size=2),
)
DRAWN = [
    "qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gemma4_v5", "lfm2_2_5", "lfm2_2_5_vl",
    "gptoss", "llama3_1", "deepseekv3", "nemotron_3_nano", "muse_glimmer", "phi3",
    "role ends (GLM-4.7, Spark 2.5)",
]  # fmt: skip


@pytest.mark.parametrize("template", DRAWN)
def test_what_counts_renders_again(template):
    """Whatever a message holds, no parse raises, and one that counts has the reply's own ids."""
    encoder = encoder_of(template)
    tokenizer = encoder.tokenizer
    has_messages = []

    @QUICK
    @given(MESSAGES)
    def check(message):
        try:
            ids = ids_of(encoder, message, TOOLS)
        except ChatError:
            return
        parsed = encoder.parse(ids, QUESTION, TOOLS)
        has_messages.append(parsed.reason is None)
        if parsed.reason is None:
            assert ids_of(encoder, parsed.message, TOOLS) == ids
        else:
            assert parsed.message == bot(tokenizer.decode(ids[:-1]))

    check()
    assert sum(has_messages) > len(has_messages) / 2


@pytest.mark.parametrize("template", DRAWN)
def test_any_text_is_read(template):
    """Pieces of markers in any order: no parse raises, and no stream loses text."""
    encoder = encoder_of(template)
    model = ids_of(encoder, bot("So."))
    whole = encoder.tokenizer.decode(model)
    parts = [whole[a:b] for a, b in ((0, 3), (3, 9), (0, -1), (5, None))]
    parts += [
        "<tool_call>",
        '{"name": "find", ',
        "<think>",
        "</think>",
        "\n",
        "<|channel|>",
        "call:find{",
    ]

    @QUICK
    @given(st.lists(st.sampled_from(parts) | TEXT, max_size=8))
    def check(pieces):
        text = "".join(pieces)
        parsed = encoder.parse(text, QUESTION, TOOLS)
        assert isinstance(parsed.message["content"], str)
        assert encoder.parse(text, QUESTION, TOOLS) == parsed
        stream = encoder.stream_parser(QUESTION, TOOLS)
        deltas = [delta for piece in pieces for delta in stream.add(piece)] + stream.finish()
        if parsed.reason is None:
            said = {name: "".join(d.text for d in deltas if d.field == name)
                    for name in ("content", "reasoning")}  # fmt: skip
            assert said["content"] == parsed.message["content"]
            assert said["reasoning"] == parsed.message.get("reasoning_content", "")

    check()
