"""Every template at hand by ten kinds of conversation, held against transformers' own rendering.

What trains must be what follows the prompt that a server feeds, up to and with the stop token; what
is refused must be refused for a cause that the rendering shows. The stop tokens are listed here by
hand. docs/chat_coverage.md holds the outcome of each cell, and a changed one fails. Write it anew,
and read what changed, with

    LUTHIER_ASSETS=folder LUTHIER_WRITE_COVERAGE=1 pytest tests/chat/test_coverage.py
"""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from helpers.conversations import (
    ASSETS,
    LOOK_UP,
    all_templates,
    assert_labels,
    bot,
    call,
    pair,
    system,
    tool,
    user,
)
from helpers.family_templates import FAMILY_TEMPLATES
from luthier.chat import ChatEncoder, ChatError

PAGE = Path(__file__).parents[2] / "docs" / "chat_coverage.md"
WRITES_PAGE = bool(os.environ.get("LUTHIER_WRITE_COVERAGE"))

# Each text of a conversation is a word of its own, so that it is found in what is rendered.
KINDS = {
    "plain": ([user("quince"), bot("apple")], None),
    "two turns": ([user("quince"), bot("apple"), user("medlar"), bot("pear")], None),
    "system": ([system("plum"), user("quince"), bot("apple")], None),
    "reasoning": ([user("quince"), bot("apple", reasoning_content="cherry")], None),
    "call": ([user("quince"), bot("", tool_calls=[call("lute")])], [LOOK_UP]),
    "call and result": (
        [user("quince"), bot("", tool_calls=[call("lute")]), tool("grape"), bot("apple")],
        [LOOK_UP],
    ),
    "parallel calls": (
        [
            user("quince"), bot("", tool_calls=[call("lute"), call("viol")]),
            tool("grape"), tool("melon"), bot("apple"),
        ],
        [LOOK_UP],
    ),
    "content and call": (
        [user("quince"), bot("olive", tool_calls=[call("lute")]), tool("grape"), bot("apple")],
        [LOOK_UP],
    ),
    "edges": (
        [
            user("\nquince\n"), bot("\n\n apple \n"), user(" medlar"), bot(""), user("sorb"),
            bot(" fig"),
        ],
        None,
    ),
    "long history": (
        [
            user("quince"), bot("apple", reasoning_content="cherry"),
            user("medlar"), bot("pear", reasoning_content="date"),
            user("sorb"), bot("fig", reasoning_content="lime"),
        ],
        None,
    ),
}  # fmt: skip

_ALL_TYPES = {
    "word": "a \"b\"\n\\ <c> é", "whole": 7, "part": 2.5, "truth": True, "list": ["x, y"],
    "object": {"key": "{z}", "deep": {"n": 1}},
}  # fmt: skip
_TYPED_TOOL = {
    "type": "function",
    "function": {
        **LOOK_UP["function"],
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "whole": {"type": "integer"},
                "part": {"type": "number"},
                "truth": {"type": "boolean"},
                "list": {"type": "array", "items": {"type": "string"}},
                "object": {
                    "type": "object",
                    "properties": {
                        "key": {"type": "string"},
                        "deep": {"type": "object", "properties": {"n": {"type": "integer"}}},
                    },
                },
            },
            "required": ["word"],
        },
    },
}
READ_BACK = {
    "content": bot('{apple}\n"pear" é'),
    "reasoning and content": bot("apple", reasoning_content="cherry\n\nplum"),
    "call": bot("", tool_calls=[call("lute")]),
    "two calls": bot("", tool_calls=[call("lute"), call("viol", whole=3)]),
    "content and call": bot("olive", tool_calls=[call("lute")]),
    "reasoning and call": bot("", reasoning_content="cherry", tool_calls=[call("lute")]),
    "values": bot("", tool_calls=[call(**_ALL_TYPES)]),
}
"""Replies of which a model's ids are parsed again."""

