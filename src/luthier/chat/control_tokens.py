"""Which tokens a template uses to steer, found by rendering with it, never by its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.chat.content_forms import ContentConverter
from luthier.chat.conversation import read_conversation
from luthier.chat.images import ImageOrigin
from luthier.chat.provenance import TracedStr, origin_spans
from luthier.chat.template import ChatTemplate
from luthier.chat.tokens import (
    TokenEncoder,
    compile_token_pattern,
    list_control_tokens,
)
from luthier.chat.types import ChatError

Messages = list[dict[str, Any]]


def _tool_call(word: str) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": {"word": word}}
    return {"type": "function", "id": "call00001", "function": function}


_CALLS = [_tool_call("lute"), _tool_call("viol")]
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
PROBE_QUESTION = {"role": "user", "content": "What is a lute?"}
_ANSWER = {"role": "assistant", "content": "An instrument with strings."}
_THOUGHTFUL_ANSWER = {**_ANSWER, "reasoning_content": "It is plucked."}
_RESULT = {"role": "tool", "content": "42", "name": "look_up", "tool_call_id": "call00001"}
_CALL_TURNS = [{"role": "assistant", "content": "", "tool_calls": _CALLS[:n]} for n in (2, 1)]
"""Two calls show what stands between calls; not every template writes two."""


class ControlTokens:
    """The control tokens, turn markers and stop tokens of one template with one tokenizer."""

    def __init__(
        self,
        template: ChatTemplate,
        encoder: TokenEncoder,
        eos_token_ids: Iterable[int],
        content: ContentConverter | None = None,
    ) -> None:
        """`content`: for a model that takes images, whose templates may take lists of parts."""
        self._template = template
        self._content = content
        self._added = encoder.added
        self._special = encoder.special
        self._any = encoder.pattern
        names = {index: name for name, index in encoder.added.items()}
        # Ids may be 0: only None means that there is none.
        eos = encoder.tokenizer.eos_token_id
        configured_ids = list(eos_token_ids)
        eos_ids = [*([] if eos is None else [eos]), *configured_ids]
        self.tokens = list_control_tokens(encoder.tokenizer, template.source)
        self.pattern = compile_token_pattern(self.tokens)
        self._firsts = {token[0] for token in self.tokens}
        self._lasts = {token[-1] for token in self.tokens}
        self._edges = self._firsts | self._lasts
        self._longest = max(map(len, self.tokens), default=0)
        self._configured = frozenset(names[index] for index in configured_ids if index in names)
        self._eos_tokens = frozenset(names[index] for index in eos_ids if index in names)
        self._bos_token = encoder.tokenizer.bos_token
        self._turn_openers = self._find_turn_openers() - self._eos_tokens
        # What ends a plain reply comes first: generation ends there with no setting.
        answer_stop = self._written_stop([_ANSWER], [PROBE_QUESTION], None)
        calls = next((turn for turn in _CALL_TURNS if self._shows([PROBE_QUESTION, turn])), None)
        call_stop = calls and self._written_stop([calls], [_RESULT], answer_stop)
        written = [stop for stop in (answer_stop, call_stop) if stop is not None]
        eos = [names[index] for index in eos_ids if index in names]
        self._stops = list(dict.fromkeys([*written, *eos]))
        self.stop_token_ids = list(
            dict.fromkeys([encoder.added[stop] for stop in self._stops] + eos_ids)
        )
        self.turn_markers = self._special_markers() | self._written_markers()

    def find_stop(self, tail: str) -> tuple[int, str] | None:
        """Return where the first stop token behind a reply's last field ends, and which it is.

        None where there is none, or where another turn opens in front of it.
        """
        for match in self._any.finditer(tail):
            if match[0] in self._stops:
                return match.end(), match[0]
            if match[0] in self._turn_openers:
                return None
        return None

    def find_next_turn_stop(self, tail: TracedStr) -> tuple[TracedStr, str] | None:
        """Return the text up to an end-of-sequence token right behind a turn, and the token.

        None where another token, or text, comes first.
        """
        match = self._any.search(tail)
        if match is None or match[0] not in self._eos_tokens or tail[: match.start()].strip():
            return None
        return tail[: match.end()], match[0]

    def find_openers(self, text: str) -> list[int]:
        """Return where the tokens stand with which a turn opens."""
        return [m.start() for m in self._any.finditer(text) if m[0] in self._turn_openers]

    def ends_closed(self, text: str) -> bool:
        """Return whether a text ends in a stop token, so that no turn is open behind it."""
        tokens = list(self._any.finditer(text))
        return (
            bool(tokens) and tokens[-1][0] in self._stops and not text[tokens[-1].end() :].strip()
        )

    def remove_tokens(self, text: str) -> str:
        """Return the text without its added tokens."""
        return self._any.sub("", text)

    def has_suspects(self, texts: Iterable[str]) -> bool:
        """Return whether a text may hold a control token, or a part of one at its edge."""
        texts = list(texts)
        joined = "".join(texts)
        # One search in all texts together settles most rows.
        if not any(edge in joined for edge in self._edges):
            return False
        return any(self._is_suspect(text) for text in texts)

    def _is_suspect(self, text: str) -> bool:
        # Half a token at a text's edge becomes a whole one beside text of the template.
        if self.pattern.search(text):
            return True
        head, tail = text[: self._longest], text[-self._longest :]
        return any(last in head for last in self._lasts) or any(
            first in tail for first in self._firsts
        )

    def literal_spans(self, text: TracedStr) -> list[tuple[int, int]]:
        """Return the spans of control tokens that messages wrote; they are encoded as text.

        Those of an image's own text are the processor's, and tokens.
        """
        if not self.pattern.search(text):
            return []
        fields = [
            (start, stop, origin)
            for start, stop, origin in origin_spans(text._runs)
            if origin is not None and not isinstance(origin, ImageOrigin)
        ]
        literal_spans = []
        current = 0
        for match in self.pattern.finditer(text):
            # The first field that does not end before the match; both are in order.
            while current < len(fields) and fields[current][1] <= match.start():
                current += 1
            if current == len(fields):
                break
            start, _, origin = fields[current]
            # Assistant text is the model's own language: `<think>` and the like stay tokens there.
            is_model_text = origin.role == "assistant" and match[0] not in self.turn_markers
            if start < match.end() and not is_model_text:
                literal_spans.append(match.span())
        return literal_spans

    def _render(self, messages: Messages, generation: bool) -> TracedStr | None:
        """Return a small conversation as rendered; None where the template refuses it."""
        if self._content is not None:
            messages = self._content.convert(messages)
        # Some templates for tools refuse a row without any, others one with them.
        has_calls = any("tool_calls" in message for message in messages)
        for tools in ([PROBE_TOOL], None) if has_calls else (None, [PROBE_TOOL]):
            try:
                row = read_conversation(messages, tools)
                return self._template.render(row.messages, row.tools, generation)
            except ChatError:
                continue
        return None

    def _find_turn_openers(self) -> set[str]:
        """Return the tokens with which a conversation, and the prompt for a reply, begin."""
        question, prompt = (
            self._render([PROBE_QUESTION], False),
            self._render([PROBE_QUESTION], True),
        )
        if question is None:
            return set()
        begin, end = _message_span(question, 0)
        head = str.__str__(question)[:begin].replace(self._bos_token or "\0", "")
        openers = set(self._leading_tokens(head))
        # Some templates write the header of the reply whether it is asked for or not.
        has_header = not openers.isdisjoint(self._tokens(question[end:]))
        if prompt is not None and prompt.startswith(question) and not has_header:
            openers.update(self._leading_tokens(prompt[len(question) :])[:1])
        return openers - self._reply_tokens(prompt)

    def _reply_tokens(self, prompt: str | None) -> set[str]:
        """Return the tokens in front of a reply's last character, behind its prompt."""
        tokens: set[str] = set()
        for reply in (_ANSWER, _THOUGHTFUL_ANSWER):
            text = self._render([PROBE_QUESTION, reply], False)
            if prompt is not None and text is not None and text.startswith(prompt):
                tokens.update(self._tokens(text[len(prompt) : _message_span(text, 1)[1]]))
        return tokens

    def _shows(self, messages: Messages) -> bool:
        """Return whether the template takes these messages and shows text of the last one."""
        text = self._render(messages, False)
        return text is not None and bool(_text_of_message(text, len(messages) - 1))

    def _leading_tokens(self, text: str) -> list[str]:
        """Return the tokens at the start of a text, with nothing but white space between them."""
        leading: list[str] = []
        position = 0
        for match in self._any.finditer(text):
            if text[position : match.start()].strip():
                break
            leading.append(match[0])
            position = match.end()
        return leading

    def _written_stop(self, reply: Messages, followers: Messages, known: str | None) -> str | None:
        """Return the token that ends this reply, be it the last message or not.

        A configured end token that the template writes behind the reply, or as the first of the
        next turn (GLM), is the one. Elsewhere it is the last control token that stands behind the
        reply whether or not another turn follows: some templates write more behind the very last
        turn (an end of text). `known`: the token that ends other replies, if it is known.
        """
        last = self._render([PROBE_QUESTION, *reply], False)
        if last is None:
            return None
        tail = self._ending(last)
        followed = self._render([PROBE_QUESTION, *reply, *followers], False) or self._render(
            [PROBE_QUESTION, *reply, PROBE_QUESTION], False
        )
        rest = tail if followed is None else self._ending(followed)
        same = 0
        while same < min(len(tail), len(rest)) and tail[same] == rest[same]:
            same += 1
        following = [token for token in rest[same : same + 1] if token != self._bos_token]
        for token in (*tail, *following):
            if token in self._configured or token == known:
                return token
        candidates = [token for token in tail[:same] if self._can_end(token, last)]
        # The tokenizer's own end token may be the end of a text that stands behind the turn's.
        if candidates:
            return next((t for t in candidates if t in self._eos_tokens), candidates[-1])
        header = self._tokens(_text_between(last, 0, 1))
        endings = [t for t in tail[-1:] if t not in header and self._can_end(t, last)]
        return next((t for t in (*tail, *following) if t in self._eos_tokens), None) or next(
            iter(endings), None
        )

    def _ending(self, text: TracedStr) -> list[str]:
        """Return the tokens behind message 1, up to one that opens another turn."""
        tokens = self._tokens(_text_behind_message(text, 1))
        openers = [n for n, token in enumerate(tokens) if token in self._turn_openers]
        return tokens[: openers[0]] if openers else tokens

    def _can_end(self, token: str, text: TracedStr) -> bool:
        """Return whether a control token may end message 1.

        One that stands inside it, or that closes what was opened inside it, does not.
        """
        inside = self._tokens(_text_of_message(text, 1))
        return token in self.tokens and token not in inside and _opening(token) not in inside

    def _tokens(self, text: str) -> list[str]:
        return [match[0] for match in self._any.finditer(text)]

    def _special_markers(self) -> set[str]:
        """Return special tokens, less those that come as a pair of tags for use inside a reply."""
        return {token for token in self._special if not _is_tag(token, self._special)}

    def _written_markers(self) -> set[str]:
        """Return control tokens that stand around turns, special or not, tags aside."""
        text = self._render([PROBE_QUESTION, _ANSWER, PROBE_QUESTION], True)
        if text is None:
            text = self._render([PROBE_QUESTION], True)
        written = set(self._tokens(text)) if text is not None else set()
        plain = set(self._added) - self._special
        return {token for token in written if not _is_tag(token, plain)} | set(self._stops)


