"""Composes an ordinary config without Hydra, whose import and defaults tree take most of the time.

An ordinary config is made of options that have no defaults lists of their own, recipes that inherit
recipes and choose options, and typed settings, without interpolations but `${luthier:FOLDER}`.
`compose_directly` returns None for anything else, and Hydra composes.
`tests/config/test_direct_compose.py` compares both on every recipe and option.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from luthier.config.recipes import RecipeChain, bundled_folder, list_options
from luthier.config.schema import GROUPS
from luthier.storage.typed_files import parse_config_yaml

_HEADER = re.compile(r"# @package[ \t]+(\S+)")
_BUNDLED = re.compile(r"\$\{luthier:(\w+)\}")
_CHOICE = re.compile(r"override +/(\w+)")
MISSING = "???"


class DirectConfig(NamedTuple):
    """A config as plain values without interpolations, and the option of each group."""

    values: dict[str, Any]
    choices: dict[str, str | None]


class _NotOrdinaryError(ValueError):
    """Only Hydra can say what a config means, or what is wrong with it."""


class ConfigFile(NamedTuple):
    """One YAML file: its values, its defaults list, and where its values go (`# @package`)."""

    values: dict[str, Any]
    defaults: list[Any] | None
    package: str | None


def compose_directly(
    options: Mapping[str, str | None],
    settings: Iterable[tuple[str, Any]],
    chain: RecipeChain,
    config_name: str,
) -> DirectConfig | None:
    """Return the config that Hydra would compose; None where only Hydra can compose it.

    `options` are the options typed for groups, `settings` the typed keys with their values, in
    order.
    """
    try:
        root = _read(bundled_folder("conf") / f"{config_name}.yaml")
        choices = _choose(root, options, chain)
        values = {key: value for key, value in root.values.items() if key != "hydra"}
        for group in (*GROUPS[:-1], "recipe", GROUPS[-1]):
            option = choices.get(group)
            if group == "recipe":
                if chain.files:
                    _merge_recipe(values, next(iter(chain.files)), chain, set())
            elif option is not None:
                _merge_option(values, group, option)
        for key, value in settings:
            set_value(values, key, value)
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return None
    values.pop("hydra", None)  # of a recipe for a sweep, which one run does not read
    return DirectConfig(values, choices)


def _choose(
    root: ConfigFile, typed: Mapping[str, str | None], chain: RecipeChain
) -> dict[str, str | None]:
    """Return the option of each group: typed, or of the first recipe that chooses one."""
    choices: dict[str, str | None] = {**typed}
    for path in chain.files.values():
        for entry in _read(path).defaults or []:
            if isinstance(entry, dict):
                ((key, option),) = entry.items()
                match = _CHOICE.fullmatch(str(key))
                if match is None or match[1] not in GROUPS or not isinstance(option, str):
                    raise _NotOrdinaryError
                choices.setdefault(match[1], option)
    for entry in root.defaults or []:
        for key, option in entry.items() if isinstance(entry, dict) else []:
            if key in (*GROUPS, "recipe"):
                choices.setdefault(key, option)
    return choices


def _merge_option(values: dict[str, Any], group: str, option: str) -> None:
    path = list_options(group).get(option)
    if path is None:
        raise _NotOrdinaryError
    file = _read(path)
    if file.defaults is not None or file.package not in (None, "_global_"):
        raise _NotOrdinaryError
    _merge(values, file.values if file.package else {group: file.values})


def _merge_recipe(values: dict[str, Any], name: str, chain: RecipeChain, merged: set[str]) -> None:
    """Merge what a recipe inherits, then its own values: in the order of its defaults list."""
    if name in merged or name not in chain.files:
        raise _NotOrdinaryError
    merged.add(name)
    file = _read(chain.files[name])
    if file.package not in (None, "_global_"):
        raise _NotOrdinaryError
    entries = [entry for entry in file.defaults or [] if isinstance(entry, str)]
    dropped = chain.dropped[name]
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            _merge(values, {key: v for key, v in file.values.items() if key not in dropped})
        else:
            _merge_recipe(values, entry.removeprefix("/recipe/"), chain, merged)


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """Put the values of one file over those of others, as OmegaConf does."""
    for key, value in over.items():
        if not isinstance(key, str):
            raise _NotOrdinaryError
        old = values.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif value == MISSING and key in values:
            raise _NotOrdinaryError
        elif isinstance(value, dict):
            if old is not None and old != MISSING:
                raise _NotOrdinaryError
            values[key] = {}
            _merge(values[key], value)
        elif isinstance(old, dict) and value is not None:
            raise _NotOrdinaryError
        else:
            values[key] = value


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; raises ValueError where something else than a group is in its way."""
    *groups, name = key.split(".")
    if not all((*groups, name)):
        raise _NotOrdinaryError
    node: Any = values
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            raise _NotOrdinaryError
    _merge(node, {name: value})


def _read(path: Path) -> ConfigFile:
    """Read a YAML file; raises an error where it is not an ordinary one."""
    text = path.read_text(encoding="utf-8")
    if "${" in text:
        text = _BUNDLED.sub(lambda match: str(bundled_folder(match[1])), text)
    if "${" in text:
        raise _NotOrdinaryError
    values = parse_config_yaml(text)
    if not isinstance(values, dict):
        raise _NotOrdinaryError
    defaults = values.pop("defaults", None)
    if not isinstance(defaults, list | None):
        raise _NotOrdinaryError
    header = [line for line in text.splitlines() if line.startswith("# @package")]
    match = _HEADER.fullmatch(header[0].rstrip()) if header else None
    if len(header) > 1 or (header and match is None):
        raise _NotOrdinaryError
    return ConfigFile(values, defaults, match[1] if match else None)