STOPS = [
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>",
    "<end_of_turn>", "<turn|>", "</s>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|eot|>",
    "<|end_of_text|>", "<|endoftext|>", "<|EOT|>", "<|end_of_turn|>", "<|turn_end|>",
    "<|role_end|>", "<|end_of_msg|>", "<end_of_utterance>", "[e~[", "<sep>", "</assistant>",
    "<｜hy_eos:opensource｜>", "<|hy_eos|>", "<|assistant_end|>", "<|tool_response>",
]  # fmt: skip
"""What ends a reply in the families at hand."""
NEXT_ROLES = ["<|user|>", "<|observation|>"]
"""What ends a reply where the next role's token does."""
# Tokens of the models that stand-in tokenizers lack, the end tokens of their generation configs
# first; a number says how many those are.
TOKENS = {
    "chat_templates/glm4moe": (2, NEXT_ROLES),
    "chat_templates/glm4moe_training": (2, NEXT_ROLES),
    "llama_cpp/GLM-4.7-Flash": (2, NEXT_ROLES),
    "llama_cpp_tests/ChatGLM3": (2, [*NEXT_ROLES, "<|assistant|>", "<|system|>"]),
    "llama_cpp_tests/ChatGLM4": (2, [*NEXT_ROLES, "<|assistant|>", "<|system|>"]),
    "llama_cpp_tests/GLMEdge": (2, [*NEXT_ROLES, "<|assistant|>", "<|system|>"]),
    "families/role ends (GLM-4.7, Spark 2.5)": (2, [*NEXT_ROLES, "<|system|>"]),
    "families/standing header (GLM-Edge)": (2, [*NEXT_ROLES, "<|assistant|>", "<|system|>"]),
    "llama_cpp/MiniMax-M3": (1, ["[e~[", "]~b]", "]~!b["]),
    "llama_cpp/Reka-Edge": (1, ["<sep>"]),
    "llama_cpp/poolside-Laguna-S-2.1": (1, ["</assistant>", "<assistant>", "〈|EOS|〉"]),
    "llama_cpp/tencent-Hy3": (
        1, ["<｜hy_eos:opensource｜>", "<｜hy_User:opensource｜>", "<｜hy_Assistant:opensource｜>"],
    ),
    "families/stop only in history (Hy3)": (1, ["<|hy_eos|>", "<|hy_user|>", "<|hy_assistant|>"]),
    "families/thought in words (Apriel)": (1, ["<|end|>", "<|begin_user|>", "<|begin_assistant|>"]),
    "families/header that takes white space (Phi-3)": (1, ["<|end|>", "<|user|>", "<|assistant|>"]),
    "vllm/template_chatml": (1, ["<|im_end|>"]),
}  # fmt: skip
# Refusals that no rendering justifies, judged by hand.
JUDGED = {
    "no prefix": "the prompt has no header, or words that no turn of the template begins with",
}

TEMPLATES = all_templates() | {f"families/{name}": s for name, s in FAMILY_TEMPLATES.items()}


def _words(message):
    """The words of a message, in no order."""
    calls = [each["function"]["arguments"]["word"] for each in message.get("tool_calls", ())]
    texts = [message["content"].strip(), message.get("reasoning_content", ""), *calls]
    return [text for text in texts if text]


