"""The forms in which templates write the arguments of a call, learnt from rendering, and read.

A template writes them as one JSON object, as JSON text within JSON, as Python writes a dict, or
entry by entry: in tags (`<parameter=zone>UTC</parameter>`), as a call (`clock(zone="UTC")`), or in
a notation of its own. What stands around keys and values is found with made-up arguments.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from luthier.chat.types import ChatError

WriteArguments = Callable[[dict[str, Any]], str]
"""Returns how the template writes arguments; raises ChatError or ReplySyntaxError."""
KEYS = ("zqkey1", "zqkey2", "zqkey3")
NUMBERS = (71001, 71002, 71003)
"""Keys and values of made-up arguments: they stand in no template."""
Notation = Literal["json", "json text", "python"]
_OPENINGS: tuple[tuple[Notation, str], ...] = (("json", "{"), ("json text", '"'), ("python", "{"))
"""How a text of each notation begins."""
_ALL_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
KEY_MARK = "\0"
"""Stands for the entry's own key in a marker: some templates close a tag with it."""


class ReplySyntaxError(ValueError):
    """Text that is not what the template writes."""


class ArgumentForm(Protocol):
    """Reads the arguments of one call."""

    lead: str
    """What stands between the start of the arguments and the first key."""

    def parse(self, text: str, position: int, schema: dict[str, Any]) -> tuple[Any, int]:
        """Return the arguments that begin at a position, and where they end.

        `schema`: the JSON schema of the arguments; empty where there is none. Raises
        ReplySyntaxError.
        """


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)


def read_json(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a position, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ReplySyntaxError(f"the arguments are not JSON ({problem})") from None


_PYTHON_TOKENS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[\[\](){}]", re.DOTALL)


def read_python(text: str, position: int) -> tuple[Any, int]:
    """Return the list or dict in Python's notation that begins at a position, and its end."""
    depth = 0
    for token in _PYTHON_TOKENS.finditer(text, position):
        depth += (token[0] in "[({") - (token[0] in "])}")
        if not depth:
            try:
                return ast.literal_eval(text[position : token.end()]), token.end()
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                break
    raise ReplySyntaxError("the arguments are not what Python writes")


class WholeArguments:
    """Arguments that are written in one piece: as JSON, JSON text within JSON, or Python's dict."""

    def __init__(self, notation: Notation, lead: str) -> None:
        self.notation, self.lead = notation, lead

    def parse(self, text: str, position: int, schema: dict[str, Any]) -> tuple[Any, int]:
        """Return the arguments at a position, and where they end."""
        if self.notation == "python":
            value, end = read_python(text, position)
        else:
            value, end = read_json(text, position)
        if self.notation == "json text":
            if not isinstance(value, str):
                raise ReplySyntaxError("the arguments are not JSON text")
            inner, inner_end = read_json(value, 0)
            value = inner if inner_end == len(value) else None
        if not isinstance(value, dict):
            raise ReplySyntaxError("the arguments are no object")
        return value, end


def find_whole_arguments(text: str, arguments: dict[str, Any]) -> tuple[WholeArguments, int] | None:
    """Return the form in which a text holds the arguments in one piece, and where they start."""
    key = text.index(next(iter(arguments)))
    for notation, opening in _OPENINGS:
        start = key
        while (start := text.rfind(opening, 0, start)) >= 0:
            form = WholeArguments(notation, text[start:key])
            try:
                value, _ = form.parse(text, start, {})
            except ReplySyntaxError:
                continue
            if value == arguments:
                return form, start
    return None


class SequenceMarkers(NamedTuple):
    """What stands around the items of a list, or the entries of an object, in a value."""

    opening: str
    middle: str
    """What stands between a key and its value; empty for a list."""
    separator: str
    closing: str

    def ends(self, key: str) -> tuple[str, ...]:
        """Return what may stand behind a value."""
        return self.separator.replace(KEY_MARK, key), self.closing.replace(KEY_MARK, key)


@dataclass(slots=True)
class EntryMarkers:
    """What stands around the values of some types."""

    middle: str
    types: set[str] = field(default_factory=set)
    separators: set[str] = field(default_factory=set)
    closings: set[str] = field(default_factory=set)


def _longest_first(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts), key=len, reverse=True)


