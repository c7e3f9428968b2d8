"""Traced text behaves as `str` does, and its runs point at the characters they were copied from."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.chat.provenance import FieldOrigin, TracedStr, concat_strings, runs_of, trace_field

LETTERS = st.text("ab \n<x>é", max_size=12)
OPERATIONS = {
    "strip": lambda s, o: s.strip(),
    "strip letters": lambda s, o: s.strip("ab"),
    "lstrip": lambda s, o: s.lstrip("\n"),
    "rstrip": lambda s, o: s.rstrip(),
    "add": lambda s, o: s + o,
    "add to": lambda s, o: o + s,
    "plain add": lambda s, o: "<" + s + ">",
    "twice": lambda s, o: s * 2,
    "slice": lambda s, o: s[1:-2],
    "backwards": lambda s, o: s[::-1],
    "split": lambda s, o: "|".join(map(str, s.split())),
    "split at": lambda s, o: s.split("a")[-1],
    "split once": lambda s, o: s.split(None, 1)[-1] if s.strip() else "",
    "rsplit": lambda s, o: s.rsplit(" ", 1)[0],
    "rsplit once": lambda s, o: s.rsplit(None, 1)[0] if s.strip() else "",
    "lines": lambda s, o: (s.splitlines() or [""])[0],
    "whole lines": lambda s, o: (s.splitlines(True) or [""])[-1],
    "partition": lambda s, o: s.partition("b")[2],
    "rpartition": lambda s, o: s.rpartition("b")[2],
    "replace": lambda s, o: s.replace("a", "bb"),
    "replace by": lambda s, o: s.replace(" ", o, 1),
    "replace nothing": lambda s, o: s.replace("", "-"),
    "join": lambda s, o: s.join([o, "x", s]),
    "upper": lambda s, o: s.upper(),
    "title": lambda s, o: s.title(),
    "prefix": lambda s, o: s.removeprefix("a"),
    "suffix": lambda s, o: s.removesuffix("\n"),
    "center": lambda s, o: s.center(20),
    "letters": lambda s, o: "".join(map(str, s)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(LETTERS, LETTERS)
def test_equals_str(name, first, second):
    operation = OPERATIONS[name]
    one, two = (
        FieldOrigin(0, "user", "content", first),
        FieldOrigin(1, "assistant", "content", second),
    )
    result = operation(trace_field(one, first), trace_field(two, second))
    assert result == operation(first, second)
    position = 0
    for length, origin, start in runs_of(result):
        piece = str.__str__(result)[position : position + length]
        position += length
        if origin is not None and start >= 0:
            assert piece.lower() == origin.text[start : start + length].lower()
    assert position == len(result) or not isinstance(result, TracedStr)


def test_plain_text_stays_plain():
    assert type(concat_strings(("a", "b"))) is str
