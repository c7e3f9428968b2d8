"""Patterns of users: searched as `re` searches, but never for longer than the limit."""

import re
import time

import pytest

from luthier import patterns


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\d+", "a12b3"),
        (r"x_{i}", "x_{i} x_b x_"),
        (r"a{2}", "aaaa a"),
        (r"a{,2}b", "aab b"),
        (r"(?P<word>[{}]+)", "a{}b"),
        (r"\{(.*?)\}", "{a}{b}"),
        (r"(?i)straße", "STRASSE Straße"),
        (r"^b", "a\nb"),
        (r"(?m)^b", "a\nb"),
        (r"(?:ab)+?c|", "ababc"),
        (r"", "ab"),
    ],
)  # fmt: skip
def test_matches_are_those_of_re(pattern, text):
    compiled = patterns.compile_pattern(pattern)
    first = re.search(pattern, text)
    match = patterns.search(compiled, text)
    assert (match and match.span()) == (first and first.span())
    spans = [match.span() for match in re.finditer(pattern, text)]
    assert [match.span() for match in patterns.find_all(compiled, text)] == spans


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "is no regular expression: missing )"),
        (r"\p{L}", "is no regular expression: bad escape"),
        ("(?:a{5000}){5000}", "is too large: its repeats, written out, make more than 250000"),
        ("(" * 200 + "a" + ")+" * 200, "is too large"),
        ("(" * 5000 + ")" * 5000, "is no regular expression"),
    ],
    ids=["open", "of another library", "large", "large by nesting", "deep"],
)
def test_what_is_no_pattern(pattern, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        patterns.compile_pattern(pattern)


@pytest.mark.parametrize("run_search", [patterns.search, patterns.find_all])
def test_a_search_that_would_take_years_ends(run_search, monkeypatch):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.1)
    compiled = patterns.compile_pattern("(a|aa)+$")
    began = time.thread_time()
    with pytest.raises(TimeoutError):
        run_search(compiled, "a" * 60 + "b")
    assert time.thread_time() - began < 5
