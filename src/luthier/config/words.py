"""Mistakes in the user's words: where, what is wrong, what is nearest, what to do."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

_CLOSE = 0.6
_LONG_LIST = 12


@dataclass(frozen=True)
class Mistake:
    """One thing to mend: the key it is about and a sentence."""

    key: str
    text: str


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option that looks or begins most like the word; None if none comes close."""
    scored = [(_likeness(word, option), option) for option in sorted(options)]
    score, option = max(scored, default=(0.0, ""), key=lambda pair: pair[0])
    return option if score >= _CLOSE else None


def _likeness(word: str, option: str) -> float:
    whole = difflib.SequenceMatcher(None, word, option).ratio()
    start = difflib.SequenceMatcher(None, word, option[: len(word)]).ratio()
    return max(whole, start - 0.1)  # a whole that is alike counts more than a beginning


def choice(word: str, options: Iterable[str]) -> str:
    """Return the sentences that follow `'word' is not one of them`: the nearest, then the list."""
    options = sorted(options)
    close = nearest(word, options)
    if close and len(options) > _LONG_LIST:
        return f"Did you mean {close}?"
    guess = f"Did you mean {close}? " if close else ""
    return f"{guess}Options: {', '.join(options) or 'none'}."


def value(given: object) -> str:
    """Return a value as YAML would show it, text in quotes."""
    if given is None or isinstance(given, bool):
        return {None: "null", True: "true", False: "false"}[given]
    shown = repr(given)
    return shown if len(shown) <= 60 else shown[:57] + "..."
