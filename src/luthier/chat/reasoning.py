"""Replies behind a generation prompt that opens or closes a thought differently from the turn.

Some templates end their prompt in `<think>\n` but write turns without it, or close the thought in
the prompt and write turns with one. What the model then generates is put together from the row's
own reasoning and content, in the form that the tags have.
"""

from __future__ import annotations

import re
from typing import Any

from luthier.chat.provenance import TracedStr, concat_traced

# `<name>` and `</name>`, `[NAME]` and `[/NAME]`, `<|name>` and `<name|>`.
_TAG = re.compile(
    r"<(?P<close1>/?)(?P<name1>[\w:]+)>|\[(?P<close2>/?)(?P<name2>[A-Z_]+)\]"
    r"|<\|(?P<name3>\w+)>|<(?P<name4>\w+)(?P<close4>\|)>"
)


def write_reply(
    prompt: TracedStr, turn_text: TracedStr, message: dict[str, Any]
) -> TracedStr | None:
    """Return the reply to a prompt, both without the history; None where none can be written.

    `turn_text` is how the template writes the turn, header included.
    """
    header = _common_header(prompt, turn_text)
    opened, body = prompt[header:], turn_text[header:]
    if not opened.strip():
        return body
    last = _last_tag(prompt)
    if last is None:
        return None
    name, closes, end = last
    if closes:
        return _behind_close(prompt[end:], turn_text, body, name)
    return _behind_open(prompt[end:], turn_text, body, name, message)


def _common_header(prompt: str, turn_text: str) -> int:
    """Return how far prompt and turn agree, not counting a tag that only one of them has whole."""
    same = 0
    while same < min(len(prompt), len(turn_text)) and prompt[same] == turn_text[same]:
        same += 1
    # `<think>` and `</think>` agree in `<`: the header ends before it.
    for text in (prompt, turn_text):
        for match in _TAG.finditer(text):
            if match.start() < same < match.end():
                same = match.start()
    return same


def _last_tag(prompt: str) -> tuple[str, bool, int] | None:
    """Return the name of the last tag in the prompt, whether it closes, and where it ends."""
    last = None
    for match in _TAG.finditer(prompt):
        name = match["name1"] or match["name2"] or match["name3"] or match["name4"]
        closes = bool(match["close1"] or match["close2"] or match["close4"])
        last = (name, closes, match.end())
    return last


def _tag(text: str, name: str, closing: bool) -> re.Match[str] | None:
    tag = re.escape(name)
    if closing:
        return re.search(rf"</{tag}>|\[/{tag}\]|<{tag}\|>", text)
    return re.search(rf"<{tag}>|\[{tag}\]|<\|{tag}>", text)


def _behind_close(space: str, turn_text: TracedStr, body: TracedStr, name: str) -> TracedStr:
    """Return the turn without its thought: the prompt has closed it."""
    close = _tag(turn_text, name, closing=True)
    if close is None or not _written_by_template(turn_text, close):
        return body
    return _without(turn_text[close.end() :], space)


def _behind_open(
    space: str, turn_text: TracedStr, body: TracedStr, name: str, message: dict
) -> TracedStr | None:
    """Return the turn from inside the thought that the prompt has opened."""
    open_ = _tag(turn_text, name, closing=False)
    if open_ is not None and _written_by_template(turn_text, open_):
        return _without(turn_text[open_.end() :], space)
    content = message.get("content")
    raw = content if isinstance(content, TracedStr) else None
    close = _tag(raw, name, closing=True) if raw else None
    if raw is not None and close is not None:
        return _with_content_reasoning(space, raw, body, name, close)
    reasoning = message.get("reasoning_content")
    written = reasoning.rstrip("\n") if isinstance(reasoning, str) else ""
    # The form in which templates that show reasoning write it, an empty one included.
    return concat_traced((written, f"\n</{name}>\n\n", body))


def _with_content_reasoning(
    space: str, raw: TracedStr, body: TracedStr, name: str, close: re.Match[str]
) -> TracedStr | None:
    """Return the reasoning in the content, which the template strips, and the turn behind it."""
    rest = raw[close.end() :]
    if not body.startswith(rest.strip()) and rest.strip() not in body:
        return None
    open_ = _tag(raw, name, closing=False)
    inside = raw[open_.end() if open_ is not None and open_.end() <= close.start() else 0 :]
    reasoning = _without(inside, space)
    stripped = rest if body.startswith(rest) else rest.strip()
    return concat_traced((reasoning[: len(reasoning) - len(rest)], rest, body[len(stripped) :]))


def _without(text: TracedStr, space: str) -> TracedStr:
    """Return the text behind whitespace that the prompt has already written."""
    same = 0
    while same < min(len(space), len(text)) and space[same] == text[same]:
        same += 1
    return text[same:]


def _written_by_template(text: TracedStr, match: re.Match[str]) -> bool:
    return all(origin is None for _, origin, _ in text[match.start() : match.end()]._runs)
