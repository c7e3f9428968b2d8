"""A reply's text taken apart as it comes: its content, its reasoning and its tool calls."""

import json
import re
from collections.abc import Iterator
from typing import Any

from luthier.chat import ReplyDelta


class ReplyParser:
    """Takes replies apart by the tokenizer's response template, or transformers' for its family.

    What does not parse, such as a call that is no JSON, stays content: no text is lost. Where there
    is no template (`is_active` is False), all text is content. `prompt`: the prompt's ids, as a
    template may open the reasoning itself. `tools`: what arguments get their types from.
    """

    def __init__(self, tokenizer: Any, model: Any, prompt: list[int], tools: list | None) -> None:
        # The templates of families are in transformers' own server and nowhere else (5.23).
        from transformers.cli.serving.utils import get_response_template

        template = get_response_template(tokenizer, model)
        self.is_active = template is not None
        self._special = _special_pattern(tokenizer)
        self._parser: Any = None
        # The text since all of it was last told, and what was told of it.
        self._unsettled = self._emitted = ""
        self._begun: set[str] = set()
        if template is not None:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(template, prefix=tokenizer.decode(prompt), tools=tools)

    def add(self, text: str) -> Iterator[ReplyDelta]:
        """Yield what a piece of text completes."""
        if text and self._parser is None:
            yield ReplyDelta("content", text)
        elif text:
            yield from self._parsed(text, is_end=False)

    def finish(self) -> Iterator[ReplyDelta]:
        """Yield what is left when the reply has ended."""
        if self._parser is not None:
            yield from self._parsed("", is_end=True)

    def _parsed(self, text: str, is_end: bool) -> Iterator[ReplyDelta]:
        self._unsettled += text
        try:
            events = self._parser.finalize()[1] if is_end else self._parser.feed(text)
            deltas = [delta for event in events if (delta := _delta(event)) is not None]
        # transformers 5.23 raises what its parsers of values raise: ValueError for bad JSON,
        # KeyError and TypeError for JSON of another form.
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self._parser = None
            rest = self._unsettled
            if rest.startswith(self._emitted):
                rest = rest[len(self._emitted) :]
            if rest := self._special.sub("", rest):
                yield ReplyDelta("content", rest)
            return
        for delta in deltas:
            if delta.field == "tool_call":
                self._unsettled = self._emitted = ""
                yield delta
                continue
            self._emitted += delta.text
            shown = self._special.sub("", delta.text)
            # Templates write newlines around reasoning, which belong to neither text.
            if delta.field not in self._begun:
                shown = shown.lstrip("\n")
            if shown:
                self._begun.add(delta.field)
                yield ReplyDelta(delta.field, shown)
        if self._emitted.endswith(self._unsettled):
            self._unsettled = self._emitted = ""


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _delta(event: dict[str, Any]) -> ReplyDelta | None:
    """Return what an event of transformers' parser says; None for one without text."""
    field = event.get("field")
    if event["type"] == "region_close" and field == "tool_calls":
        function = event["value"]["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return ReplyDelta("tool_call", arguments, str(function["name"]))
    # Values such as JSON are told whole when their region closes.
    if event["type"] != "region_chunk" or event["dirty"] or not event["text"]:
        return None
    if field == "content":
        return ReplyDelta("content", event["text"])
    is_reasoning = field in ("reasoning_content", "thinking", "reasoning")
    return ReplyDelta("reasoning", event["text"]) if is_reasoning else None
