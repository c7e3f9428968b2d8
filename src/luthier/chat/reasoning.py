"""Replies behind a generation prompt that opens or closes a thought differently from the turn.

Some templates end their prompt in `<think>\n` but write turns without it, or close the thought in
the prompt and write turns with one. What the model then generates is put together from the row's
own reasoning and content, in the form that the template gives to a thought: a turn with a thought
is rendered to learn it. Where the template shows no thoughts, the form of its tags decides.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import read_conversation
from luthier.chat.provenance import TracedStr, concat_traced, origin_spans
from luthier.chat.template import ChatTemplate
from luthier.chat.types import ChatError

# `<name>` and `</name>`, `[NAME]` and `[/NAME]`, `<|name>` and `<name|>`, `<|START_NAME|>` and
# `<|END_NAME|>`, `<|name_prefix|>` and `<|name_suffix|>`.
_TAG = re.compile(
    r"<(?P<close1>/?)(?P<name1>[\w:]+)>|\[(?P<close2>/?)(?P<name2>[A-Z_]+)\]"
    r"|<\|(?P<name3>\w+)>|<(?P<name4>\w+)(?P<close4>\|)>"
    r"|<\|(?i:start|begin|(?P<close5>end))_(?P<name5>\w+)\|>"
    r"|<\|(?P<name6>\w+)_(?i:prefix|(?P<close6>suffix))\|>"
)
_QUESTION = {"role": "user", "content": "What is a lute?"}
_THOUGHTFUL_REPLY = {
    "role": "assistant",
    "content": "An instrument.",
    "reasoning_content": "It has strings.",
}


class ThoughtForm(NamedTuple):
    """How a template writes a thought: the text in front of it and the text behind it."""

    opening: str
    """What stands between the turn's header and the reasoning."""
    closing: str
    """What stands between the reasoning and the content."""


def find_thought_form(template: ChatTemplate) -> ThoughtForm | None:
    """Return how the template writes a thought; None where it shows none in front of a reply."""
    try:
        row = read_conversation([_QUESTION, _THOUGHTFUL_REPLY])
        text = template.render(row.messages, None, False)
        bare = read_conversation([_QUESTION, {**_THOUGHTFUL_REPLY, "reasoning_content": ""}])
        other = template.render(bare.messages, None, False)
    except ChatError:
        return None
    plain = str.__str__(text)
    spans: dict[str, tuple[int, int]] = {}
    for start, stop, origin in origin_spans(text._runs):
        if origin is not None and origin.message == 1:
            spans.setdefault(origin.field, (start, stop))
    field = next((name for name in spans if name != "content"), None)
    if field is None or "content" not in spans or spans["content"][0] < spans[field][1]:
        return None
    start, stop = spans[field]
    header = _common_header(plain[:start], str.__str__(other))
    return ThoughtForm(plain[header:start], plain[stop : spans["content"][0]])


class ThoughtTag(NamedTuple):
    """The thought that a prompt has opened, or opened and closed."""

    kind: Literal["open", "closed"]
    name: str
    """The tag's name; empty where only the template's form of a thought is known."""
    closing: str
    """The closing tag, if the prompt writes it or the form tells it."""
    end: int
    """Where the tag ends in the prompt."""


class ReasoningWriter:
    """Writes replies behind the prompts of one template that no turn of it begins with."""

    def __init__(self, template: ChatTemplate, controls: ControlTokens) -> None:
        self._template = template
        self._controls = controls
        self._form: ThoughtForm | None = None
        self._knows_form = False

    @property
    def form(self) -> ThoughtForm | None:
        """How the template writes a thought, found when it is first asked for."""
        if not self._knows_form:
            self._form, self._knows_form = find_thought_form(self._template), True
        return self._form

    def write_reply(
        self, prompt: TracedStr, turn_text: TracedStr, message: dict[str, Any]
    ) -> TracedStr | None:
        """Return the reply to a prompt, both without the history; None where none can be written.

        `turn_text` is how the template writes the turn, header included.
        """
        prompt, turn_text = self._align(prompt, turn_text)
        header = _common_header(prompt, turn_text)
        opened, body = prompt[header:], turn_text[header:]
        if not opened.strip():
            return body
        tag = self._find_tag(prompt, opened)
        if tag is None:
            return self._behind_text(prompt[:header], opened, body)
        space = prompt[tag.end :]
        if tag.kind == "closed":
            return _behind_close(space, turn_text, body, tag)
        return self._behind_open(space, turn_text, body, tag, message)

    def _align(self, prompt: TracedStr, turn_text: TracedStr) -> tuple[TracedStr, TracedStr]:
        """Return prompt and turn from the token on that opens the turn, if both hold it.

        What stands in front of it, such as the end of a tool's message, may differ.
        """
        before = self._controls.find_openers(prompt)
        after = self._controls.find_openers(_template_start(turn_text))
        # A header may stand behind the turn, too: the turn's own has the prompt's number.
        last = len(before) - 1
        if not before or len(after) <= last:
            return prompt, turn_text
        return prompt[before[last] :], turn_text[after[last] :]

    def _find_tag(self, prompt: TracedStr, opened: str) -> ThoughtTag | None:
        """Return the thought that the prompt opens or closes; None where its end is no tag."""
        end = len(prompt.rstrip())
        if self.form is not None:
            opening, closing = self.form.opening.strip(), self.form.closing.strip()
            shown = opened.strip()
            # The prompt may close a thought with as much of the form as it likes.
            rest = shown[len(opening) :].strip() if shown.startswith(opening) else shown
            if opening and not rest:
                return ThoughtTag("open", _tag_name(opening), closing, end)
            if rest and closing.startswith(rest):
                return ThoughtTag("closed", _tag_name(rest), rest, end)
        return _last_tag(prompt)

    def _behind_text(self, header: str, opened: str, body: TracedStr) -> TracedStr | None:
        """Return the turn behind a prompt that ends in more than a tag; None if it is not known.

        `header`, `opened`: what of the prompt the turn begins with, and what it does not have.
        """
        start = _template_start(body)
        if self._controls.find_openers(opened):
            # The header stands in the prompt alone: behind a tool's result Apertus goes on without
            # one. Behind a server's prompt the model goes on as the turn does.
            has_header = bool(self._controls.find_openers(start))
            return None if has_header or self._controls.remove_tokens(start).strip() else body
        if not self._controls.find_openers(header):
            return None
        # The prompt leads to a thought in words (Apriel). A turn without one closes it at once.
        if self.form is None or not self.form.closing.strip() or _shows_thought(body):
            return body
        return _close_thought("", self.form.closing, body)

    def _behind_open(
        self,
        space: str,
        turn_text: TracedStr,
        body: TracedStr,
        tag: ThoughtTag,
        message: dict[str, Any],
    ) -> TracedStr | None:
        """Return the turn from inside the thought that the prompt has opened."""
        open_ = _find_pair_tag(turn_text, tag.name, closing=False)
        if open_ is not None and _written_by_template(turn_text, open_):
            return _without(turn_text[open_.end() :], space)
        close = _find_closing(body, tag)
        if close is not None and _written_by_template(body, close):
            # The turn itself closes what only the prompt opens (GLM-4.7 writes `</think>a`).
            return _without(body, space)
        content = message.get("content")
        raw = content if isinstance(content, TracedStr) else None
        close = _find_pair_tag(raw, tag.name, closing=True) if raw else None
        if raw is not None and close is not None:
            return _with_content_reasoning(space, raw, body, tag.name, close)
        reasoning = message.get("reasoning_content")
        written = reasoning.rstrip("\n") if isinstance(reasoning, str) else ""
        # The form in which templates that show reasoning write it, an empty one included.
        closing = self.form.closing if self.form is not None else f"\n</{tag.name}>\n\n"
        return _close_thought(written, closing, body)


