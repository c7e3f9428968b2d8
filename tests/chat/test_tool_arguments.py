"""Both forms of a call's arguments, an object and JSON text, give the same ids."""

import json

import pytest

from helpers.conversations import LOOK_UP, all_templates, bot, call, pair, tool, trl, user
from luthier.chat import ChatEncoder, ChatError

ARGUMENTS = {"word": "lute", "n": 12, "deep": {"a": [1, None, "é"]}, "no": None}
TEXT_FORMS = {
    "spaced": json.dumps(ARGUMENTS, ensure_ascii=False),
    "compact": json.dumps(ARGUMENTS, ensure_ascii=False, separators=(",", ":")),
    "escaped": json.dumps(ARGUMENTS),
}


def row(arguments):
    written = call()
    written["function"] = {"name": "look_up", "arguments": arguments}
    return [user("q"), bot("", tool_calls=[written]), tool("noon"), bot("It is noon.")]


def encoded(encoder, messages):
    """The ids and trained stretches of a row, or the words of its refusal."""
    try:
        sequences = encoder.encode(messages, [LOOK_UP])
    except ChatError as error:
        return str(error)
    return [(sequence.input_ids, sequence.replies) for sequence in sequences]


def arguments_of(encoder, arguments):
    converted = encoder.convert_arguments(row(arguments), [LOOK_UP])
    return converted[1]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("name", all_templates())
def test_both_forms_give_the_same_ids(name):
    try:
        encoder = ChatEncoder(pair("gpt2-words", all_templates()[name]))
    except ChatError:
        pytest.skip("the template does not compile")
    expected = encoded(encoder, row(ARGUMENTS))
    for written in TEXT_FORMS.values():
        shown = encoded(encoder, row(written))
        if encoder._pipelines.for_tools([LOOK_UP]).arguments.form == "object":
            assert shown == expected
        elif isinstance(expected, list) and isinstance(shown, list):
            assert [len(replies) for _, replies in shown] == [len(r) for _, r in expected]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("qwen3_5_think", "object"),  # loops over the arguments
        ("qwen2_5", "object"),  # encodes text once more
        ("gptoss", "object"),  # the same
        ("qwen3", "object"),  # takes both; servers give it objects
        ("deepseekv3", "text"),  # adds the arguments to a string
        ("llama3", None),  # shows no calls
    ],
)
def test_the_form_is_found_by_rendering(template, form):
    encoder = ChatEncoder(pair("gpt2-words", trl(template)))
    assert encoder._pipelines.for_tools([LOOK_UP]).arguments.form == form


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen2_5", "gptoss", "deepseekv3"])
@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, *TEXT_FORMS.values()], ids=["object", *TEXT_FORMS]
)
def test_calls_train_in_either_form(template, arguments):
    tokenizer = pair("gpt2-words", trl(template))
    encoder = ChatEncoder(tokenizer)
    # DeepSeek-V3's template shows no tools.
    tools = None if template == "deepseekv3" else [LOOK_UP]
    sequences = encoder.encode(row(arguments), tools)
    text = "".join(tokenizer.decode(sequence.input_ids) for sequence in sequences)
    assert "lute" in text and r"\"word" not in text and "{'word'" not in text


def test_a_prompt_takes_either_form():
    encoder = ChatEncoder(pair("gpt2-words", trl("qwen3_5_think")))
    forms = [row(ARGUMENTS)[:3], row(TEXT_FORMS["compact"])[:3]]
    first, second = (encoder.prompt(messages, [LOOK_UP]) for messages in forms)
    assert first == second


@pytest.mark.parametrize(
    "text",
    ["word=lute", "[1, 2]", "7", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 5000, '{"a": 1'],
    ids=["no JSON", "list", "number", "key twice", "NaN", "deep", "cut"],
)
def test_text_that_means_no_object_stays_text_and_is_refused_where_it_would_be_lost(text):
    encoder = ChatEncoder(pair("gpt2-words", trl("qwen2_5"), eos="<|im_end|>"))
    assert arguments_of(encoder, text) == text
    with pytest.raises(ChatError, match="arguments"):
        encoder.encode(row(text), [LOOK_UP])


def test_an_empty_text_is_a_call_without_arguments():
    encoder = ChatEncoder(pair("gpt2-words", trl("qwen3"), eos="<|im_end|>"))
    assert arguments_of(encoder, "") == arguments_of(encoder, "{}") == {}


def test_the_row_itself_is_not_changed():
    encoder = ChatEncoder(pair("gpt2-words", trl("deepseekv3")))
    messages = row(ARGUMENTS)
    assert arguments_of(encoder, ARGUMENTS) == TEXT_FORMS["spaced"]
    encoder.convert_arguments(messages, [LOOK_UP])
    assert messages == row(ARGUMENTS)


@pytest.mark.parametrize(
    "messages", [None, "hi", [], [1], [{"role": "assistant", "tool_calls": 5}],
                 [{"role": "assistant", "content": "", "tool_calls": [5, {}, {"function": 3}]}]],
)  # fmt: skip
def test_what_is_no_call_is_left_to_the_checks(messages):
    encoder = ChatEncoder(pair("gpt2-words", trl("qwen3"), eos="<|im_end|>"))
    assert encoder.convert_arguments(messages) == messages
