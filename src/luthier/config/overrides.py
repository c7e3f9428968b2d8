"""What was typed: `group=option` and `key=value`, made ready for Hydra, and named for a folder."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from luthier.config.schema import GROUPS
from luthier.errors import Mistake

_LONGEST_NAME = 80
_SAME_RUN = {"output_dir", "dry_run", "overwrite", "tracker", "recipe", "hydra"}
"""Keys that do not change what is trained, and so not the name of the run."""

_SWEEP_SETTINGS = ("hydra.sweeper.", "hydra.launcher.")
"""Settings that luthier checks, as it does its own."""


@dataclass(frozen=True)
class Typed:
    """One override as typed: `line` whole, its bare `key`, and what it stands for."""

    line: str
    key: str
    value: object
    is_group: bool
    is_delete: bool
    is_plain: bool

    @property
    def for_hydra(self) -> str:
        """Return the line with `++` for a plain key: the schema, not Hydra, knows which exist."""
        return f"++{self.line}" if self.is_plain and not self.is_group else self.line


def parse(lines: Iterable[str]) -> tuple[list[Typed], list[Mistake]]:
    """Read the command line's overrides; one that cannot be read becomes a mistake."""
    parser = OverridesParser.create()
    typed, mistakes = [], []
    for line in lines:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            mistakes.append(Mistake(line, _unreadable(line, str(error))))
            continue
        if override.is_sweep_override():
            mistakes.append(_sweep(override, line))
        else:
            typed.append(_typed(override, line))
    return typed, mistakes


def _typed(override: Override, line: str) -> Typed:
    key, value = override.get_key_element().lstrip("+~"), override.value()
    named = key in (*GROUPS, "recipe") or "/" in key or "@" in key
    bare = not (override.is_add() or override.is_force_add() or override.is_delete())
    known_to_hydra = override.is_hydra_override() and not key.startswith(_SWEEP_SETTINGS)
    return Typed(
        line=line,
        key=key,
        value=value,
        is_group=named and not isinstance(value, dict),
        is_delete=override.is_delete(),
        is_plain=bare and not known_to_hydra,
    )


def _unreadable(line: str, error: str) -> str:
    if line.startswith("--"):
        return "no such flag. `--help` lists the flags; settings are written key=value."
    if "=" not in line and not line.startswith("~"):
        return f"not key=value. Write a setting as {line}=VALUE."
    if line.partition("=")[2] == "":
        return "has no value; for an empty text write KEY='\"\"', for nothing KEY=null."
    first = error.strip().splitlines()[0]
    return (
        f"cannot be read ({first}). Put a value with special characters in quotes: KEY='\"...\"'."
    )


def _sweep(override: Override, line: str) -> Mistake:
    key = override.key_or_group
    return Mistake(
        key,
        f"{line.partition('=')[2]} is several values, and one run takes one. For a list write "
        f"{key}=[a,b]; for text with commas {key}='\"a,b\"'; to try each, add -m.",
    )


def run_name(overrides: Iterable[str]) -> str:
    """Return the run folder's name for these overrides: safe in any file system, and never random.

    `default` without overrides; a name that had to be changed or cut ends in 8 hex digits of the
    overrides' hash, so that two different runs never share a folder.
    """
    kept = [line.lstrip("+") for line in overrides if _changes_the_run(line)]
    if not kept:
        return "default"
    safe = "+".join(re.sub(r"[^A-Za-z0-9._=-]+", "-", line) for line in kept)
    if safe == "+".join(kept) and len(safe) <= _LONGEST_NAME:
        return safe
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]
    return f"{safe[: _LONGEST_NAME - 9]}-{digest}"


def run_folder(recipe: str | None, overrides: Iterable[str]) -> str:
    """Return the folder of a run that names none: `runs/<recipe>/<name of its overrides>`."""
    return f"runs/{recipe or 'custom'}/{run_name(overrides)}"


def _changes_the_run(line: str) -> bool:
    key = re.split(r"[=@]", line.lstrip("+~"), maxsplit=1)[0]
    return re.split(r"[./]", key, maxsplit=1)[0] not in _SAME_RUN
