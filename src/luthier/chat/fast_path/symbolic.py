"""Text that a template may write but not read: what it asks about the text is a condition.

A template that is run on symbolic texts does the same for every row whose texts give the same
answers. The answers given here are those of most texts (it does not start with `<tool_response>`,
`</think>` is not in it), and each is noted as a condition; whatever cannot be answered without the
text raises NeedsConcreteText. A symbolic text is no `str`, so nothing can read it by another way.
What comes out, with a placeholder for each text, is the plan of every row of the form.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn, Self

import jinja2

from luthier.chat.conversation import REASONING_FIELDS, Conversation, add_reasoning_aliases
from luthier.chat.jinja_env import TracedEnvironment
from luthier.chat.prefix_tracking import PrefixTracker
from luthier.chat.provenance import (
    FieldOrigin,
    TracedStr,
    concat_strings,
    concat_traced,
    trace_field,
)
from luthier.chat.template import ChatTemplate
from luthier.chat.turns import RenderedSequence


class NeedsConcreteText(BaseException):
    """The template asks what only the text itself can answer.

    No Exception, so that nothing on the way takes it for an answer.
    """


StripChain = tuple[tuple[str, str | None], ...]
"""Methods of `str` applied one after the other, each with its one argument: strips alone."""


RowForm = tuple[tuple[str, tuple[str, ...], bool], ...]
"""For each message of a row its role, the names of its texts, and whether it trains."""
TEXT_FIELDS = frozenset({"content", *REASONING_FIELDS})
"""The fields of a message that a plan may leave open."""
_FIRST_PLACEHOLDER = 0xF0000
"""The first character of a plane for private use, which stands for a field in a rendered text."""
_PLACEHOLDERS = re.compile("([\U000f0000-\U000ffffd])")


class SymbolicField(NamedTuple):
    """A field of a message, stripped as the template strips it."""

    message: int
    key: str
    chain: StripChain = ()


@dataclass(slots=True)
class TextConditions:
    """What must hold for the texts of a row: none of them starts, ends, equals or contains."""

    starts: dict[StripChain, set[str]] = field(default_factory=dict)
    ends: dict[StripChain, set[str]] = field(default_factory=dict)
    equals: dict[StripChain, set[str]] = field(default_factory=dict)
    contains: set[str] = field(default_factory=set)


class SymbolicText:
    """Template text and fields, one behind the other."""

    __slots__ = ("conditions", "pieces")

    def __init__(self, pieces: tuple[str | SymbolicField, ...], conditions: TextConditions) -> None:
        self.pieces = pieces
        self.conditions = conditions

    def __add__(self, other: Any) -> SymbolicText:
        return concat_symbolic((self, other), self.conditions)

    def __radd__(self, other: Any) -> SymbolicText:
        return concat_symbolic((other, self), self.conditions)

    def __bool__(self) -> bool:
        # No field is blank: rows with blank texts are left to a run of their own.
        return bool(self.pieces)

    def strip(self, chars: Any = None, /) -> SymbolicText:
        """Strip both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: Any = None, /) -> SymbolicText:
        """Strip the pieces from the first on, up to the first field."""
        return SymbolicText(
            _strip_first(self.pieces, "lstrip", _whitespace_or_raise(chars)), self.conditions
        )

    def rstrip(self, chars: Any = None, /) -> SymbolicText:
        """Strip the pieces from the last on, back to the last field."""
        pieces = _strip_first(self.pieces[::-1], "rstrip", _whitespace_or_raise(chars))
        return SymbolicText(pieces[::-1], self.conditions)

    def startswith(self, prefix: Any, /) -> bool:
        """Return whether it starts so: a field does not, on the condition that it does not."""
        return self._edge("startswith", prefix, self.pieces[0], self.conditions.starts)

    def endswith(self, suffix: Any, /) -> bool:
        """Return whether it ends so: a field does not, on the condition that it does not."""
        return self._edge("endswith", suffix, self.pieces[-1], self.conditions.ends)

    def _edge(
        self, method: str, affix: Any, piece: str | SymbolicField, edges: dict[StripChain, set[str]]
    ) -> bool:
        """Return the answer to `method(affix)`, noted in `edges` if `piece` is a field."""
        affixes = affix if isinstance(affix, tuple) else (affix,)
        if not all(type(text) is str and text for text in affixes):
            raise NeedsConcreteText
        if isinstance(piece, str):
            if any(len(text) > len(piece) for text in affixes):
                raise NeedsConcreteText
            return bool(getattr(piece, method)(affixes))
        # A longer affix could reach from a short field into the text beside it.
        if len(self.pieces) > 1 and any(len(text) > 1 for text in affixes):
            raise NeedsConcreteText
        edges.setdefault(piece.chain, set()).update(affixes)
        return False

    def __contains__(self, text: Any) -> bool:
        if type(text) is not str or not text or len(self.pieces) > 1:
            raise NeedsConcreteText
        self.conditions.contains.add(text)
        return False

    def __eq__(self, other: object) -> bool:
        # No text equals these, whatever it is.
        if other is None or isinstance(other, bool | int | float):
            return False
        if type(other) is not str or len(self.pieces) > 1 or isinstance(self.pieces[0], str):
            raise NeedsConcreteText
        self.conditions.equals.setdefault(self.pieces[0].chain, set()).add(other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def split(self, sep: Any = None, maxsplit: int = -1, /) -> list[SymbolicText]:
        """Return itself alone, on the condition that the separator is not in it."""
        return [self] if sep not in self else []

    rsplit = split

    def replace(self, old: Any, new: Any, count: int = -1, /) -> SymbolicText:
        """Itself, on the condition that there is nothing to replace."""
        if old in self:
            raise NeedsConcreteText
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsConcreteText


def need_concrete_text(*_: Any) -> NoReturn:
    """Give no answer, whatever the arguments are."""
    raise NeedsConcreteText


for _name in (
    "str", "repr", "format", "hash", "len", "iter", "getitem", "lt", "le", "gt", "ge", "mod",
    "mul", "rmul", "int", "float", "index",
):  # fmt: skip
    setattr(SymbolicText, f"__{_name}__", need_concrete_text)


def concat_symbolic(texts: Any, conditions: TextConditions) -> SymbolicText:
    """Texts, one behind the other."""
    pieces: list[str | SymbolicField] = []
    for text in texts:
        if isinstance(text, SymbolicText):
            pieces += text.pieces
        elif type(text) not in (str, TracedStr):
            # No text, or one marked as safe, which would escape what is added to it.
            raise NeedsConcreteText
        elif text:
            pieces.append(str.__str__(text))
    return SymbolicText(tuple(pieces), conditions)


def _whitespace_or_raise(chars: Any) -> str | None:
    """Return the characters to strip if they are white space: no visible text goes then."""
    if chars is None or (type(chars) is str and chars and chars.isspace()):
        return chars
    raise NeedsConcreteText


def _strip_first(
    pieces: tuple[str | SymbolicField, ...], method: str, chars: str | None
) -> tuple[str | SymbolicField, ...]:
    """Return the pieces with the first ones stripped; a field keeps something, so it ends there."""
    for number, piece in enumerate(pieces):
        if isinstance(piece, SymbolicField):
            return (
                piece._replace(chain=_add_strip(piece.chain, method, chars)),
                *pieces[number + 1 :],
            )
        left = getattr(piece, method)(chars)
        if left:
            return (left, *pieces[number + 1 :])
    return ()


def _add_strip(chain: StripChain, method: str, chars: str | None) -> StripChain:
    """Return the chain with one more strip.

    Strips of the left end stand first: both ends do not meet, so their order changes nothing.
    """
    if (method, chars) in [step for step in chain if step[0] == method][-1:]:
        return chain
    return tuple(sorted((*chain, (method, chars)), key=lambda step: step[0]))


@dataclass(slots=True)
class SpanPlan:
    """Where a trained reply stands in a sequence: (pieces before, characters into the next)."""

    message: int
    start: tuple[int, int]
    stop: tuple[int, int]
    stop_token: str


@dataclass(slots=True)
class SequencePlan:
    """One training sequence: text of the template, and numbers of fields, one after the other."""

    pieces: list[str | int]
    spans: list[SpanPlan]


@dataclass(slots=True)
class FormPlan:
    """The sequences that every row of a form makes, if the conditions hold for its texts."""

    fields: list[SymbolicField]
    sequences: list[SequencePlan]
    conditions: TextConditions


class SymbolicEnvironment(TracedEnvironment):
    """The traced environment, in which texts may be opaque."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.concat = _concat_any

    def plus(self, *operands: Any) -> Any:
        """Return the sum of the operands."""
        text = _first_symbolic(operands)
        if text is None:
            return super().plus(*operands)
        return concat_symbolic(operands, text.conditions)

    def tilde(self, *operands: Any) -> Any:
        """Return the operands as strings, one behind the other."""
        return _concat_any(map(_as_string, operands))

    def compile_traced(self, source: str) -> jinja2.Template:
        """Compile a template that writes symbolic texts as they are."""
        self.filters["trim"] = _dispatch_symbolic(self.filters["trim"], SymbolicText.strip)
        self.filters["safe"] = _dispatch_symbolic(self.filters["safe"], need_concrete_text)
        self.filters["string"] = _dispatch_symbolic(self.filters["string"], _as_string)
        for name in ("string", "iterable", "sequence"):
            self.tests[name] = _dispatch_symbolic(self.tests[name], lambda text: True)
        template = super().compile_traced(source)
        template.root_render_func.__globals__["str"] = _as_string
        return template


def _first_symbolic(values: Iterable[Any]) -> SymbolicText | None:
    return next((value for value in values if isinstance(value, SymbolicText)), None)


def _concat_any(parts: Iterable[Any]) -> Any:
    parts = list(parts)
    text = _first_symbolic(parts)
    return concat_strings(parts) if text is None else concat_symbolic(parts, text.conditions)


def _as_string(value: Any) -> Any:
    return value if isinstance(value, SymbolicText) else str(value)


def _dispatch_symbolic(plain: Any, symbolic: Any) -> Any:
    """Return the filter or test `plain`, which hands symbolic text to `symbolic`."""

    def either(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, SymbolicText):
            return plain(value, *args, **kwargs)
        return symbolic(value, *args, **kwargs)

    return either


class SymbolicTemplate(ChatTemplate):
    """A chat template that is run on symbolic texts, each written as a character of its own."""

    environment_class = SymbolicEnvironment

    def __init__(self, source: str, variables: dict[str, Any], date: str) -> None:
        self.placeholders: dict[SymbolicField, str] = {}
        super().__init__(source, variables, date)
        # No symbolic text can be marked as safe, or escaped.
        self.may_escape = False

    def with_variables(self, variables: dict[str, Any]) -> Self:
        """Return this template with other variables."""
        template = super().with_variables(variables)
        template.placeholders = {}
        return template

    def _run(
        self, template: jinja2.Template, inputs: dict[str, Any], tracker: PrefixTracker | None
    ) -> list[str]:
        pieces = super()._run(template, inputs, tracker)
        pieces[:] = [
            concat_traced(map(self._with_placeholder, piece.pieces))
            if isinstance(piece, SymbolicText)
            else piece
            for piece in pieces
        ]
        return pieces

    def _with_placeholder(self, piece: str | SymbolicField) -> str:
        if isinstance(piece, str):
            return piece
        unused = chr(_FIRST_PLACEHOLDER + len(self.placeholders))
        placeholder = self.placeholders.setdefault(piece, unused)
        origin = FieldOrigin(piece.message, None, piece.key, placeholder)
        return trace_field(origin, placeholder)


def symbolic_conversation(form: RowForm, conditions: TextConditions) -> Conversation:
    """Return a conversation of the form whose texts cannot be read."""
    conversation = Conversation([], None)
    for index, (role, keys, _) in enumerate(form):
        texts = {key: SymbolicText((SymbolicField(index, key),), conditions) for key in keys}
        conversation.messages.append(add_reasoning_aliases({"role": role, **texts}))
        conversation.numbers.append(index)
        conversation.train.append(None)
    return conversation


def make_form_plan(
    form: RowForm,
    sequences: list[RenderedSequence],
    placeholders: dict[SymbolicField, str],
    conditions: TextConditions,
) -> FormPlan:
    """Return the form's plan from its planned sequences, in which placeholders stand for fields.

    Raises NeedsConcreteText where they do not show every text: then the row's text is lost.
    """
    fields = list(placeholders)
    numbers = {placeholder: number for number, placeholder in enumerate(placeholders.values())}
    plans = [_plan_sequence(sequence, numbers) for sequence in sequences]
    rendered = {fields[p][:2] for plan in plans for p in plan.pieces if isinstance(p, int)}
    if any((index, key) not in rendered for index, (_, keys, _) in enumerate(form) for key in keys):
        raise NeedsConcreteText
    return FormPlan(fields, plans, conditions)


def _plan_sequence(sequence: RenderedSequence, numbers: dict[str, int]) -> SequencePlan:
    texts = [text for text in _PLACEHOLDERS.split(sequence.plain) if text]
    starts = [0, *accumulate(map(len, texts))]

    def locate(position: int) -> tuple[int, int]:
        number = bisect_right(starts, position) - 1
        return number, position - starts[number]

    spans = [
        SpanPlan(span.message, locate(span.start), locate(span.stop), span.stop_token)
        for span in sequence.spans
    ]
    return SequencePlan([numbers.get(text, text) for text in texts], spans)
