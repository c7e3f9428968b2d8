"""Rendering equals transformers' own, character for character, and every character is traced."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from helpers.conversations import LOOK_UP, all_templates, bot, call, system, tool, user
from luthier.chat import ChatError
from luthier.chat.conversation import read_conversation
from luthier.chat.template import ChatTemplate

TEMPLATES = all_templates()
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = {
    "plain": ([user("Hi"), bot("Hello"), user(" more \n"), bot("\n\nYes ")], None),
    "system": ([system(" Be nice. "), user("Hi"), bot("Hello"), user("m"), bot("Yes")], None),
    "reasoning": (
        [user("Hi"), bot("Hello", reasoning_content="I think\nso"), user("m"), bot("Y")],
        None,
    ),
    "thoughts": ([user("Hi"), bot("<think>\nfoo\n</think>\n\nHello"), user("m"), bot("Yes")], None),
    "tool": (
        [
            system("s"),
            user("Hi"),
            bot("", tool_calls=[call('l\'ute <x> "q" é', n=2)]),
            tool("4 <a>"),
            bot("d"),
        ],
        [LOOK_UP],
    ),
    "two tools": (
        [
            user("Hi"),
            bot("so", tool_calls=[call(), call("b")], reasoning_content="hm"),
            tool("1"),
            tool("2"),
            bot("d"),
        ],
        [LOOK_UP],
    ),
    "no content": (
        [user("Hi"), bot(None, tool_calls=[call()]), tool("42"), bot("done"), user("ok")],
        [LOOK_UP],
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, bot("Yo")], None),
    "odd roles": ([bot("hello"), user("a"), user("b"), system("c"), bot("d"), bot("e")], None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name):
    source = TEMPLATES[name]
    try:
        template = ChatTemplate(source, VARIABLES, "2025-01-02")
    except ChatError as error:
        assert error.reason == "bad template"
        return
    clock = template._strftime_now
    for messages, tools in CONVERSATIONS.values():
        for generation in (False, True):
            plain = [
                {key: value for key, value in m.items() if value is not None} for m in messages
            ]
            try:
                expected = render_jinja_template(
                    [plain],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=generation,
                    **VARIABLES,
                )[0][0]
                expected = template._written_plainly(
                    {
                        **VARIABLES,
                        "messages": _aliased(plain),
                        "tools": tools,
                        "documents": None,
                        "add_generation_prompt": generation,
                        "strftime_now": clock,
                    }
                )
            except Exception:
                with pytest.raises(ChatError, match="refuses"):
                    _render(template, messages, tools, generation)
                continue
            text = _render(template, messages, tools, generation)
            assert str(text) == expected
            assert sum(length for length, _, _ in text._runs) == len(text)
            _assert_runs_copy_their_fields(text)


def _render(template, messages, tools, generation):
    conversation = read_conversation(messages, tools)
    return template.render(conversation.messages, conversation.tools, generation)


def _aliased(messages):
    """Reasoning under both names, as transformers passes it."""
    return [
        {"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m
        for m in messages
    ]


def _assert_runs_copy_their_fields(text):
    position = 0
    for length, origin, start in text._runs:
        piece = str(text)[position : position + length]
        position += length
        if origin is not None and start >= 0 and origin.text is not None:
            assert piece.lower() == origin.text[start : start + length].lower()


def test_followed_runs_say_what_shorter_ones_write():
    """What `render_with_prefixes` says of the first k messages is what rendering them gives."""
    known = 0
    for source in TEMPLATES.values():
        try:
            template = ChatTemplate(source, VARIABLES, "2025-01-02")
        except ChatError:
            continue
        for messages, tools in CONVERSATIONS.values():
            conversation = read_conversation(messages, tools)
            for generation in (False, True):
                try:
                    whole = template.render_with_prefixes(
                        conversation.messages, conversation.tools, generation
                    )
                except ChatError:
                    continue
                for k in range(1, len(messages)):
                    places = whole.prefix(k)
                    if places is None:
                        continue
                    known += 1
                    alone = template.render(
                        conversation.messages[:k], conversation.tools, generation
                    )
                    assert whole.plain[: places[0]] + whole.plain[places[1] :] == alone
    assert known > 500


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|no attribute"),
        ("{{ messages.__class__.__init__.__globals__ }}", "unsafe|undefined|no attribute"),
        ("{{ messages[0].content._runs[0] }}", "unsafe|undefined|no attribute"),
        ("{{ messages.append(1) }}", "unsafe|undefined|no attribute|not safely"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ raise_exception(messages) }}", "Hi"),
    ],
)
def test_the_sandbox_refuses_in_words(source, words):
    with pytest.raises(ChatError, match=words):
        _render(ChatTemplate(source, VARIABLES, "2025-01-02"), [user("Hi")], None, False)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ messages[0].content.center(6) }}", "  Hi  "),
        ("{{ messages[0].content | center(6) }}", "  Hi  "),
        ("{{ '%d %5s' % (20000000000, messages[0].content) }}", "20000000000    Hi"),
        ("{{ '{} {:>4}'.format(20000000000, messages[0].content) }}", "20000000000   Hi"),
    ],
)
def test_widths(source, written):
    template = ChatTemplate(source, VARIABLES, "2025-01-02")
    assert _render(template, [user("Hi")], None, False) == written