def _with_text_arguments(message):
    calls = [
        {
            **each,
            "function": {
                **each["function"],
                "arguments": json.dumps(each["function"]["arguments"]),
            },
        }
        for each in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


class Oracle:
    """What transformers renders of one conversation, and what must train."""

    def __init__(self, tokenizer, stops, messages, tools):
        self._tokenizer, self._stops = tokenizer, stops
        self._messages, self._tools = messages, tools
        self._words = [_words(message) for message in messages]
        try:
            self.text(len(messages), False)
        except TypeError:
            # DeepSeek-V3 takes the arguments of a call as text alone.
            self._messages = [_with_text_arguments(message) for message in messages]
        except Exception:  # templates raise what they like, and refusals are looked at below
            return

    def text(self, count, generation, more=()):
        return self._tokenizer.apply_chat_template(
            [*self._messages[:count], *more],
            tools=self._tools,
            add_generation_prompt=generation,
            tokenize=False,
        )

    def words(self, index):
        """The words of a message, in no order."""
        return self._words[index]

    def ending(self, index):
        """What stands behind the last word of a turn, up to and with its stop token.

        None where no stop token comes before the words of the next message.
        """
        turn = self.text(index + 1, False)
        tail = turn[self._end(turn, index) :]
        stop = self._first_stop(tail)
        if stop is not None:
            return tail[:stop]
        # The next role's token, or one that only stands between turns.
        for following in self._following(index):
            try:
                text = self.text(index + 1, False, following)
            except Exception:  # templates raise what they like
                continue
            tail = text[self._end(text, index) :]
            tail = tail[: tail.find(following[0]["content"])] if following else tail
            stop = self._first_stop(tail)
            if stop is not None:
                return tail[:stop]
        return None

    def _following(self, index):
        after = self._messages[index + 1 : index + 2]
        result = [tool("grape")] if self._messages[index].get("tool_calls") else []
        return [each for each in (after, result, [user("sorb")]) if each]

    def _end(self, text, index):
        places = [text.rfind(word) + len(word) for word in self.words(index) if word in text]
        if places:
            return max(places)
        # An empty turn: its stop token is the last thing that its text holds.
        prompt = self.text(index, True)
        if text.startswith(prompt):
            return len(prompt)
        return max(text.rfind(stop) for stop in self._stops)

    def _first_stop(self, tail):
        """Where the first stop token ends; None behind the opening of another turn."""
        places = [(tail.find(stop), len(stop)) for stop in self._stops if stop in tail]
        if not places:
            return None
        start, length = min(places)
        opens = re.search(r"<\|START_OF_TURN_TOKEN\|>|<\|im_start\|>|<\|start_header_id\|>", tail)
        return None if opens and opens.start() < start else start + length

    def check_reply(self, index, reply):
        """Hold one trained reply against the rendering; whether no turn begins with its prompt."""
        prompt, turn, ending = (
            self.text(index, True),
            self.text(index + 1, False),
            self.ending(index),
        )
        assert ending is not None and reply.endswith(ending), (reply, ending)
        for other in range(len(self._messages)):
            foreign = set(self.words(other)) - set(self.words(index))
            assert not any(word in reply for word in foreign), reply
        for word in self.words(index):
            assert reply.count(word) == 1, reply
        if not turn.startswith(prompt):
            return True
        body = turn[len(prompt) :]
        end = self._end(turn, index) - len(prompt)
        assert reply == body[: max(end, 0)] + ending, (reply, body)
        return False

    def check_refusal(self, error):
        """Hold a refusal against the rendering."""
        trained = [i for i, m in enumerate(self._messages) if m["role"] == "assistant"]
        if error.reason == "template refuses":
            with pytest.raises(Exception):  # noqa: B017 (templates raise what they like)
                for count in range(1, len(self._messages) + 1):
                    self.text(count, False)
                    self.text(count, True)
        elif error.reason == "lost" and error.field == "tools":
            assert "Looks a word up." not in self.text(len(self._messages), False)
        elif error.reason == "lost":
            shown = [self.text(index + 1, False) for index in trained]
            shown += [self.text(index, True) for index in trained]
            words = re.search(r"\('(.*)'\)", error.text)
            assert words is None or not self._shows(shown, error, words[1])
        elif error.reason == "no stop token":
            assert self.ending(error.message) is None
        else:
            assert error.reason in JUDGED, error

    def _shows(self, texts, error, words):
        """Whether one of the texts shows the words that are said to be lost."""
        if error.field == "tool_calls":
            return all(any(word in text for word in self.words(error.message)) for text in texts)
        if self._messages[error.message]["role"] != "assistant":
            return any(words in text for text in texts)
        if error.field == "content":
            return words in self.text(error.message + 1, False)
        # A prompt that closes the thought cannot be followed by one.
        prompt = self.text(error.message, True)
        turn = self.text(error.message + 1, False)
        return any(words in text for text in texts) and turn.startswith(prompt)


def outcomes(name):
    """The cells of a template, and the replies that are written behind a prompt of another form."""
    source = TEMPLATES[name]
    ends, tokens = TOKENS.get(name, (0, []))
    tokenizer = pair("gpt2-words", source + "".join(tokens))
    have = tokenizer.added_tokens_encoder
    tokenizer.add_tokens([token for token in tokens if token not in have], special_tokens=True)
    tokenizer.chat_template = source
    stops = STOPS + (NEXT_ROLES if tokens[:2] == NEXT_ROLES else [])
    try:
        ids = tokenizer.convert_tokens_to_ids(tokens[:ends])
        encoder = ChatEncoder(tokenizer, eos_token_ids=ids, empty_replies="train")
    except ChatError as error:
        assert error.reason == "bad template", error
        return dict.fromkeys(KINDS, "no template"), {}, dict.fromkeys(READ_BACK, "–")
    cells, written = {}, {}
    for kind, (messages, tools) in KINDS.items():
        oracle = Oracle(tokenizer, stops, messages, tools)
        try:
            sequences = encoder.encode(messages, tools)
        except ChatError as error:
            oracle.check_refusal(error)
            cells[kind] = error.reason + (f": {error.field}" if error.reason == "lost" else "")
            continue
        replies = {}
        for sequence in sequences:
            assert_labels(sequence)
            for message, start, stop in sequence.replies:
                ids = sequence.input_ids
                served = tokenizer(oracle.text(message, True), add_special_tokens=False)
                assert ids[:start] == served["input_ids"]
                assert ids[stop - 1] in encoder.stop_token_ids
                replies[message] = tokenizer.decode(ids[start:stop])
        expected = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert sorted(replies) == expected
        behind = [oracle.check_reply(index, replies[index]) for index in expected]
        cells[kind] = "written" if any(behind) else "exact"
        if any(behind):
            written[kind] = [replies[index] for index in expected]
    return cells, written, read_back(encoder)


def read_back(encoder):
    """What `ChatEncoder.parse` makes of the ids of each reply: `same`, or why it is not."""
    cells = {}
    for kind, message in READ_BACK.items():
        tools = [_TYPED_TOOL] if "tool_calls" in message else None
        sequence = _encode_reply(encoder, message, tools)
        if sequence is None:
            cells[kind] = "–"
            continue
        _, start, stop = sequence.replies[-1]
        parsed = encoder.parse(sequence.input_ids[start:stop], [user("quince")], tools)
        assert parsed.reason is None, (kind, parsed)
        fields = ("content", "reasoning_content", "tool_calls")
        found, wanted = (
            [_without_ids(each.get(field)) for field in fields]
            for each in (parsed.message, message)
        )
        moved = found == ["", message["content"], wanted[2]]
        assert found == wanted or moved, (kind, parsed)
        cells[kind] = "same" if found == wanted else "content as reasoning"
    return cells


def _encode_reply(encoder, message, tools):
    """The sequence of a reply; None where the template does not write it."""
    try:
        return encoder.encode([user("quince"), message], tools)[-1]
    except ChatError as error:
        # DeepSeek-V3's template shows calls and no tools.
        return _encode_reply(encoder, message, None) if error.field == "tools" else None


def _without_ids(value):
    """A field of a message, without the ids that link calls: not all templates write them."""
    calls = value if isinstance(value, list) else None
    return value if calls is None else [each["function"] for each in calls]


def page_rows(name, cells, written, read):
    """The lines of the page for one template."""
    digest = hashlib.sha256(TEMPLATES[name].encode()).hexdigest()[:8]
    label = name.removeprefix("chat_templates/")
    rows = [f"| {label} | {digest} | " + " | ".join(each.values()) + " |" for each in (cells, read)]
    for kind, replies in written.items():
        shown = ", ".join(f"`{_escape(reply)}`" for reply in replies)
        rows.append(f"| {label} | {digest} | {kind} | {shown} |")
    return rows


def _escape(text):
    return text.replace("\n", "\\n").replace("|", "\\|")


@pytest.fixture(scope="module")
def page():
    return set(PAGE.read_text(encoding="utf-8").splitlines())


@pytest.mark.skipif(WRITES_PAGE, reason="the page is being written")
@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name, page):
    rows = page_rows(name, *outcomes(name))
    begin = rows[0].split(" | ")[:2]
    if not any(line.split(" | ")[:2] == begin for line in page):
        # What is at hand differs by the version of TRL; that nothing is wrong was checked above.
        pytest.skip("this version of the template is not on the page")
    assert [row for row in rows if row not in page] == []


