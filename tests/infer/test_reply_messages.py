"""Replies as messages: reasoning, content and tool calls, of every way to ask a model."""

import io
import json

import pytest
from rich.console import Console

from helpers.chatml import jsonl
from luthier.chat import ParsedReply
from luthier.cli.chat import ChatRepl
from luthier.errors import UserError
from luthier.infer import LLM
from luthier.infer.reply_messages import format_message, make_call_id

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "abc"}
PROMPT = {"messages": [QUESTION], "tools": TOOLS}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "ä"}}\n</tool_call>'
REPLY = f"<think>\nhm\n</think>\n\nWell.\n{CALL}\n{CALL}<|im_end|>"
BROKEN = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look_up", "argu\n</tool_call><|im_end|>'
SAMPLES = {
    "calls": REPLY,
    "content": "<think>\nhm\n</think>\n\nWell.<|im_end|>",
    "broken": BROKEN,
}


def test_replies_are_messages(thinker, forced):
    forced(REPLY)
    first, second = (thinker.replies([PROMPT], max_new_tokens=300)[0] for _ in range(2))
    message = first.message
    assert (message["content"], message["reasoning_content"]) == ("Well.", "hm")
    assert first.parse_error is None and first.finish == "stop"
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "look_up", "arguments": '{"word": "ä"}'}] * 2
    ids = [call["id"] for call in message["tool_calls"]]
    assert len({*ids}) == 2 and all(len(each) == 9 and each.isalnum() for each in ids)
    assert first == second
    # What a model wrote is what it reads of it later.
    history = [QUESTION, message, {"role": "tool", "content": "1"}]
    assert CALL in thinker.tokenizer.decode(thinker.prompt_ids([PROMPT | {"messages": history}])[0])
    forced(BROKEN)
    (reply,) = thinker.replies([PROMPT], max_new_tokens=300)
    assert reply.message == {"role": "assistant", "content": BROKEN.removesuffix("<|im_end|>")}
    assert reply.parse_error.startswith("the calls of the reply cannot be read")


def test_a_cut_reply_is_a_message_as_far_as_it_came(thinker, forced):
    forced(REPLY)
    size = len("<think>\nhm")
    (reply,) = thinker.replies([PROMPT], max_new_tokens=size)
    assert (reply.finish, reply.parse_error) == ("length", None)
    assert reply.message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_stream_is_the_message_in_pieces(thinker, forced, sample):
    forced(SAMPLES[sample])
    (whole,) = thinker.replies([PROMPT], max_new_tokens=300)
    ended = []
    deltas = list(thinker.stream_deltas(PROMPT, on_end=ended.append, max_new_tokens=300))
    assert ended == [whole]
    texts = {name: "".join(d.text for d in deltas if d.field == name)
             for name in ("reasoning", "content")}  # fmt: skip
    calls = [(d.name, d.text) for d in deltas if d.field == "tool_call"]
    if sample == "broken":
        # What was said of the reasoning stays said; no text of the call is lost.
        assert texts["reasoning"] == "hm" and '"argu' in texts["content"] and not calls
        return
    assert texts["reasoning"] == whole.message["reasoning_content"]
    assert texts["content"] == whole.message["content"]
    functions = [call["function"] for call in whole.message.get("tool_calls", ())]
    assert calls == [(each["name"], each["arguments"]) for each in functions]
    assert len([d for d in deltas if d.field == "content"]) > 3


