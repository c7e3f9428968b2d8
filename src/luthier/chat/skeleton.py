"""What a template makes of all rows of one form: found once, on texts that it cannot read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jinja2

from luthier.chat.conversation import REASONING_FIELDS, Conversation, with_reasoning_names
from luthier.chat.environment import TracedEnvironment
from luthier.chat.opaque import Conditions, Field, Opaque, Unprovable, joined, refuse
from luthier.chat.origin import Origin
from luthier.chat.template import ChatTemplate
from luthier.chat.text import Text, from_field, plus, plus_all
from luthier.chat.turns import Sequence
from luthier.chat.watch import Watch

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