@pytest.mark.skipif(WRITES_PAGE, reason="the page is being written")
def test_most_cells_are_exact(page):
    cells = [cell for line in page for cell in line.split(" | ")[2:] if line.startswith("| ")]
    assert sum(cell.strip(" |") in ("exact", "written") for cell in cells) > 700


@pytest.mark.skipif(not (WRITES_PAGE and ASSETS), reason="writes the page where it is asked to")
def test_write_page():
    found = {name: outcomes(name) for name in TEMPLATES}
    rows = {name: page_rows(name, *found[name]) for name in found}
    PAGE.write_text(render_page(rows, [each[0] for each in found.values()]), encoding="utf-8")


def render_page(rows, cells):
    values = [value for each in cells for value in each.values()]
    trained = sum(value in ("exact", "written") for value in values)
    header = f"| template | version | {' | '.join(KINDS)} |"
    return "\n".join([
        "# Chat templates: what trains, and what is refused",
        "",
        "Each template at hand with ten kinds of conversation, compared with transformers' own",
        f"rendering: {len(values)} cells, of which {trained} train, and none is wrong. This page",
        "is written by `tests/chat/test_coverage.py`, which fails if a cell changes. The",
        "tokenizers are stand-ins with the family's control tokens. `version` is the start of the",
        "template's SHA-256. `families/...` are small templates in the style of families whose own",
        "templates are not at hand; names without a folder are the templates that TRL ships.",
        "",
        "- **exact**: what trains is what the template writes after the prompt that a server",
        "  feeds, up to and including the stop token, character for character.",
        "- **written**: the turn begins differently from how its prompt ends (the prompt opens or",
        "  closes a thought). What trains is written after the prompt; the second table shows it.",
        "- **lost**: the template does not show this field, so the row is reported.",
        "- **template refuses**: the template raises an error of its own.",
        "- **no stop token**: the template ends the turn with no token that could stop a model.",
        "- **no prefix**: the prompt ends in such a way that no reply can follow.",
        "- **no template**: the template does not compile.",
        "",
        header,
        "|---" * (len(KINDS) + 2) + "|",
        *(each[0] for each in rows.values()),
        "",
        "## Replies that are written after their prompts",
        "",
        "| template | version | conversation | replies |",
        "|---|---|---|---|",
        *(line for each in rows.values() for line in each[2:]),
        "",
        "## Replies that are read back",
        "",
        "What `ChatEncoder.parse` returns for the ids that a model writes for a message.",
        "",
        "- **same**: the same message, with every field, and every value with its type.",
        "- **content as reasoning**: the template writes content beside a call exactly as it",
        "  writes reasoning, so the two cannot be told apart; the content is read as reasoning.",
        "- **–**: the template does not write such a reply, as the first table says.",
        "",
        f"| template | version | {' | '.join(READ_BACK)} |",
        "|---" * (len(READ_BACK) + 2) + "|",
        *(each[1] for each in rows.values()),
        "",
    ])  # fmt: skip