def _close_thought(written: str, closing: str, body: TracedStr) -> TracedStr:
    """Return a thought, its closing and the turn behind it, which may begin as the closing ends."""
    start = str.__str__(_template_start(body))
    shared = next(n for n in range(len(closing) + 1) if start.startswith(closing[n:]))
    own = closing[:shared] if closing[shared:].strip() else closing
    return concat_traced((written, own, body))


def _shows_thought(body: TracedStr) -> bool:
    """Return whether a text holds more than content and tool calls."""
    fields = {origin.field for _, origin, _ in body._runs if origin is not None}
    return bool(fields - {"content", "image", "tool_calls"})


def _template_start(body: TracedStr) -> TracedStr:
    """Return what the template writes in front of the first character of a message."""
    length = 0
    for size, origin, _ in body._runs:
        if origin is not None:
            break
        length += size
    return body[:length]


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


def _last_tag(prompt: str) -> ThoughtTag | None:
    """Return the last tag in the prompt; None where there is none, or text behind it."""
    tags = list(_TAG.finditer(prompt))
    if not tags or prompt[tags[-1].end() :].strip():
        return None
    last = tags[-1]
    closes = any(last[f"close{number}"] for number in (1, 2, 4, 5, 6))
    name = next(last[f"name{number}"] for number in range(1, 7) if last[f"name{number}"])
    return ThoughtTag("closed" if closes else "open", name, last[0] if closes else "", last.end())


def _tag_name(text: str) -> str:
    tag = _last_tag(text)
    return "" if tag is None else tag.name


def _find_pair_tag(text: str, name: str, closing: bool) -> re.Match[str] | None:
    """Return the first tag of a name in a text, the opening or the closing one of its pair."""
    if not name:
        return None
    tag = re.escape(name)
    if closing:
        forms = rf"</{tag}>|\[/{tag}\]|<{tag}\|>|<\|end_{tag}\|>|<\|{tag}_suffix\|>"
    else:
        forms = rf"<{tag}>|\[{tag}\]|<\|{tag}>|<\|(?:start|begin)_{tag}\|>|<\|{tag}_prefix\|>"
    return re.search(forms, text, re.IGNORECASE)


def _behind_close(space: str, turn_text: TracedStr, body: TracedStr, tag: ThoughtTag) -> TracedStr:
    """Return the turn without its thought: the prompt has closed it."""
    close = _find_closing(turn_text, tag)
    if close is None or not _written_by_template(turn_text, close):
        return body
    return _without(turn_text[close.end() :], space)


def _find_closing(text: str, tag: ThoughtTag) -> re.Match[str] | None:
    """Return where a text closes the thought: with the closing's own text, or its tag."""
    written = re.search(re.escape(tag.closing), text) if tag.closing else None
    return written or _find_pair_tag(text, tag.name, closing=True)


def _with_content_reasoning(
    space: str, raw: TracedStr, body: TracedStr, name: str, close: re.Match[str]
) -> TracedStr | None:
    """Return the reasoning in the content, which the template strips, and the turn behind it."""
    rest = raw[close.end() :]
    if not body.startswith(rest.strip()) and rest.strip() not in body:
        return None
    open_ = _find_pair_tag(raw, name, closing=False)
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
