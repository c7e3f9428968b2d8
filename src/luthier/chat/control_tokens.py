"""Which tokens a template uses to steer, found by rendering with it, never by its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.chat.conversation import read_conversation
from luthier.chat.provenance import TracedStr
from luthier.chat.template import ChatTemplate
from luthier.chat.tokens import (
    TokenEncoder,
    compile_token_pattern,
    list_control_tokens,
    origin_spans,
)
from luthier.chat.types import ChatError

_TOOL_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "lute"}}}
_QUESTION = {"role": "user", "content": "What is a lute?"}
_ANSWER = {"role": "assistant", "content": "An instrument with strings."}
_TOOL_CALL_TURN = {"role": "assistant", "content": "", "tool_calls": [_TOOL_CALL]}


class ControlTokens:
    """The control tokens, turn markers and stop tokens of one template with one tokenizer."""

    def __init__(
        self, template: ChatTemplate, encoder: TokenEncoder, eos_token_ids: Iterable[int]
    ) -> None:
        self._template = template
        self._added = encoder.added
        self._special = encoder.special
        self._any = encoder.pattern
        names = {index: name for name, index in encoder.added.items()}
        # Ids may be 0: only None means that there is none.
        eos = encoder.tokenizer.eos_token_id
        eos_ids = [*([] if eos is None else [eos]), *eos_token_ids]
        self.tokens = list_control_tokens(encoder.tokenizer, template.source)
        self.pattern = compile_token_pattern(self.tokens)
        self._firsts = {token[0] for token in self.tokens}
        self._lasts = {token[-1] for token in self.tokens}
        self._edges = self._firsts | self._lasts
        self._longest = max(map(len, self.tokens), default=0)
        self._stops = [names[index] for index in eos_ids if index in names]
        self._eos_tokens = frozenset(self._stops)
        written = [self._written_stop(_ANSWER), self._written_stop(_TOOL_CALL_TURN)]
        # What ends a plain reply comes first: generation ends there with no setting.
        self._stops = list(dict.fromkeys([stop for stop in written if stop] + self._stops))
        self.stop_token_ids = list(
            dict.fromkeys([encoder.added[stop] for stop in self._stops] + eos_ids)
        )
        self.turn_markers = self._special_markers() | self._written_markers()

    def find_stop(self, tail: str) -> tuple[int, str] | None:
        """Return where the first stop token behind a reply's last field ends, and which it is.

        A special token that nothing but space follows ends the turn too, though it be no known
        stop token. None where there is neither.
        """
        last = None
        for match in self._any.finditer(tail):
            if match[0] in self._stops:
                return match.end(), match[0]
            if match[0] in self._special:
                last = match
        if last is None or tail[last.end() :].strip():
            return None
        return last.end(), last[0]

    def find_next_turn_stop(self, tail: TracedStr) -> tuple[TracedStr, str] | None:
        """Return the text up to an end-of-sequence token right behind a turn, and the token.

        None where another token, or text, comes first.
        """
        match = self._any.search(tail)
        if match is None or match[0] not in self._eos_tokens or tail[: match.start()].strip():
            return None
        return tail[: match.end()], match[0]

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
        """Return the spans of control tokens that messages wrote; they are encoded as text."""
        if not self.pattern.search(text):
            return []
        fields = [
            (start, stop, origin)
            for start, stop, origin in origin_spans(text._runs)
            if origin is not None
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

    def _render(self, messages: list[dict[str, Any]], generation: bool) -> TracedStr | None:
        """Return a small conversation as rendered; None where the template refuses it."""
        try:
            return self._template.render(read_conversation(messages).messages, None, generation)
        except ChatError:
            return None

    def _written_stop(self, reply: dict[str, Any]) -> str | None:
        """Return the token that ends this reply, be it the last message or not.

        Some templates write more behind the very last turn than behind others (an end of text);
        the turn itself ends with the last control token that stands behind it in both cases.
        """
        last = self._render([_QUESTION, reply], False)
        if last is None:
            return None
        tail = self._tokens(_text_behind_message(last, 1))
        followed = self._render([_QUESTION, reply, _QUESTION], False)
        if followed is None:
            stops = (token for token in tail if token in self._stops)
            return next(stops, tail[-1] if tail else None)
        rest = self._tokens(_text_behind_message(followed, 1))
        same = 0
        while same < min(len(tail), len(rest)) and tail[same] == rest[same]:
            same += 1
        shared = tail[:same] or tail
        return shared[-1] if shared and shared[-1] in self.tokens else None

    def _tokens(self, text: str) -> list[str]:
        return [match[0] for match in self._any.finditer(text)]

    def _special_markers(self) -> set[str]:
        """Return special tokens, less those that come as a pair of tags for use inside a reply."""
        return {token for token in self._special if not _is_tag(token, self._special)}

    def _written_markers(self) -> set[str]:
        """Return control tokens that stand around turns, special or not, tags aside."""
        text = self._render([_QUESTION, _ANSWER, _QUESTION], True)
        if text is None:
            text = self._render([_QUESTION], True)
        written = set(self._tokens(text)) if text is not None else set()
        plain = set(self._added) - self._special
        return {token for token in written if not _is_tag(token, plain)} | set(self._stops)


def _is_tag(token: str, tokens: set[str]) -> bool:
    """Return whether a token is one of a pair among `tokens`, such as `<think>` and `</think>`."""
    opening = token.replace("/", "", 1) if token[1:2] == "/" else token
    return opening in tokens and f"{opening[:1]}/{opening[1:]}" in tokens


def _text_behind_message(text: TracedStr, index: int) -> str:
    """Return the text behind the last character that a message wrote, up to the next message's."""
    begin = stop = 0
    for _, end, origin in origin_spans(text._runs):
        if origin is not None and origin.message == index:
            begin = stop = end
        elif origin is not None and begin:
            break
        elif begin:
            stop = end
    return str.__str__(text[begin:stop])