def test_a_conversation_goes_on_behind_calls(thinker, forced):
    forced(REPLY)
    chat = thinker.chat(tools=TOOLS)
    assert chat.say("abc", max_new_tokens=300) == "Well."
    calls = chat.turns[-1]["tool_calls"]
    with pytest.raises(UserError, match="there are 1 results, and the last reply has 2 calls"):
        chat.answer_calls(["1"])
    forced(SAMPLES["content"])
    deltas = list(chat.answer_calls(["1", "2"], max_new_tokens=300))
    assert "".join(delta.text for delta in deltas if delta.field == "content") == "Well."
    assert [turn["role"] for turn in chat.turns] == [
        "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert [turn["tool_call_id"] for turn in chat.turns[2:4]] == [call["id"] for call in calls]


@pytest.fixture
def terminal(thinker):
    """A chat in the terminal with a tool; gives it, and what takes a line and returns the page."""
    page = io.StringIO()
    console = Console(file=page, width=80)
    chat = ChatRepl(console, thinker, None, {"max_new_tokens": 300}, None, TOOLS)

    def take(line):
        page.seek(0)
        page.truncate()
        chat.take(line)
        return page.getvalue()

    return chat, take


def test_the_terminal_shows_calls_and_takes_what_they_return(terminal, forced, tmp_path):
    chat, take = terminal
    roles = lambda: [turn["role"] for turn in chat._chats[0].turns]  # noqa: E731
    forced(REPLY)
    call = 'look_up({"word": "ä"})'
    first = take("abc")
    assert first.startswith(f"hm\nWell.\n{call}\n{call}\n")
    assert first.endswith("not run: type what look_up returns, or /skip\n")
    assert take("1") == "and what does look_up return?\n"
    forced(SAMPLES["content"])
    assert take("2").startswith("hm\nWell.\n")
    assert roles() == ["user", "assistant", "tool", "tool", "assistant"]
    assert [turn["content"] for turn in chat._chats[0].turns[2:4]] == ["1", "2"]
    # The last answer again, to the same results; then as if nothing had been said.
    take("/retry")
    assert roles() == ["user", "assistant", "tool", "tool", "assistant"]
    take(f"/save {tmp_path / 'chat.jsonl'}")
    assert json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["tools"] == TOOLS
    assert take("/skip") == "/skip: no call waits for a result.\n"


def test_calls_in_the_terminal_may_stay_without_results(terminal, forced):
    chat, take = terminal
    forced(REPLY)
    take("abc")
    take("1")
    assert take("/skip") == "the calls stay without results\n"
    forced(SAMPLES["content"])
    take("more")
    assert [turn["role"] for turn in chat._chats[0].turns] == [
        "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    forced(REPLY)
    take("again")
    assert take("/reset") == "the conversation begins anew\n"
    forced(SAMPLES["content"])
    take("abc")
    assert [turn["role"] for turn in chat._chats[0].turns] == ["user", "assistant"]


def test_what_was_not_answered_is_not_taken_back(thinker, forced):
    forced(REPLY)
    chat = thinker.chat(tools=TOOLS)
    chat.say("abc", max_new_tokens=300)
    turns = list(chat.turns)
    with pytest.raises(UserError, match="the model reads 4,096 with its reply"):
        list(chat.answer_calls(["x" * 5000, "2"]))
    chat.take_back(["x" * 5000, "2"])
    assert chat.turns == turns
    chat.take_back(["abc"])
    assert chat.turns == []
    chat.take_back(["abc"])
    assert chat.turns == []


def test_generate_writes_messages(luthier, thinker_folder, tmp_path, monkeypatch, thinker, forced):
    rows = [PROMPT | {"messages": [QUESTION, {"role": "assistant", "content": "x"}]}]
    file, out = jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    # The command's own model is the one that is made to write.
    monkeypatch.setattr(LLM, "__enter__", lambda self: self.__dict__.update(vars(thinker)))
    monkeypatch.setattr(LLM, "__exit__", lambda *_: None)
    for text, name in ((REPLY, "a"), (BROKEN, "b")):
        forced(text)
        out = tmp_path / f"{name}.jsonl"
        code, _, err = luthier("generate", thinker_folder, file, "-o", out, "max_new_tokens=300")
        assert code == 0, err
        row = json.loads(out.read_text(encoding="utf-8"))
        assert ("tool_calls" in row["message"]) == (text == REPLY)
        assert ("parse_error" in row) == (text == BROKEN)


def test_ids_of_the_template_stay():
    call = {"id": "abc", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    other = {"type": "function", "function": {"name": "f", "arguments": '{ "n":1}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call, other]}
    calls = format_message(ParsedReply(message), 1)["tool_calls"]
    assert calls[0] == call | {"function": {"name": "f", "arguments": '{"n": 1}'}}
    assert calls[1]["function"]["arguments"] == '{ "n":1}'
    assert calls[1]["id"] != format_message(ParsedReply(message), 3)["tool_calls"][1]["id"]
    assert make_call_id() != make_call_id() and len(make_call_id()) == 9
