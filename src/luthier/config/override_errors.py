"""Overrides that Hydra's grammar does not take: what is at fault, and what to type instead.

A path with characters of that grammar means itself: `output_dir=runs/mine/lora.r=8` needs no
quotes.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from shlex import quote
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from luthier.config.recipes import WRONG_INTERPOLATION
from luthier.errors import format_for_hydra, format_override

_PATH_KEY = re.compile(r"\+{0,2}(\w+\.)*(output_dir|path|cache|template|tokenizer|teacher)")
_KEY = re.compile(r"[+~]{0,2}[\w.@/:$-]+", re.ASCII)
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


def parse_override(parser: OverridesParser, line: str) -> Override:
    """Read one override; a path that the grammar does not take is read as it stands.

    Raises HydraException for anything else that cannot be read.
    """
    try:
        return parser.parse_override(line)
    except HydraException:
        literal = quote_path(line)
        if literal == line:
            raise
        return parser.parse_override(literal)


def quote_path(line: str) -> str:
    """Return an override of a path with its value in quotes; any other one as it is."""
    key, _, value = line.partition("=")
    if not value or not _PATH_KEY.fullmatch(key) or value[0] in "\"'" or "${" in value:
        return line
    if isinstance(_read_yaml(value), list):
        return line
    return f"{key}={format_for_hydra(value)}"


def is_cut_off(line: str, following: Sequence[str]) -> bool:
    """Return whether the value of an override stands in the next word, behind a space."""
    is_word = bool(following) and not re.match(r"-|~|[\w.@/+]+=", following[0])
    return line.endswith("=") and line.count("=") == 1 and is_word


def explain_unreadable(line: str, following: Sequence[str] = ()) -> tuple[str, int]:
    """Return what is wrong with an override that cannot be read, and what to type.

    `following` are the words behind it; the number says how many of them belong to it, because the
    shell has cut them off at a space.
    """
    key, equals, value = line.partition("=")
    if line.startswith("--"):
        return "no such flag. `--help` lists the flags; settings are written key=value.", 0
    if not equals:
        return _explain_no_value(line, following)
    if value == "":
        return _explain_empty(key, following)
    if not _KEY.fullmatch(key):
        return f"{key!r} is not the name of a setting: those have letters, digits, _ and dots.", 0
    joined = _join_words(line, following)
    if joined is not None:
        text, count = joined
        return f"the shell cut it at a space. Put the whole in quotes: {quote(text)}", count
    if "${" in value:
        return f"{WRONG_INTERPOLATION}.", 0
    return f"{_find_fault(value)} Write {_suggest(key, value)}.", 0


def _explain_no_value(line: str, following: Sequence[str]) -> tuple[str, int]:
    """Return the words for a word without `=`."""
    if following and following[0].startswith("=") and _KEY.fullmatch(line):
        value = "".join(following[:2])[1:] if following[0] == "=" else following[0][1:]
        count = 2 if following[0] == "=" and len(following) > 1 else 1
        return f"write it without spaces around `=`: {_suggest(line, value)}.", count
    if following and "=" not in following[0] and following[0][:1] not in ("", "-", "~"):
        return f"write it with `=`: {_suggest(line, following[0])}.", 1
    return f"not key=value. Write a setting as {line}=VALUE.", 0


def _explain_empty(key: str, following: Sequence[str]) -> tuple[str, int]:
    """Return the words for a setting with nothing behind its `=`."""
    if is_cut_off(f"{key}=", following):
        return f"write it without a space behind `=`: {_suggest(key, following[0])}.", 1
    empty = format_override(key, "")
    return f"has no value; for an empty text write {empty}, for nothing {key}=null.", 0


def _join_words(line: str, following: Sequence[str]) -> tuple[str, int] | None:
    """Return the override with the words that the shell cut off, and how many those are."""
    parser = OverridesParser.create()
    if not _open_brackets(line):
        return None
    for count in range(1, len(following) + 1):
        text = " ".join([line, *following[:count]])
        try:
            parser.parse_override(text)
        except HydraException:
            continue
        return text, count
    return None


def _find_fault(value: str) -> str:
    """Return a sentence on the first character that the grammar stumbles over."""
    if value[0] in "\"'":
        return f"a quote, {value[0]}, is opened and not closed, or text stands behind it."
    if value.startswith(("[", "{")):
        opened = _open_brackets(value)
        problem = "is opened and not closed" if opened else "begins what cannot be read"
        return f"{opened[-1] if opened else value[0]} {problem}."
    if opened := _open_brackets(value):
        return f"{opened[-1]} is opened and not closed, and as text it needs quotes."
    odd = re.search(r"[^\w\s/\\+.$%*@?|:,-]", value)
    return f"{odd[0]} in a value needs quotes." if odd else "its value cannot be read as it is."


def _open_brackets(text: str) -> list[str]:
    """Return the brackets that nothing closes, from the outermost."""
    opened = list[str]()
    for character in text:
        if character in _BRACKETS:
            opened.append(character)
        elif opened and character == _BRACKETS[opened[-1]]:
            opened.pop()
    return opened


def _suggest(key: str, value: str) -> str:
    """Return what to type: the value as it is, as the list or mapping that it nearly is, or as
    text."""
    closing = "".join(_BRACKETS[bracket] for bracket in reversed(_open_brackets(value)))
    candidates = [value, value.lstrip("="), f"{value}{closing}"]
    parser = OverridesParser.create()
    for candidate in candidates:
        if candidate.startswith(("[", "{")) or candidate in (value, value.lstrip("=")):
            with suppress(HydraException):
                parser.parse_override(f"{key}={candidate}")
                return quote(f"{key}={candidate}")
    if value.startswith(("[", "{")):
        content = _read_yaml(value) or _read_yaml(f"{value}{closing}")
        form = "[a, b]" if value[0] == "[" else "{name: value}"
        return format_override(key, content) if content else f"{quote(f'{key}={form}')}, say"
    return format_override(key, value.strip("\"'") if value[:1] in ("'", '"') else value)


def _read_yaml(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return the list or mapping that a text is in YAML, which takes more characters as text."""
    with suppress(yaml.YAMLError, ValueError):
        content = yaml.safe_load(text)
        return content if isinstance(content, list | dict) else None
    return None
