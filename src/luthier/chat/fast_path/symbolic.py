"""Text that a template may write but not read: what it asks about the text is a condition.

A template that is run on opaque texts does the same for every row whose texts give the same
answers. The answers given here are those of most texts (it does not start with `<tool_response>`,
`</think>` is not in it), and each is noted as a condition; whatever cannot be answered without the
text raises Unprovable. An opaque text is no `str`, so nothing can read it by another way.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import jinja2

from luthier.chat.conversation import REASONING_FIELDS, Conversation, with_reasoning_names
from luthier.chat.jinja_env import TracedEnvironment
from luthier.chat.prefix_tracking import Watch
from luthier.chat.provenance import Origin, Text, from_field, plus, plus_all
from luthier.chat.template import ChatTemplate
from luthier.chat.turns import Sequence


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


# What a template makes of all rows of one form: found once, on texts that it cannot read.

Form = tuple[tuple[str, tuple[str, ...], bool], ...]
"""For each message of a row its role, the names of its texts, and whether it trains."""
TEXTS = frozenset({"content", *REASONING_FIELDS})
"""The fields of a message that a skeleton may leave open."""
_FIRST = 0xF0000
_PLACES = re.compile("([\U000f0000-\U000ffffd])")


@dataclass(slots=True)
class SpanPlan:
    """A trained reply: parts `start` up to `stop` of a sequence, `stop_at` characters into it."""

    message: int
    start: tuple[int, int]
    """Parts before it, and characters of the part in which it starts."""
    stop: tuple[int, int]
    token: str


@dataclass(slots=True)
class SequencePlan:
    """One training sequence: text of the template, and numbers of fields, one after the other."""

    parts: list[str | int]
    spans: list[SpanPlan]


@dataclass(slots=True)
class Skeleton:
    """The sequences that every row of a form makes, if the conditions hold for its texts."""

    fields: list[Field]
    sequences: list[SequencePlan]
    conditions: Conditions


class OpaqueEnvironment(TracedEnvironment):
    """The traced environment, in which texts may be opaque."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.concat = _concat

    def plus(self, *operands: Any) -> Any:
        """The sum of the operands."""
        found = _first_opaque(operands)
        return super().plus(*operands) if found is None else joined(operands, found.conditions)

    def tilde(self, *operands: Any) -> Any:
        """The operands as strings, one behind the other."""
        return _concat(map(_as_string, operands))

    def compile_traced(self, source: str) -> jinja2.Template:
        """Compile a template that writes opaque texts as they are."""
        self.filters["trim"] = _unless_opaque(self.filters["trim"], Opaque.strip)
        self.filters["safe"] = _unless_opaque(self.filters["safe"], refuse)
        self.filters["string"] = _unless_opaque(self.filters["string"], _as_string)
        for name in ("string", "iterable", "sequence"):
            self.tests[name] = _unless_opaque(self.tests[name], lambda text: True)
        template = super().compile_traced(source)
        template.root_render_func.__globals__["str"] = _as_string
        return template


def _first_opaque(values: Iterable[Any]) -> Opaque | None:
    return next((value for value in values if isinstance(value, Opaque)), None)


def _concat(parts: Iterable[Any]) -> Any:
    parts = list(parts)
    found = _first_opaque(parts)
    return plus(parts) if found is None else joined(parts, found.conditions)


def _as_string(value: Any) -> Any:
    return value if isinstance(value, Opaque) else str(value)


def _unless_opaque(plain: Any, opaque: Any) -> Any:
    def either(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, Opaque):
            return plain(value, *args, **kwargs)
        return opaque(value, *args, **kwargs)

    return either


class OpaqueTemplate(ChatTemplate):
    """A chat template that is run on opaque texts, each written as a character of its own."""

    environment_class = OpaqueEnvironment

    def __init__(self, source: str, variables: dict[str, Any], date: str) -> None:
        self.places: dict[Field, str] = {}
        super().__init__(source, variables, date)
        # No opaque text can be marked as safe, or escaped.
        self.is_doubtful = False

    def _run(
        self, template: jinja2.Template, inputs: dict[str, Any], watch: Watch | None
    ) -> list[str]:
        pieces = super()._run(template, inputs, watch)
        pieces[:] = [self._shown(piece) if isinstance(piece, Opaque) else piece for piece in pieces]
        return pieces

    def _shown(self, text: Opaque) -> Text:
        return plus_all(self._part(part) for part in text.parts)

    def _part(self, part: str | Field) -> str:
        if isinstance(part, str):
            return part
        place = self.places.setdefault(part, chr(_FIRST + len(self.places)))
        return from_field(Origin(part.message, None, part.key, place), place)


def opaque_conversation(form: Form, conditions: Conditions) -> Conversation:
    """A conversation of the form whose texts cannot be read."""
    conversation = Conversation([], None)
    for index, (role, keys, _) in enumerate(form):
        texts = {key: Opaque((Field(index, key),), conditions) for key in keys}
        conversation.messages.append(with_reasoning_names({"role": role, **texts}))
        conversation.numbers.append(index)
        conversation.train.append(None)
    return conversation


def skeleton_of(
    form: Form, sequences: list[Sequence], places: dict[Field, str], conditions: Conditions
) -> Skeleton:
    """The skeleton of planned sequences; Unprovable where they do not show every text."""
    fields = list(places)
    numbers = {place: number for number, place in enumerate(places.values())}
    plans = [_sequence_plan(sequence, numbers) for sequence in sequences]
    shown = {fields[part][:2] for plan in plans for part in plan.parts if isinstance(part, int)}
    if any((index, key) not in shown for index, (_, keys, _) in enumerate(form) for key in keys):
        raise Unprovable
    return Skeleton(fields, plans, conditions)


def _sequence_plan(sequence: Sequence, numbers: dict[str, int]) -> SequencePlan:
    texts = [text for text in _PLACES.split(sequence.plain) if text]
    ends = [0]
    for text in texts:
        ends.append(ends[-1] + len(text))

    def place(position: int) -> tuple[int, int]:
        part = bisect_right(ends, position) - 1
        return part, position - ends[part]

    spans = [
        SpanPlan(span.message, place(span.start), place(span.stop), span.token)
        for span in sequence.trained
    ]
    return SequencePlan([numbers.get(text, text) for text in texts], spans)
