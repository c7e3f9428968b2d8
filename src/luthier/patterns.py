"""Regular expressions that users write, searched for with a limit on the time.

Filters of datasets and metrics of replies run a user's pattern over texts that nobody has seen.
`re` tries some patterns on some texts for years, as `(a|aa)+$` on many `a` and a `b`, and nothing
can stop it. So patterns of `re` are compiled and searched by the library `regex`, which takes a
time limit.
"""

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

SEARCH_SECONDS = 2.0
"""Processor time that one search may take."""
NAMES_SECONDS = 10.0
"""Seconds that a search through all names of a model may take."""
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

    # `re` says what a pattern is: `regex` reads more than it, and some of it as something else.
    check_syntax(pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            translated, steps = _translate_pattern(pattern)
            if steps > MAX_PATTERN_STEPS:
                raise ValueError(
                    f"is too large: its repeats, written out, make more than {MAX_PATTERN_STEPS} "
                    "steps"
                )
            return regex.compile(translated)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


def check_syntax(pattern: str) -> None:
    """Raise ValueError, whose text is a predicate, for what is no pattern of `re`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about `[[`, which may mean something else one day
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


_MATCH_NAMES = """\
import json, re, sys
pattern, names, method = json.load(sys.stdin)
find = getattr(re.compile(pattern), method)
json.dump([name for name in names if find(name)], sys.stdout)
"""


def match_names(
    pattern: str, names: Iterable[str], method: Literal["search", "match", "fullmatch"]
) -> list[str]:
    """Return the names in which `re` finds a pattern, by its method of that name.

    For patterns that libraries search with `re` afterwards (peft, in the names of layers): where
    this has ended, they end. Raises ValueError for what is no pattern, and TimeoutError where it
    takes longer than `NAMES_SECONDS`.
    """
    check_syntax(pattern)
    names = list(names)
    if sum(map(pattern.count, "*+{?|")) < 2:
        find = getattr(re.compile(pattern), method)
        return [name for name in names if find(name)]
    # With two repeats or alternatives it may take years, and only the end of its process stops it.
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_NAMES], capture_output=True, check=True,
            input=json.dumps([pattern, names, method]), text=True, timeout=NAMES_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"takes more than {NAMES_SECONDS:g} seconds to be looked for in the names of a model. "
            f"{SLOW_ADVICE}"
        ) from None
    matching: list[str] = json.loads(done.stdout)
    return matching


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
