"""From ids or text back to a message: reasoning, content and tool calls, for any template.

What the template writes around each field is learnt from rendering (`reply_grammar`). A reply is
taken apart by that, and the message counts only if it renders to the same ids again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from luthier.chat.labels import EncodedSequence
from luthier.chat.pipeline import TemplatePipeline
from luthier.chat.reply_grammar import ReplyGrammar, ReplyScanner, ScannedText
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import RenderedSequence
from luthier.chat.types import ChatError

_QUESTION = {"role": "user", "content": "What is a lute?"}


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply as a message of an assistant."""

    message: dict[str, Any]
    """With `role` and `content`, and `reasoning_content` and `tool_calls` where the reply has them.

    The arguments of a call are an object; they are JSON text where only that text renders again to
    what the model wrote.
    """
    reason: str | None = None
    """Why the message is the reply's plain text as its content; None where the message counts: the
    template writes it with the reply's own ids."""


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """A piece of a reply: text of its content or its reasoning, or one whole tool call."""

    field: Literal["content", "reasoning", "tool_call"]
    text: str
    """Of a tool call: its arguments as JSON."""
    name: str = ""
    """What a tool call calls."""
    id: str | None = None
    """The id of a tool call, where the template writes ids."""


class RenderedReply(NamedTuple):
    """What the template writes for a message behind its prompt."""

    sequence: RenderedSequence
    text: str
    """The reply with its stop token."""
    stop_token: str


class ReplyParser:
    """Takes replies apart, for the template of one pipeline."""

    def __init__(self, pipeline: TemplatePipeline, tokens: TokenEncoder) -> None:
        self._pipeline, self._tokens = pipeline, tokens
        self._grammars: dict[tuple[bool, str], ReplyGrammar] = {}
        names = {index: token for token, index in tokens.added.items()}
        self._stop_ids = set(pipeline.controls.stop_token_ids)
        self._stops = sorted(
            (names[i] for i in self._stop_ids if i in names), key=len, reverse=True
        )

    def parse(
        self, reply: str | Sequence[int], messages: list[dict[str, Any]] | None, tools: list | None
    ) -> ParsedReply:
        """Return the message of a reply to the messages; see `ChatEncoder.parse`."""
        messages = messages or [_QUESTION]
        text, ids, is_ended = self._read(reply)
        scanner = ReplyScanner(self.grammar(messages, tools))
        pieces = [*scanner.add(text), *scanner.finish(is_cut=not is_ended)]
        return self._check(scanner, pieces, text, ids, is_ended, messages, tools)

    def grammar(self, messages: list[dict[str, Any]], tools: list | None) -> ReplyGrammar:
        """Return what the template writes around the fields of a reply to such messages."""
        key = bool(tools), str(messages[-1].get("role")) if messages else "user"
        if key not in self._grammars:
            self._grammars[key] = ReplyGrammar(lambda m: self._text(m, messages, tools))
        return self._grammars[key]

    def scanner(self, messages: list[dict[str, Any]] | None, tools: list | None) -> ReplyScanner:
        """Return what goes through a reply as it comes."""
        return ReplyScanner(self.grammar(messages or [_QUESTION], tools))

    def _text(
        self, message: dict[str, Any], messages: list[dict[str, Any]], tools: list | None
    ) -> str:
        rendered = self._render(message, messages, tools)
        return rendered.text.removesuffix(rendered.stop_token)

    def _render(
        self, message: dict[str, Any], messages: list[dict[str, Any]], tools: list | None
    ) -> RenderedReply:
        """Return what the template writes for a message; ChatError where it writes no such turn."""
        conversation = self._pipeline.read([*messages, message], tools)
        sequence = self._pipeline.planner.plan(conversation, [len(messages)])[-1]
        span = sequence.spans[-1]
        return RenderedReply(sequence, sequence.plain[span.start : span.stop], span.stop_token)

    def _read(self, reply: str | Sequence[int]) -> tuple[str, list[int] | None, bool]:
        """Return a reply's text and ids without the stop token, and whether it had one."""
        if isinstance(reply, str):
            stop = next((stop for stop in self._stops if reply.endswith(stop)), "")
            return reply.removesuffix(stop), None, bool(stop)
        ids = list(reply)
        is_ended = bool(ids) and ids[-1] in self._stop_ids
        ids = ids[: len(ids) - is_ended]
        return self._tokens.decode_reply(ids), ids, is_ended

    def _check(
        self,
        scanner: ReplyScanner,
        pieces: list[ScannedText],
        text: str,
        ids: list[int] | None,
        is_ended: bool,
        messages: list[dict[str, Any]],
        tools: list | None,
    ) -> ParsedReply:
        """Return the message, if it renders to the reply, or the reply as plain content."""
        plain = {"role": "assistant", "content": text}
        if scanner.problem is not None:
            return ParsedReply(plain, f"the reply is no turn of the template: {scanner.problem}")
        texts = {name: "".join(p.text for p in pieces if p.field == name)
                 for name in ("content", "reasoning")}  # fmt: skip
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        try:
            rendered = self._render(message, messages, tools)
        except ChatError as error:
            return ParsedReply(plain, f"the template does not write such a turn: {error.text}")
        problem = self._find_difference(rendered, text, ids, is_ended)
        return ParsedReply(message) if problem is None else ParsedReply(plain, problem)

    def _find_difference(
        self, rendered: RenderedReply, text: str, ids: list[int] | None, is_ended: bool
    ) -> str | None:
        """Return how a reply differs from what its message renders to; None where it does not."""
        whole = rendered.text.removesuffix(rendered.stop_token)
        if ids is None:
            if whole == text or (not is_ended and whole.startswith(text)):
                return None
            return _describe_difference(text, whole)
        rendered_ids = self._ids(rendered)[:-1]
        if rendered_ids == ids:
            return None
        # The last token of a reply that was cut may be one that the text behind it would change.
        is_begun = not is_ended and whole.startswith(text)
        if is_begun and rendered_ids[: len(ids) - 1] == ids[:-1]:
            return None
        if whole == text:
            return "the reply's text is the template's, but its tokens are other ones"
        return _describe_difference(text, whole)

    def _ids(self, rendered: RenderedReply) -> list[int]:
        """Return the ids of a rendered reply, stop token and all."""
        (encoded,) = self._pipeline.label_builder.encode([(rendered.sequence, True)])
        last: EncodedSequence = encoded[-1]
        _, start, stop = last.replies[-1]
        return last.ids[start:stop]


