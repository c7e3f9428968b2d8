"""Rows of a form that was met before: planned by its skeleton, without running the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from luthier.chat.control import Controls
from luthier.chat.conversation import MAX_CHARACTERS
from luthier.chat.errors import ChatError
from luthier.chat.opaque import Chain, Conditions, Unprovable, refuse
from luthier.chat.origin import Origin, cut
from luthier.chat.planning import Planner
from luthier.chat.skeleton import (
    TEXTS,
    Form,
    OpaqueTemplate,
    SequencePlan,
    Skeleton,
    opaque_conversation,
    skeleton_of,
)
from luthier.chat.template import ChatTemplate
from luthier.chat.text import mark
from luthier.chat.turns import Sequence, Span, trained_messages

Strip = Callable[[str], str]
Key = tuple[Any, ...]
"""A form as it is looked up: a role for a message of role and content alone, else all it has."""


@dataclass(slots=True)
class Known:
    """A row whose skeleton is known."""

    messages: list[dict[str, Any]]
    reading: Reading
    texts: list[str]
    """The texts of its messages, one after the other."""
    joined: str
    """All of these in one, with a character between them that ends every token."""
    values: list[str]
    """What stands in the skeleton's fields."""

    @property
    def skeleton(self) -> Skeleton:
        """What the template makes of rows of its form."""
        return self.reading.skeleton

    def sequences(self) -> list[Sequence]:
        """The sequences as the planner would give them, each character with its origin."""
        return [self._sequence(plan) for plan in self.skeleton.sequences]

    def _sequence(self, plan: SequencePlan) -> Sequence:
        values = self.values
        parts: list[str] = [values[part] if isinstance(part, int) else part for part in plan.parts]
        starts = [0]
        for text in parts:
            starts.append(starts[-1] + len(text))
        runs: list[Any] = []
        for part, text in zip(plan.parts, parts, strict=True):
            runs += self._runs(part) if isinstance(part, int) else [(len(text), None, 0)]
        spans = [
            Span(
                span.message,
                starts[span.start[0]] + span.start[1],
                starts[span.stop[0]] + span.stop[1],
                span.token,
            )
            for span in plan.spans
        ]
        return Sequence(mark("".join(parts), tuple(runs)), spans)

    def _runs(self, number: int) -> Any:
        index, key, _ = self.skeleton.fields[number]
        whole, value = self.messages[index][key], self.values[number]
        start = whole.index(value)
        origin = Origin(index, self.messages[index]["role"], key, whole)
        return cut(((len(whole), origin, 0),), start, start + len(value))


