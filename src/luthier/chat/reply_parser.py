"""From ids or text back to a message: reasoning, content and tool calls, for any template.

What the template writes around each field is learnt from rendering (`reply_grammar`). A reply is
taken apart by that, and the message counts only if it renders to the same ids again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from luthier.chat.argument_forms import ReplySyntaxError
from luthier.chat.call_grammar import make_calls
from luthier.chat.control_tokens import PROBE_QUESTION, PROBE_TOOL
from luthier.chat.conversation import retry_with_empty_content, to_schema
from luthier.chat.pipeline import TemplatePipeline
from luthier.chat.provenance import TracedStr, origin_spans
from luthier.chat.reply_grammar import ReplyGrammar, ReplyScanner, TextField
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import RenderedSequence
from luthier.chat.types import ChatError

Messages = list[dict[str, Any]]
_MOST_GRAMMARS = 64
"""Grammars of one template that are kept."""


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

    @classmethod
    def of_call(cls, call: dict[str, Any]) -> ReplyDelta:
        """Return a tool call of a message as a delta."""
        function = call["function"]
        return cls(
            "tool_call", format_arguments(function["arguments"]), function["name"], call.get("id")
        )


def format_arguments(arguments: Any) -> str:
    """Return the arguments of a call as JSON text; text stays as it is."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


class RenderedReply(NamedTuple):
    """What the template writes for a message behind its prompt."""

    sequence: RenderedSequence
    text: str
    """The reply with its stop token."""
    stop_token: str
    suspect: bool
    """Whether a text of the conversation may hold a control token."""


class ReplyText(NamedTuple):
    """What a model wrote, without the stop token."""

    text: str
    ids: list[int] | None
    """None where the reply came as text."""
    is_ended: bool
    """Whether a stop token stood behind it."""


