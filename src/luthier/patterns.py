"""Regular expressions that users write, searched for with a limit on the time.

Filters of datasets and metrics of replies run a user's pattern over texts that nobody has seen.
`re` tries some patterns on some texts for years, as `(a|aa)+$` on many `a` and a `b`, and nothing
can stop it. So patterns of `re` are compiled and searched by the library `regex`, which takes a
time limit.
"""

import re
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

SEARCH_SECONDS = 2.0
"""Processor time that one search may take."""
MAX_PATTERN_STEPS = 250_000
"""Steps of a pattern whose repeats are written out; `regex` takes about 1 KB for each."""
SLOW_ADVICE = (
    "Its repeats can divide a text in very many ways, as (a|aa)+$ does: write the pattern so that "
    "there is one way only, such as a+$."
)
"""What a user can do about a search that took too long."""


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> Any:
    """Return a pattern of `re` as a `regex.Pattern`; use `search` and `find_all` with it.

    Raises ValueError for what is not a pattern of `re` and for one that would fill the memory; its
    text is a predicate, such as `is no regular expression: ...`.
    """
    import regex  # It takes 40 ms to import, and few runs search.

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about `[[`, which may mean something else one day
            # `re` says what a pattern is: `regex` reads more than it, and some of it as something
            # else.
            re.compile(pattern)
            translated, steps = _translate_pattern(pattern)
            if steps > MAX_PATTERN_STEPS:
                raise ValueError(
                    f"is too large: its repeats, written out, make more than {MAX_PATTERN_STEPS} "
                    "steps"
                )
            return regex.compile(translated)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


def search(pattern: Any, text: str) -> Any:
    """Return the first match of a compiled pattern, or None; TimeoutError past the limit."""
    return _with_limit(lambda seconds: pattern.search(text, timeout=seconds))


def find_all(pattern: Any, text: str) -> list[Any]:
    """Return all matches of a compiled pattern in order; TimeoutError past the limit for all."""
    matches: list[Any] = _with_limit(lambda seconds: list(pattern.finditer(text, timeout=seconds)))
    return matches


def _with_limit(run_search: Callable[[float], Any]) -> Any:
    """Return what a search gives that takes its limit in seconds."""
    start = time.thread_time()
    while True:
        try:
            return run_search(SEARCH_SECONDS)
        except TimeoutError:
            # regex 2026.11 counts the processor time of all threads, and others may be encoding:
            # a search that had less than the limit for itself starts again.
            if time.thread_time() - start >= SEARCH_SECONDS:
                raise


_PATTERN_TOKENS = re.compile(
    r"""
    \\N\{[^}]*\} | \\.                              # an escape
    | \[ \^? \]? (?: \\. | [^\]\\] )* \]            # a set
    | (?P<repeat> \+ | \{ (?P<copies> \d* ) ,? \d* \} )
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


def _translate_pattern(pattern: str) -> tuple[str, int]:
    """Return a valid pattern of `re` as one of `regex`, and its steps with repeats written out.

    Works around two traits of regex 2026.11: it takes a brace that is no repeat for its own fuzzy
    matching (`x_{i}` also matches `x_` and `x_b`), and it copies what stands before `+` or `{n}`,
    so that memory runs out at `(?:a{5000}){5000}`.
    """
    translated = []
    groups = [0]  # the steps of each group that is open
    last = 0  # the steps of what a repeat would repeat
    for token in _PATTERN_TOKENS.finditer(pattern):
        text = token[0]
        translated.append("\\{" if text == "{" else text)
        if token["repeat"]:
            groups[-1] += last * int(token["copies"] or 0 if text[0] == "{" else 1)
        elif text == "(":
            groups.append(0)
        elif text == ")" and len(groups) > 1:  # A comment may hold any.
            last = groups.pop() + 1
            groups[-1] += last
        else:
            last = 1
            groups[-1] += 1
    return "".join(translated), sum(groups)