class ReplyStream:
    """Takes a reply apart while it comes.

    What is said of a piece is not taken back: where the reply proves to be no turn of the template,
    text of its reasoning stays reasoning, and what was held back as calls comes as content.
    """

    def __init__(
        self, parser: ReplyParser, messages: list[dict[str, Any]] | None, tools: list | None
    ) -> None:
        self._parser, self._messages, self._tools = parser, messages, tools
        self._scanner = parser.scanner(messages, tools)
        self._text = self._emitted = ""
        self.reply: ParsedReply | None = None
        """The whole reply, once it is finished."""

    def add(self, text: str) -> list[ReplyDelta]:
        """Return what a piece of text, control tokens and all, settles."""
        self._text += text
        return [ReplyDelta(piece.field, piece.text) for piece in self._scanner.add(text)]

    def finish(self, ids: Sequence[int] | None = None) -> list[ReplyDelta]:
        """Return what is left at the end of the reply, and set `reply`.

        `ids`: the reply's tokens, which are held against the message's own.
        """
        self.reply = self._parser.parse(
            self._text if ids is None else ids, self._messages, self._tools
        )
        deltas = [ReplyDelta(p.field, p.text) for p in self._scanner.finish(is_cut=True)]
        if self._scanner.held:
            deltas.append(ReplyDelta("content", self._scanner.held))
        return deltas


def _describe_difference(text: str, whole: str) -> str:
    same = 0
    while same < min(len(text), len(whole)) and text[same] == whole[same]:
        same += 1
    return (
        f"the template writes this message otherwise: {whole[same : same + 40]!r} where the reply "
        f"has {text[same : same + 40]!r}"
    )