class ReplyParser:
    """Takes replies apart, for the template of one pipeline."""

    def __init__(self, pipeline: TemplatePipeline, tokens: TokenEncoder) -> None:
        self._pipeline, self._tokens = pipeline, tokens
        self._grammars: dict[tuple[str, ...], ReplyGrammar] = {}
        names = {index: token for token, index in tokens.added.items()}
        self._stop_ids = set(pipeline.controls.stop_token_ids)
        stops = [names[index] for index in self._stop_ids if index in names]
        self._stops = sorted(stops, key=len, reverse=True)

    def parse(
        self, reply: str | Sequence[int], messages: Messages | None, tools: list | None
    ) -> ParsedReply:
        """Return the message of a reply to the messages; see `ChatEncoder.parse`."""
        messages = messages or [PROBE_QUESTION]
        reply_text = self._read_reply(reply)
        parsed = self._parse(self.usual_grammar(messages, tools), reply_text, messages, tools)
        if parsed.reason is not None:
            grammar = self._special_grammar(messages, tools)
            if grammar is not None:
                other = self._parse(grammar, reply_text, messages, tools)
                return other if other.reason is None else parsed
        return parsed

    def scanner(self, messages: Messages | None, tools: list | None) -> ReplyScanner:
        """Return what goes through a reply as it comes."""
        messages = messages or [PROBE_QUESTION]
        grammar = self._special_grammar(messages, tools)
        return ReplyScanner(grammar or self.usual_grammar(messages, tools))

    def usual_grammar(self, messages: Messages | None, tools: list | None) -> ReplyGrammar:
        """Return the grammar of replies to a question, or to a tool's result."""
        messages = messages or [PROBE_QUESTION]
        role = str(messages[-1].get("role"))
        key = role if role == "tool" else "user", "tools" if tools else ""
        if key not in self._grammars:
            question, some_tools = _usual_prompt(messages, tools)
            grammar = ReplyGrammar(lambda message: self._write(message, question, some_tools))
            if not grammar.is_known:
                # Some templates want what only the row itself has.
                grammar = ReplyGrammar(lambda message: self._write(message, messages, tools))
            self._grammars[key] = grammar
        return self._grammars[key]

    def _special_grammar(self, messages: Messages, tools: list | None) -> ReplyGrammar | None:
        """Return the grammar of replies to a prompt that ends otherwise than usual prompts do.

        None where it ends as they do: a system prompt may switch a template's thoughts off.
        """
        try:
            usual = self._prompt_ending(*_usual_prompt(messages, tools))
            ending = self._prompt_ending(messages, tools)
        except ChatError:
            return None
        if ending == usual:
            return None
        key = str(messages[-1].get("role")), "tools" if tools else "", ending
        if key not in self._grammars:
            if len(self._grammars) >= _MOST_GRAMMARS:
                self._grammars.clear()
            self._grammars[key] = ReplyGrammar(
                lambda message: self._write(message, messages, tools)
            )
        return self._grammars[key]

    def _prompt_ending(self, messages: Messages, tools: list | None) -> str:
        """Return what the template writes behind the last text of the messages."""

        def render(filled: Messages) -> TracedStr:
            row = self._pipeline.read(filled, tools)
            return self._pipeline.template.render(row.messages, row.tools, True)

        text = retry_with_empty_content(render, messages)
        ends = [stop for _, stop, origin in origin_spans(text._runs) if origin is not None]
        return str.__str__(text)[max(ends, default=0) :]

    def _write(self, message: dict[str, Any], messages: Messages, tools: list | None) -> str:
        """Return what the template writes for a message, without the stop token."""
        rendered = self._render(message, messages, tools)
        return rendered.text.removesuffix(rendered.stop_token)

    def _render(
        self, message: dict[str, Any], messages: Messages, tools: list | None
    ) -> RenderedReply:
        """Return what the template writes for a message; ChatError where it writes no such turn."""
        return retry_with_empty_content(
            lambda filled: self._render_last(filled, tools), [*messages, message]
        )

    def _render_last(self, messages: Messages, tools: list | None) -> RenderedReply:
        conversation = self._pipeline.read(messages, tools)
        sequence = self._pipeline.planner.plan(conversation, [len(messages) - 1])[-1]
        span = sequence.spans[-1]
        return RenderedReply(
            sequence,
            sequence.plain[span.start : span.stop],
            span.stop_token,
            self._pipeline.controls.has_suspects(conversation.texts),
        )

    def _read_reply(self, reply: str | Sequence[int]) -> ReplyText:
        if isinstance(reply, str):
            stop = next((stop for stop in self._stops if reply.endswith(stop)), "")
            return ReplyText(reply.removesuffix(stop), None, bool(stop))
        ids = list(reply)
        is_ended = bool(ids) and ids[-1] in self._stop_ids
        ids = ids[: len(ids) - is_ended]
        return ReplyText(self._tokens.decode_reply(ids), ids, is_ended)

    def _parse(
        self, grammar: ReplyGrammar, reply_text: ReplyText, messages: Messages, tools: list | None
    ) -> ParsedReply:
        """Return the message, if it renders to the reply, or the reply as plain content."""
        plain = {"role": "assistant", "content": reply_text.text}
        scanner = ReplyScanner(grammar)
        pieces = [*scanner.add(reply_text.text), *scanner.finish(is_cut=not reply_text.is_ended)]
        if scanner.problem is not None:
            return ParsedReply(plain, f"the reply is not a turn of the template: {scanner.problem}")
        texts = {
            name: "".join(piece.text for piece in pieces if piece.field == name)
            for name in ("content", "reasoning")
        }
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        try:
            problem = None
            for keeps_text in (False, True) if scanner.node == "calls" else (False,):
                if scanner.node == "calls":
                    calls, behind = grammar.parse_calls(
                        scanner.held, _argument_schemas(tools), keeps_text
                    )
                    message |= {"content": texts["content"] + behind, "tool_calls": calls}
                cut = len(scanner.held) if scanner.node in ("reasoning", "content") else 0
                problem = self._find_difference(message, reply_text, cut, messages, tools)
                # JSON that the template takes as text may be spaced in a way of its own.
                if problem is None or self._pipeline.arguments.form != "text":
                    break
        except ReplySyntaxError as error:
            return ParsedReply(plain, f"the calls of the reply cannot be read: {error}")
        except ChatError as error:
            return ParsedReply(plain, f"the template does not write such a turn: {error.text}")
        return ParsedReply(message) if problem is None else ParsedReply(plain, problem)

    def _find_difference(
        self,
        message: dict[str, Any],
        reply_text: ReplyText,
        cut: int,
        messages: Messages,
        tools: list | None,
    ) -> str | None:
        """Return how a reply differs from what its message renders to; None where it does not.

        `cut`: how many characters at the reply's end are a marker that was cut. Raises ChatError
        where the template does not write the message.
        """
        rendered = self._render(message, messages, tools)
        text = rendered.text.removesuffix(rendered.stop_token)
        is_begun = (
            not reply_text.is_ended
            and "tool_calls" not in message
            and text.startswith(reply_text.text)
        )
        if reply_text.ids is None:
            is_same = text == reply_text.text or is_begun
        else:
            ids = self._encode(rendered)[:-1]
            is_same = ids == reply_text.ids or (is_begun and self._begins(ids, reply_text, cut))
        if is_same:
            return None
        if text == reply_text.text:
            return "the reply's text is as the template writes it, but its tokens are different"
        return _describe_difference(reply_text.text, text)

    def _begins(self, ids: list[int], reply_text: ReplyText, cut: int) -> bool:
        """Return whether a reply that was cut has the first of these ids.

        Its last token, and those of a marker that was cut, may be other ones than in a whole reply.
        """
        assert reply_text.ids is not None
        pairs = enumerate(zip(ids, reply_text.ids, strict=False))
        shorter = min(len(ids), len(reply_text.ids))
        same = next((n for n, (one, other) in pairs if one != other), shorter)
        if same + 1 >= len(reply_text.ids):
            return True
        start = self._tokens.decode_reply(reply_text.ids[: same + 1])
        return len(start) >= len(reply_text.text) - cut

    def _encode(self, rendered: RenderedReply) -> list[int]:
        """Return the ids of a rendered reply, stop token and all."""
        sequence = rendered.sequence, rendered.suspect
        (encoded,) = self._pipeline.label_builder.encode([sequence])
        _, start, stop = encoded[-1].replies[-1]
        return encoded[-1].ids[start:stop]


