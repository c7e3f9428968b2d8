"""Text that a template may write but not read: what it asks about the text is a condition.

A template that is run on opaque texts does the same for every row whose texts give the same
answers. The answers given here are those of most texts (it does not start with `<tool_response>`,
`</think>` is not in it), and each is noted as a condition; whatever cannot be answered without the
text raises Unprovable. An opaque text is no `str`, so nothing can read it by another way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from luthier.chat.text import Text


class Unprovable(BaseException):
    """The template asks what only the text itself can answer.

    No Exception, so that nothing on the way takes it for an answer.
    """


Chain = tuple[tuple[str, str | None], ...]
"""Methods of `str` applied one after the other, each with its one argument: strips alone."""


class Field(NamedTuple):
    """A field of a message, stripped as the template strips it."""

    message: int
    key: str
    chain: Chain = ()


@dataclass(slots=True)
class Conditions:
    """What must hold for the texts of a row: none of them starts, ends, equals or contains."""

    starts: dict[Chain, set[str]] = field(default_factory=dict)
    ends: dict[Chain, set[str]] = field(default_factory=dict)
    equals: dict[Chain, set[str]] = field(default_factory=dict)
    contains: set[str] = field(default_factory=set)


class Opaque:
    """Template text and fields, one behind the other."""

    __slots__ = ("conditions", "parts")

    def __init__(self, parts: tuple[str | Field, ...], conditions: Conditions) -> None:
        self.parts = parts
        self.conditions = conditions

    def __add__(self, other: Any) -> Opaque:
        return joined((self, other), self.conditions)

    def __radd__(self, other: Any) -> Opaque:
        return joined((other, self), self.conditions)

    def __bool__(self) -> bool:
        # No field is blank: rows with blank texts are left to a run of their own.
        return bool(self.parts)

    def strip(self, chars: Any = None, /) -> Opaque:
        """Strip both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: Any = None, /) -> Opaque:
        """Strip the parts from the first on, up to the first field."""
        return Opaque(_stripped(self.parts, "lstrip", _space(chars)), self.conditions)

    def rstrip(self, chars: Any = None, /) -> Opaque:
        """Strip the parts from the last on, back to the last field."""
        parts = _stripped(self.parts[::-1], "rstrip", _space(chars))
        return Opaque(parts[::-1], self.conditions)

    def startswith(self, prefix: Any, /) -> bool:
        """Whether it starts so: a field does not, on the condition that it does not."""
        return self._edge("startswith", prefix, self.parts[0], self.conditions.starts)

    def endswith(self, suffix: Any, /) -> bool:
        """Whether it ends so: a field does not, on the condition that it does not."""
        return self._edge("endswith", suffix, self.parts[-1], self.conditions.ends)

    def _edge(
        self, method: str, text: Any, part: str | Field, asked: dict[Chain, set[str]]
    ) -> bool:
        texts = text if isinstance(text, tuple) else (text,)
        if not all(type(one) is str and one for one in texts):
            raise Unprovable
        if isinstance(part, str):
            if any(len(one) > len(part) for one in texts):
                raise Unprovable
            return bool(getattr(part, method)(texts))
        if len(self.parts) > 1 and any(len(one) > 1 for one in texts):
            raise Unprovable
        asked.setdefault(part.chain, set()).update(texts)
        return False

    def __contains__(self, text: Any) -> bool:
        if type(text) is not str or not text or len(self.parts) > 1:
            raise Unprovable
        self.conditions.contains.add(text)
        return False

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, bool | int | float):
            return False
        if type(other) is not str or len(self.parts) > 1 or isinstance(self.parts[0], str):
            raise Unprovable
        self.conditions.equals.setdefault(self.parts[0].chain, set()).add(other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def split(self, sep: Any = None, maxsplit: int = -1, /) -> list[Opaque]:
        """Itself alone, on the condition that the separator is not in it."""
        return [self] if sep not in self else []

    rsplit = split

    def replace(self, old: Any, new: Any, count: int = -1, /) -> Opaque:
        """Itself, on the condition that there is nothing to replace."""
        if old in self:
            raise Unprovable
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise Unprovable


def refuse(*_: Any) -> NoReturn:
    """Give no answer."""
    raise Unprovable


for _name in (
    "str", "repr", "format", "hash", "len", "iter", "getitem", "lt", "le", "gt", "ge", "mod",
    "mul", "rmul", "int", "float", "index",
):  # fmt: skip
    setattr(Opaque, f"__{_name}__", refuse)


def joined(texts: Any, conditions: Conditions) -> Opaque:
    """Texts, one behind the other."""
    parts: list[str | Field] = []
    for text in texts:
        if isinstance(text, Opaque):
            parts += text.parts
        elif type(text) not in (str, Text):
            # No text, or one marked as safe, which would escape what is added to it.
            raise Unprovable
        elif text:
            parts.append(str.__str__(text))
    return Opaque(tuple(parts), conditions)


def _space(chars: Any) -> str | None:
    """The characters to strip, if they are white space: then a field loses nothing that shows."""
    if chars is None or (type(chars) is str and chars and chars.isspace()):
        return chars
    raise Unprovable


def _stripped(
    parts: tuple[str | Field, ...], method: str, chars: str | None
) -> tuple[str | Field, ...]:
    """The parts with the first ones stripped; a field keeps something, so it ends there."""
    for number, part in enumerate(parts):
        if isinstance(part, Field):
            return (part._replace(chain=_longer(part.chain, method, chars)), *parts[number + 1 :])
        left = getattr(part, method)(chars)
        if left:
            return (left, *parts[number + 1 :])
    return ()


def _longer(chain: Chain, method: str, chars: str | None) -> Chain:
    """The chain with one more strip; those of the left end stand first, for both do not meet."""
    if (method, chars) in [step for step in chain if step[0] == method][-1:]:
        return chain
    return tuple(sorted((*chain, (method, chars)), key=lambda step: step[0]))