class EntryArguments:
    """Arguments that are written entry by entry."""

    def __init__(self, write: WriteArguments) -> None:
        """Learn the form; raises ReplySyntaxError where it is none of this kind."""
        self._write = write
        key, number = KEYS[0], str(NUMBERS[0])
        single = write({key: NUMBERS[0]})
        self.lead = single[: single.index(key)]
        if number not in single:
            raise ReplySyntaxError("the template does not show numbers as they are")
        self.markers: list[EntryMarkers] = []
        self.constants: dict[str, Any] = {}
        self.quotes = ("", "")
        self.escapes: Literal["raw", "json", "python"] = "raw"
        self.containers: dict[str, Literal["json", "python"] | SequenceMarkers] = {}
        self._base = self._learn_markers({"integer"}, NUMBERS[0], [number])
        if self._base is None:
            raise ReplySyntaxError("the template writes arguments in an unknown form")
        self._learn_strings()
        self._learn_scalars()
        self._learn_container("array", [71003, "zqx"], [71003, 71004])
        self._learn_container("object", {"zqk": 71003, "zqm": "zqx"}, {"zqk": 71003, "zqm": 71004})
        self._learn_empty()

    # Learning: what stands around keys and values of each type.

    def _body(self, arguments: dict[str, Any]) -> str:
        """Return what stands behind the first key."""
        text = self._write(arguments)
        if not text.startswith(self.lead + KEYS[0]):
            raise ReplySyntaxError("the template writes this argument differently from others")
        return text[len(self.lead) + len(KEYS[0]) :]

    def _learn_markers(
        self, types: set[str], value: Any, encodings: list[str]
    ) -> EntryMarkers | None:
        """Note what stands around a value that is written as one of the encodings."""
        found = self._find_markers(value, encodings)
        if found is None:
            return None
        middle, separator, closing = found
        markers = next((each for each in self.markers if each.middle == middle), None)
        if markers is None:
            markers = EntryMarkers(middle)
            self.markers.append(markers)
        markers.types |= types
        markers.separators.add(separator)
        markers.closings.add(closing)
        return markers

    def _find_markers(self, value: Any, encodings: list[str]) -> tuple[str, str, str] | None:
        """Return what stands in front of a value, behind it before another, and behind the last."""
        first, second = KEYS[:2]
        try:
            alone = self._body({first: value})
            pair = self._body({first: value, second: NUMBERS[1]})
        except (ReplySyntaxError, ChatError):
            return None
        for encoding in encodings:
            # A type's name may stand in front of its value: `type="null">null`.
            start = alone.rfind(encoding)
            middle = alone[:start]
            behind = len(middle) + len(encoding)
            end = pair.find(second, behind)
            if start >= 0 and pair.startswith(middle + encoding) and end >= 0:
                parts = middle, pair[behind:end], alone[behind:]
                front, between, last = (part.replace(first, KEY_MARK) for part in parts)
                return front, between, last
        return None

    def _learn_strings(self) -> None:
        found = self._find_markers("zqvalue", ["zqvalue"])
        if found is None or self._base is None:
            return
        middle, separator, closing = found
        base = self._base
        base_separator, base_closing = min(base.separators), min(base.closings)
        quote = separator.removesuffix(base_separator)
        if middle.startswith(base.middle) and quote + base_closing == closing:
            base.types.add("string")
            self.quotes = middle[len(base.middle) :], quote
        else:
            self.markers.append(EntryMarkers(middle, {"string"}, {separator}, {closing}))
        special = "zqx\"\\\n'zqy"
        body = self._body({KEYS[0]: special})
        if "zqx" not in body or "zqy" not in body:
            raise ReplySyntaxError("the template escapes text in an unknown way")
        written = body[body.index("zqx") : body.rindex("zqy") + 3]
        if written == special:
            return
        for escapes in ("json", "python"):
            self.escapes = escapes
            with suppress(ReplySyntaxError):
                if self._unescape(written) == special:
                    return
        raise ReplySyntaxError("the template escapes text in an unknown way")

    def _learn_scalars(self) -> None:
        for name, value, encodings in (
            ("number", 71.523, ["71.523"]),
            ("boolean", True, ["true", "True"]),
            ("null", None, ["null", "None"]),
        ):
            for encoding in encodings:
                if self._learn_markers({name}, value, [encoding]) is None:
                    continue
                if name == "boolean":
                    self.constants |= {
                        encoding: True,
                        {"true": "false", "True": "False"}[encoding]: False,
                    }
                if name == "null":
                    self.constants[encoding] = None
                break

    def _learn_container(self, name: str, value: Any, numbers: Any) -> None:
        """Learn how a list or an object is written; `numbers`: one that holds numbers alone."""
        encodings: tuple[tuple[Literal["json", "python"], str], ...] = (
            ("json", json.dumps(value)),
            ("json", json.dumps(value, separators=(",", ":"))),
            ("python", repr(value)),
        )
        for notation, encoding in encodings:
            if self._learn_markers({name}, value, [encoding]) is not None:
                self.containers[name] = notation
                return
        markers = self._find_sequence(numbers)
        if markers is not None and self._base is not None:
            self.containers[name] = markers
            self._base.types.add(name)

    def _find_sequence(self, value: Any) -> SequenceMarkers | None:
        """Return what stands around the items of a value in the template's own notation."""
        assert self._base is not None
        closing = min(self._base.closings).replace(KEY_MARK, KEYS[0])
        try:
            body = self._body({KEYS[0]: value})
        except (ReplySyntaxError, ChatError):
            return None
        if not body.startswith(self._base.middle) or not body.endswith(closing):
            return None
        inner = body[len(self._base.middle) : len(body) - len(closing)]
        words = ["zqk", "71003", "zqm", "71004"] if isinstance(value, dict) else ["71003", "71004"]
        places, position = [], 0
        for word in words:
            if (start := inner.find(word, position)) < 0:
                return None
            places.append(start)
            position = start + len(word)
        gaps = [inner[a + len(w) : b] for a, w, b in zip(places, words, places[1:], strict=False)]
        if isinstance(value, dict):
            middle, separator, _ = gaps
            last = "zqm"
        else:
            (separator,) = gaps
            middle, last = "", ""
        closing = inner[position:].replace(last, KEY_MARK) if last else inner[position:]
        if not closing or not separator:
            return None
        return SequenceMarkers(
            inner[: places[0]],
            middle,
            separator.replace("zqk", KEY_MARK) if last else separator,
            closing,
        )

    def _learn_empty(self) -> None:
        self.empty: str | None = None
        try:
            self.empty = self._write({})
        except (ReplySyntaxError, ChatError):
            return

    # Reading, by what was learnt.

    def parse(self, text: str, position: int, schema: dict[str, Any]) -> tuple[Any, int]:
        """Return the arguments at a position, and where they end."""
        openings = [self.lead] if self.empty is None else [self.lead, self.empty]
        opening = next((o for o in _longest_first(openings) if text.startswith(o, position)), None)
        if opening is None:
            raise ReplySyntaxError("the arguments do not begin as the template begins them")
        position += len(opening)
        if opening == self.empty:
            return {}, position
        properties = _properties(schema)
        arguments: dict[str, Any] = {}
        while True:
            key, markers, position = self._read_key(text, position)
            if key in arguments:
                raise ReplySyntaxError(f"the argument `{key}` appears twice")
            separators = [each.replace(KEY_MARK, key) for each in markers.separators]
            closings = [each.replace(KEY_MARK, key) for each in markers.closings]
            ends = _longest_first([*separators, *closings])
            value, position = self._read_value(
                text, position, ends, markers.types, properties.get(key, {})
            )
            arguments[key] = value
            end = next(end for end in ends if text.startswith(end, position))
            position += len(end)
            if end in closings:
                return arguments, position

    def _read_key(self, text: str, position: int) -> tuple[str, EntryMarkers, int]:
        places = [
            (text.find(each.middle, position), -len(each.middle), each) for each in self.markers
        ]
        nearest = min((p for p in places if p[0] >= 0), key=lambda p: p[:2], default=None)
        if nearest is None or nearest[0] == position or "\n" in text[position : nearest[0]]:
            raise ReplySyntaxError("an argument has no name")
        start, length, markers = nearest
        return text[position:start], markers, start - length

    def _read_value(
        self,
        text: str,
        position: int,
        ends: list[str],
        types: Iterable[str],
        schema: dict[str, Any],
    ) -> tuple[Any, int]:
        """Return the value at a position, and where it ends: in front of one of the ends."""
        allowed = schema_types(schema)
        is_bare = "string" in types and not self.quotes[0]
        if not is_bare or allowed - {"string"} or self._is_structured(text, position, allowed):
            literal = self._read_literal(text, position, ends, schema)
            if literal is not None and (
                not is_bare or not allowed or _type_names(literal[0]) & allowed
            ):
                return literal
        if not is_bare:
            raise ReplySyntaxError("an argument has no value")
        return self._read_bare(text, position, ends)

    def _is_structured(self, text: str, position: int, allowed: set[str]) -> bool:
        """Return whether a list or an object in the template's own notation begins there."""
        return not allowed and any(
            text.startswith(form.opening, position)
            for form in self.containers.values()
            if isinstance(form, SequenceMarkers)
        )

    def _read_bare(self, text: str, position: int, ends: list[str]) -> tuple[str, int]:
        places = [place for end in ends if end and (place := text.find(end, position)) >= 0]
        if not places:
            raise ReplySyntaxError("an argument has no end")
        return self._unescape(text[position : min(places)]), min(places)

    def _read_literal(
        self, text: str, position: int, ends: list[str], schema: dict[str, Any]
    ) -> tuple[Any, int] | None:
        """Return a value whose text says its type, and its end; None where none stands there."""
        for read in (self._read_quoted, self._read_container, self._read_scalar, self._read_empty):
            try:
                literal = read(text, position, ends, schema)
            except ReplySyntaxError:
                continue
            if literal is not None and any(text.startswith(end, literal[1]) for end in ends):
                return literal
        return None

    def _read_quoted(
        self, text: str, position: int, ends: list[str], schema: dict[str, Any]
    ) -> tuple[Any, int] | None:
        opening, closing = self.quotes
        if not opening or not text.startswith(opening, position):
            return None
        start = position + len(opening)
        character = "." if self.escapes == "raw" else r"(?:[^\\]|\\.)"
        behind = "|".join(map(re.escape, ends))
        pattern = rf"({character}*?){re.escape(closing)}(?={behind})"
        match = re.compile(pattern, re.DOTALL).match(text, start)
        return None if match is None else (self._unescape(match[1]), match.end())

    def _read_container(
        self, text: str, position: int, ends: list[str], schema: dict[str, Any]
    ) -> tuple[Any, int] | None:
        forms = sorted(
            self.containers.items(),
            key=lambda item: -len(item[1].opening) if isinstance(item[1], SequenceMarkers) else 0,
        )
        for name, form in forms:
            if isinstance(form, SequenceMarkers):
                if text.startswith(form.opening, position):
                    return self._read_sequence(text, position, name, form, ends, schema)
            elif text[position : position + 1] == ("[" if name == "array" else "{"):
                return (read_json if form == "json" else read_python)(text, position)
        return None

    def _read_sequence(
        self,
        text: str,
        position: int,
        name: str,
        form: SequenceMarkers,
        ends: list[str],
        schema: dict[str, Any],
    ) -> tuple[Any, int]:
        """Return a list or an object in the template's own notation, and where it ends."""
        position += len(form.opening)
        items: list[Any] = []
        entries: dict[str, Any] = {}
        if not form.middle and text.startswith(form.closing, position):
            return items, position + len(form.closing)
        while True:
            key = ""
            if name == "object":
                start = text.find(form.middle, position)
                if start <= position:
                    if text.startswith(form.closing, position):
                        return entries, position + len(form.closing)
                    raise ReplySyntaxError("an entry of an object has no name")
                key, position = text[position:start], start + len(form.middle)
            inner = _properties(schema).get(key, {}) if key else schema.get("items", {})
            separator, closing = form.ends(key)
            value, position = self._read_value(
                text, position, [separator, closing], _ALL_TYPES,
                inner if isinstance(inner, dict) else {},
            )  # fmt: skip
            items.append(value)
            entries[key] = value
            # A separator may be the start of a closing with what follows: `</a><` of `</a></b>`.
            closed = position + len(closing)
            is_closed = text.startswith(closing, position) and any(
                text.startswith(end, closed) for end in ends
            )
            if is_closed or not text.startswith(separator, position):
                return (entries if name == "object" else items), closed
            position += len(separator)

    def _read_scalar(
        self, text: str, position: int, ends: list[str], schema: dict[str, Any]
    ) -> tuple[Any, int] | None:
        for constant in _longest_first(self.constants):
            if text.startswith(constant, position):
                return self.constants[constant], position + len(constant)
        match = _NUMBER.match(text, position)
        return None if match is None else (json.loads(match[0]), match.end())

    def _read_empty(
        self, text: str, position: int, ends: list[str], schema: dict[str, Any]
    ) -> tuple[Any, int] | None:
        """Return the list or object that a notation of the template's own writes as nothing."""
        allowed = schema_types(schema)
        for name, empty in (("array", []), ("object", {})):
            if name in allowed and isinstance(self.containers.get(name), SequenceMarkers):
                return empty, position
        return None

    def _unescape(self, text: str) -> str:
        """Return the text that a string stands for."""
        try:
            if self.escapes == "json":
                return str(json.loads(f'"{text}"', strict=False))
            if self.escapes == "python":
                return str(ast.literal_eval(f"{self.quotes[0]}{text}{self.quotes[1]}"))
        except (ValueError, SyntaxError):
            raise ReplySyntaxError("an argument's text is not what the template writes") from None
        return text


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def schema_types(schema: Any) -> set[str]:
    """Return the types that a JSON schema allows; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set()
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else ():
            types |= schema_types(option)
    return types


def _type_names(value: Any) -> set[str]:
    """Return what JSON schemas call the type of a value."""
    if isinstance(value, bool):
        return {"boolean"}
    if value is None:
        return {"null"}
    names = {int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"}}
    return names.get(type(value), {"object"})