def _is_tag(token: str, tokens: set[str]) -> bool:
    """Return whether a token is one of a pair among `tokens`, such as `<think>` and `</think>`."""
    opening = _opening(token)
    return opening in tokens and f"{opening[:1]}/{opening[1:]}" in tokens


def _opening(token: str) -> str:
    """Return the tag that a closing tag closes: `<think>` for `</think>`; others as they are."""
    return token.replace("/", "", 1) if token[1:2] == "/" else token


def _message_span(text: TracedStr, index: int) -> tuple[int, int]:
    """Return where the first character that a message wrote starts, and where its last one ends."""
    spans = [
        (start, stop)
        for start, stop, origin in origin_spans(text._runs)
        if origin is not None and origin.message == index
    ]
    return (spans[0][0], spans[-1][1]) if spans else (len(text), len(text))


def _text_of_message(text: TracedStr, index: int) -> str:
    """Return the text from the first character that a message wrote to its last one."""
    start, stop = _message_span(text, index)
    return str.__str__(text)[start:stop]


def _text_between(text: TracedStr, first: int, second: int) -> str:
    """Return the text between two messages."""
    return str.__str__(text)[_message_span(text, first)[1] : _message_span(text, second)[0]]


def _text_behind_message(text: TracedStr, index: int) -> str:
    """Return the text behind the last character that a message wrote, up to the next message's."""
    return _text_between(text, index, index + 1)