class Reading:
    """Reads rows of one form."""

    def __init__(self, form: Form, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._places = [(index, key) for index, (_, keys, _) in enumerate(form) for key in keys]
        self._fields = [
            (self._places.index((index, key)), _strip(chain))
            for index, key, chain in skeleton.fields
        ]
        asked = skeleton.conditions
        found = (asked.starts, asked.ends, asked.equals)
        self._doubts = asked.contains.union(*(texts for each in found for texts in each.values()))

    def known(self, messages: list[Any]) -> Known | None:
        """The row, unless one of its texts does not meet the conditions."""
        texts: list[str] = [messages[index][key] for index, key in self._places]
        joined = "\0".join(texts)
        if not _is_text(joined):
            return None
        # Whoever starts with a text, ends with it or equals it contains it.
        if any(doubt in joined for doubt in self._doubts) and not self._are_met(texts, joined):
            return None
        values = [strip(texts[place]) if strip else texts[place] for place, strip in self._fields]
        return Known(messages, self, texts, joined, values)

    def _are_met(self, texts: list[str], joined: str) -> bool:
        """Whether the conditions hold, each looked at."""
        asked = self.skeleton.conditions
        edges = [(str.startswith, asked.starts), (str.endswith, asked.ends)]
        if any(text in joined for text in asked.contains):
            return False
        for is_at, found in edges:
            for chain, edge in found.items():
                if any(is_at(_apply(chain, text), tuple(edge)) for text in texts):
                    return False
        return not any(
            _apply(chain, text) in equals
            for chain, equals in asked.equals.items()
            for text in texts
        )


class Forms:
    """The skeletons of one template, found when a form is first met."""

    def __init__(
        self, template: ChatTemplate, controls: Controls, train_on: str | list[str]
    ) -> None:
        self._template = template
        self._controls = controls
        self._train_on = train_on
        self._opaque: OpaqueTemplate | None = None
        self._found: dict[Key, Reading | None] = {}

    def known(self, row: dict[str, Any]) -> Known | None:
        """The row with its skeleton; None where it must be planned for itself."""
        messages = row.get("messages")
        if type(messages) is not list or row.get("tools") is not None:
            return None
        key = _key(messages)
        if key is None:
            return None
        if key not in self._found:
            self._found[key] = self._learn(key)
        reading = self._found[key]
        return None if reading is None else reading.known(messages)

    def _learn(self, key: Key) -> Reading | None:
        """How to read rows of the form; None where the template looks at more than the form."""
        try:
            form = self._form(key)
            return Reading(form, self._skeleton(form))
        except (Unprovable, ChatError):
            return None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # What reads a text otherwise than asked for finds no text there.
            return None

    def _skeleton(self, form: Form) -> Skeleton:
        template, conditions = self._template, Conditions()
        if self._opaque is None:
            self._opaque = OpaqueTemplate(template.source, template.variables, template.date)
        self._opaque.places.clear()
        trained = [place for place, (_, _, trains) in enumerate(form) if trains]
        if not trained:
            raise Unprovable
        planner = Planner(self._opaque, self._controls, refuse)
        sequences = planner.plan(opaque_conversation(form, conditions), trained)
        return skeleton_of(form, sequences, self._opaque.places, conditions)

    def _form(self, key: Key) -> Form:
        plain = [(part, ("content",), None) if isinstance(part, str) else part for part in key]
        conversation = opaque_conversation(
            tuple((role, keys, True) for role, keys, _ in plain), Conditions()
        )
        conversation.train = [train for _, _, train in plain]
        trained = set(trained_messages(conversation, self._train_on))
        return tuple((role, keys, place in trained) for place, (role, keys, _) in enumerate(plain))


def _key(messages: list[Any]) -> Key | None:
    """The row's form as a key; None for a row that has more than texts, or blank ones."""
    found: list[Any] = []
    for message in messages:
        if type(message) is not dict:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str or not role:
            return None
        if not content or content.isspace():
            return None
        found.append(role if len(message) == 2 else _more(role, message))
        if found[-1] is None:
            return None
    return tuple(found) or None


def _more(role: str, message: dict[str, Any]) -> tuple[str, tuple[str, ...], bool | None] | None:
    """A message's role, its texts in their order, and its own `train` flag."""
    names: list[str] = []
    for name, value in message.items():
        if name == "train":
            continue
        if name == "role":
            # Where it is not the first, a template that lists a message's fields sees that.
            if names:
                return None
        elif name not in TEXTS or type(value) is not str or not value or value.isspace():
            return None
        else:
            names.append(name)
    train = message.get("train")
    return role, tuple(names), None if train is None else bool(train)


def _is_text(joined: str) -> bool:
    """Whether the texts are Unicode of a size that can be held."""
    if len(joined) > MAX_CHARACTERS:
        return False
    if joined.isascii():
        return True
    try:
        joined.encode()
    except UnicodeEncodeError:
        return False
    return True


def _strip(chain: Chain) -> Strip | None:
    """What strips a text so; None for a chain that leaves it as it is."""
    if not chain:
        return None
    if chain == (("lstrip", None), ("rstrip", None)):
        return str.strip
    return partial(_apply, chain)


def _apply(chain: Chain, text: str) -> str:
    for method, chars in chain:
        text = getattr(text, method)(chars)
    return text
