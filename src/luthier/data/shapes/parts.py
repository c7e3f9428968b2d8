"""Content that is a list of parts: text, and LLaMA-Factory's parts of reasoning and calls."""

from dataclasses import dataclass, field
from typing import Any

from luthier.data.rows import RowError, kind
from luthier.data.shapes.calls import Call, read_call

TEXTS = ("text", "input_text", "output_text", None)
REASONING_TYPES = ("reasoning", "thinking")
CALLS = ("tool_call", "function_call")
_ORDER = {"reasoning": 0, "text": 1, "call": 2}


@dataclass
class Content:
    """What the parts of one message say."""

    texts: list[dict[str, Any]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def content(self) -> str | list[dict[str, Any]] | None:
        """The text: a plain one where one part holds it all, which every template can show.

        Several parts stay parts: servers differ in what they put between them.
        """
        if len(self.texts) > 1:
            return self.texts
        if not self.texts:
            return None if self.reasoning or self.calls else ""
        text: str = self.texts[0]["text"]
        return text


def read_parts(parts: list[Any]) -> Content:
    """The parts of a message's content; RowError names one that is neither text nor known."""
    content, reached = Content(), 0
    for part in parts:
        group = _add(content, part)
        if _ORDER[group] < reached:
            raise RowError(
                f"a part of {group} stands behind other parts; a message has its reasoning first, "
                "then its text, then its calls, so split it into several messages"
            )
        reached = _ORDER[group]
    return content


def _add(content: Content, part: Any) -> str:
    """Put one part where it belongs, and say which group it is of."""
    if not isinstance(part, dict):
        raise RowError(f"a content part is {kind(part)!r}; only parts of text are read")
    name = part.get("type")
    name = name if isinstance(name, str | None) else str(name)
    value = next((part[key] for key in ("text", "value", name) if part.get(key) is not None), None)
    if isinstance(value, str) and name in CALLS:
        content.calls.append(read_call(value, f"the {name} part"))
        return "call"
    if isinstance(value, str) and name in REASONING_TYPES:
        content.reasoning.append(value)
        return "reasoning"
    if not isinstance(value, str) or name not in TEXTS:
        shown = part.get("type", "no type")
        raise RowError(f"a content part is {shown!r}; only parts of text are read")
    kept = {key: entry for key, entry in part.items() if entry is not None and key != "value"}
    content.texts.append({**kept, "type": "text", "text": value})
    return "text"


def are_parts(content: list[Any]) -> bool:
    """Whether a tool's result is written as parts, and is no list of its own."""
    return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
