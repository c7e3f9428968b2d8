"""Filters of a template that keep the origin of every character, and stay within bounds."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from markupsafe import Markup, escape

from luthier.chat.bounds import WIDENING_FILTERS, refuse_format, refuse_width
from luthier.chat.text import SafeText, Text, blurred, escaped, plus, safe, texts_in
from luthier.chat.watched import Turns

_HOLDERS = re.compile("\ue1a0([0-9]+)\ue1a1")


def retraced(function: Callable[..., Any], result: str, args: tuple, kwargs: dict) -> str:
    """Give back `result = function(*args, **kwargs)` with the runs of the texts in its arguments.

    The function runs a second time with a placeholder for each text. Where that gives the same
    string with the texts put in the places of the placeholders, the runs are exact; elsewhere the
    whole result counts as made from all of them.
    """
    texts = list(texts_in([args, kwargs]))
    if not texts:
        return result
    try:
        numbers = itertools.count()
        trial = function(*_holding(args, numbers), **_holding(kwargs, numbers))
    except Exception:  # the function may refuse a placeholder for any reason of its own
        return blurred(result, texts)
    pieces = _HOLDERS.split(trial) if isinstance(trial, str) else []
    parts = [texts[int(piece)] if odd % 2 else piece for odd, piece in enumerate(pieces)]
    whole = plus(parts)
    return whole if str.__eq__(whole, result) is True else blurred(result, texts)


def _holding(value: Any, numbers: Iterable[int]) -> Any:
    """The same containers, with a numbered placeholder for each traced text."""
    if type(value) is Text:
        return f"\ue1a0{next(iter(numbers))}\ue1a1"
    if isinstance(value, dict):
        return {_holding(key, numbers): _holding(item, numbers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_holding(item, numbers) for item in value)
    return value


def traced_filter(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, keeping the runs of the texts that it is given."""

    @functools.wraps(filter_)
    def traced(*args: Any, **kwargs: Any) -> Any:
        result = filter_(*args, **kwargs)
        if (
            isinstance(result, str)
            and not isinstance(result, Text)
            and any(texts_in([args, kwargs]))
        ):
            return retraced(filter_, str.__str__(result), args, kwargs)
        return result

    return traced


def bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which refuses to make values too large to hold."""

    @functools.wraps(filter_)
    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if name in WIDENING_FILTERS:
            refuse_width(name, value if isinstance(value, str) else "", given)
        else:
            refuse_format(str(value), given)
        return filter_(value, *args, **kwargs)

    return bounded


def traced_tojson(tojson: Callable[..., str]) -> Callable[..., str]:
    """JSON of traced values: all of it, brackets too, was made from the fields inside."""

    @functools.wraps(tojson)
    def traced(value: Any, *args: Any, **kwargs: Any) -> str:
        value = list(value) if isinstance(value, Turns) else value
        texts = list(texts_in(value))
        result = tojson(value, *args, **kwargs)
        return blurred(result, texts) if texts else result

    return traced


def traced_safe(value: Any) -> Any:
    """The value marked as safe, so that nothing escapes it."""
    return safe(value) if isinstance(value, Text) else Markup(value)


def traced_escape(value: Any) -> Any:
    """The value as HTML writes it, marked as safe."""
    if not isinstance(value, Text) or isinstance(value, SafeText):
        return escape(value)
    whole = escaped(value)
    return safe(whole) if isinstance(whole, Text) else Markup(whole)


def traced_join_filter(
    context: Any, value: Iterable[Any], d: str = "", attribute: Any = None
) -> str:
    """Join what is in an iterable, keeping the runs of every item."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    parts = [part for item in value for part in (d, str(item))]
    return plus(parts[1:])