class ReplyStream:
    """Takes a reply apart while it comes.

    What is said of a piece is not taken back: where the reply proves to be no turn of the template,
    text of its reasoning stays reasoning, and what was held back as calls comes as content.
    """

    def __init__(self, parser: ReplyParser, messages: Messages | None, tools: list | None) -> None:
        self._parser, self._messages, self._tools = parser, messages, tools
        self._scanner = parser.scanner(messages, tools)
        self._text = ""
        self._emitted = {"content": "", "reasoning": ""}
        self.reply: ParsedReply | None = None
        """The whole reply, once it is finished."""

    def add(self, text: str) -> list[ReplyDelta]:
        """Return what a piece of text, control tokens and all, settles."""
        self._text += text
        deltas = [self._emit(piece.field, piece.text) for piece in self._scanner.add(text)]
        return deltas if self._scanner.problem is None else [*deltas, *self._release()]

    def finish(self, ids: Sequence[int] | None = None) -> list[ReplyDelta]:
        """Return what is left at the end of the reply, and set `reply`.

        `ids`: the reply's tokens, which are held against the message's own; without them its text
        is.
        """
        reply = self._parser.parse(self._text if ids is None else ids, self._messages, self._tools)
        self.reply = reply
        deltas = [self._emit(p.field, p.text) for p in self._scanner.finish(is_cut=True)]
        if reply.reason is not None:
            return [*deltas, *self._release()]
        deltas += map(ReplyDelta.of_call, reply.message.get("tool_calls", ()))
        content = reply.message["content"].removeprefix(self._emitted["content"])
        return [*deltas, *([self._emit("content", content)] if content else [])]

    def _release(self) -> list[ReplyDelta]:
        """Return what was held back, as it is."""
        text, self._scanner.held = self._scanner.held, ""
        field: TextField = "reasoning" if self._scanner.node == "reasoning" else "content"
        return [self._emit(field, text)] if text else []

    def _emit(self, field: TextField, text: str) -> ReplyDelta:
        self._emitted[field] += text
        return ReplyDelta(field, text)


def _usual_prompt(messages: Messages, tools: list | None) -> tuple[Messages, list | None]:
    """Return a question, or a question, a call and its result, with tools if there are some."""
    result = {"role": "tool", "name": "zqname1", "tool_call_id": "zqid00001", "content": "42"}
    call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": make_calls(1)}
    history: Messages = [call, result] if messages[-1].get("role") == "tool" else []
    return [PROBE_QUESTION, *history], [PROBE_TOOL] if tools else None


def _argument_schemas(tools: list | None) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each tool's arguments."""
    schemas: dict[str, dict[str, Any]] = {}
    for tool in map(to_schema, tools or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        name, parameters = function.get("name"), function.get("parameters")
        if isinstance(name, str) and isinstance(parameters, dict):
            schemas[name] = parameters
    return schemas


def _describe_difference(text: str, whole: str) -> str:
    same = 0
    while same < min(len(text), len(whole)) and text[same] == whole[same]:
        same += 1
    return (
        f"the template writes this message differently: {whole[same : same + 40]!r} where the "
        f"reply has {text[same : same + 40]!r}"
    )
