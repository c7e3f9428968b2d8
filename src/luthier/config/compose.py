"""From what was typed to one plain mapping: composed by Hydra or as Hydra does, resolved once.

Hydra takes 0.2 seconds to import and to compose, so it is imported only where a config is more than
`luthier.config.direct_compose` composes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

import yaml

from luthier.config import env_references, recipes
from luthier.config.cross_checks import HELD_OUT_KEYS
from luthier.config.direct_compose import DirectConfig, compose_directly, set_value
from luthier.config.recipes import (
    WRONG_INTERPOLATION,
    RecipeChain,
    check_option,
    explain_yaml_error,
    list_options,
    read_recipe_chain,
)
from luthier.config.run_names import run_folder
from luthier.config.schema import GROUPS, SWEEP_GROUPS
from luthier.errors import Mistake, format_override

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

# What was typed: `group=option` and `key=value`, made ready for Hydra.

_SWEEP_SETTINGS = ("hydra.sweeper.", "hydra.launcher.")
"""Settings that luthier checks, as it does its own."""


@dataclass(frozen=True)
class TypedOverride:
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


def parse_overrides(lines: Iterable[str]) -> tuple[list[TypedOverride], list[Mistake]]:
    """Read the command line's overrides; one that cannot be read becomes a mistake."""
    typed, mistakes = list[TypedOverride](), list[Mistake]()
    words = list(lines)
    while words:
        line = words.pop(0)
        if simple := _read_simple(line):
            typed.append(simple)
        else:
            cut_words = _read_with_hydra(line, words, typed, mistakes)
            del words[:cut_words]
    return typed, mistakes


_SIMPLE = re.compile(r"(?!hydra)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=([^\s=]+|\[[^=]*\])", re.ASCII)
_SIMPLE_VALUE = re.compile(
    r"(-?(?:0|[1-9][0-9]*))|(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    r"|((?!(?:nan|inf)\Z)(?:[a-z_]|\.{0,2}/)[\w./-]*)",
    re.ASCII | re.IGNORECASE,
)
_CONSTANTS = {"true": True, "false": False, "null": None}


def _read_simple(line: str) -> TypedOverride | None:
    """Return an override whose value is a number, a constant, a word without quotes, or a list.

    That is most of them, and Hydra's parser takes longer to import than all of them to read. None
    for any other override.
    """
    match = _SIMPLE.fullmatch(line)
    if match is None:
        return None
    key, text = match.groups()
    value: object
    try:
        if text.startswith("[") and text.endswith("]"):
            value = [_read_simple_value(part.strip(" ")) for part in text[1:-1].split(",")]
        else:
            value = _read_simple_value(text)
    except ValueError:
        return None
    is_group = key in (*GROUPS, "recipe")
    return (
        None
        if is_group and isinstance(value, list)
        else TypedOverride(line, key, value, is_group, False, True)
    )


def _read_simple_value(text: str) -> object:
    match = _SIMPLE_VALUE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    whole, number, word = match.groups()
    if whole or number:
        return int(whole) if whole else float(number)
    return _CONSTANTS.get(word.lower(), word)


def _read_with_hydra(
    line: str, following: list[str], typed: list[TypedOverride], mistakes: list[Mistake]
) -> int:
    """Read an override by Hydra's grammar; return how many words behind it belong to it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from luthier.config.override_errors import explain_unreadable, is_cut_off, parse_override

    parser = OverridesParser.create()
    try:
        override = None if is_cut_off(line, following) else parse_override(parser, line)
    except HydraException:
        override = None
    if override is None and line in list_options("recipe"):
        mistakes.append(Mistake("recipe", f"{line} is a recipe. Write recipe={line}."))
        return 0
    if override is None or not override.key_or_group:
        text, cut_words = explain_unreadable(line, following)
        mistakes.append(Mistake(line.partition("=")[0] or line, text))
        return cut_words
    if override.is_sweep_override():
        mistakes.append(_sweep(override, line))
    else:
        # What Hydra has read is what it reads again, when it composes.
        typed.append(_typed(override, override.input_line or line))
    return 0


def _typed(override: "Override", line: str) -> TypedOverride:
    key, value = override.get_key_element().lstrip("+~"), override.value()
    named = key in (*GROUPS, "recipe") or "/" in key or "@" in key
    bare = not (override.is_add() or override.is_force_add() or override.is_delete())
    known_to_hydra = override.is_hydra_override() and not key.startswith(_SWEEP_SETTINGS)
    return TypedOverride(
        line=line,
        key=key,
        value=value,
        is_group=named and not isinstance(value, dict),
        is_delete=override.is_delete(),
        is_plain=bare and not known_to_hydra,
    )


def _sweep(override: "Override", line: str) -> Mistake:
    key, value = override.key_or_group, line.partition("=")[2]
    as_list = f" For a list write {quote(f'{key}=[{value}]')}." if "(" not in value else ""
    return Mistake(
        key,
        f"{value} is several values, and one run takes one. To try each, add -m.{as_list} As text "
        f"write {format_override(key, value)}.",
    )


CONFIG_NAME = "config"
_PATIENCE = 100
"""Interpolations that may fail before the rest are left for the next try."""


@dataclass
class ComposedConfig:
    """A composed config with what is wrong so far.

    `unsure` are the groups of which nothing more can be said: their own choice is a mistake.
    """

    config: "DictConfig | None"
    """What Hydra composed; None where `values` are the config."""
    lines: list[str]
    chain: RecipeChain
    mistakes: list[Mistake] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)
    choices: dict[str, str | None] = field(default_factory=dict)
    """The option of each group."""
    values: dict[str, Any] | None = None
    """The config as plain values without interpolations; None where Hydra composed it."""

    @property
    def keys_typed(self) -> set[str]:
        """Return the keys of the command line, of readable and unreadable overrides alike."""
        return {line.lstrip("+~").partition("=")[0] for line in self.lines}

    def files(self) -> list[tuple[str, Path]]:
        """Return the YAML files behind the config with the key each begins at, last word first."""
        files = [("", path) for path in self.chain.files.values()]
        for group in GROUPS:
            path = list_options(group).get(str(self.choices.get(group)))
            files += [("" if group == "debug" else group, path)] if path else []
        return [*files, ("", recipes.bundled_folder("conf") / f"{CONFIG_NAME}.yaml")]


def check_overrides(
    lines: list[str],
) -> tuple[list[TypedOverride], RecipeChain, list[Mistake], set[str]]:
    """Check what Hydra would stumble over: unreadable overrides, unknown options, bad recipes."""
    typed, mistakes = parse_overrides(lines)
    unsure: set[str] = set()
    good = []
    for override in typed:
        wrong = _wrong_option(override)
        mistakes += [wrong] if wrong else []
        unsure |= {override.key} if wrong else set()
        good += [] if wrong or (override.key == "recipe" and override.value is None) else [override]
    chain = _chain(good)
    if chain.mistakes:
        unsure.add("recipe")
        good = [
            override for override in good if not (override.is_group and override.key == "recipe")
        ]
    return good, chain, mistakes + chain.mistakes, unsure


def compose_config(lines: list[str], with_hydra: bool = False) -> ComposedConfig:
    """Compose what was typed; mistakes are collected, and what carries them is left out.

    `with_hydra` composes Hydra's own settings, too: those of a sweep, or of `--cfg hydra`.
    """
    typed, chain, mistakes, unsure = check_overrides(lines)
    direct = None if with_hydra else _compose_directly(typed, chain)
    if direct:
        mistakes += _useless_name(direct.values.get("output_dir"), typed)
        for key, value in _late_values(direct.values, direct.choices, typed, lines):
            set_value(direct.values, key, value)
        return ComposedConfig(
            None, lines, chain, mistakes, unsure, direct.choices, values=direct.values
        )
    config, wrong = _compose_with_hydra([override.for_hydra for override in typed], chain)
    if wrong:
        mistakes.append(wrong)
        return ComposedConfig(config, lines, chain, mistakes, {*GROUPS, "recipe"})
    from omegaconf import OmegaConf, open_dict

    choices = dict(config.hydra.runtime.choices)
    # A name that holds `${...}` is resolved in the folder's name, too.
    named = OmegaConf.masked_copy(config, ["output_dir", "name", "model", "dataset"])
    plain = cast(dict[str, Any], OmegaConf.to_container(named))
    mistakes += _useless_name(plain.get("output_dir"), typed)
    with open_dict(config):
        for key, value in _late_values(plain, choices, typed, lines):
            OmegaConf.update(config, key, value, force_add=True)
    return ComposedConfig(config, lines, chain, mistakes, unsure, choices)


def _useless_name(output_dir: object, typed: list[TypedOverride]) -> list[Mistake]:
    """Return the mistake of a name that was typed where the folder is named whole."""
    if output_dir is None or all(word.key != "name" for word in typed):
        return []
    text = f"has no effect, as output_dir names the folder: {output_dir}. Leave one out."
    return [Mistake("name", text)]


def _compose_directly(typed: list[TypedOverride], chain: RecipeChain) -> DirectConfig | None:
    """Return an ordinary config; None where Hydra has to compose."""
    for override in typed:
        if not override.is_plain or "${" in override.line or override.key.startswith("hydra"):
            return None
    options = {
        override.key: None if override.value is None else str(override.value)
        for override in typed
        if override.is_group
    }
    settings = [(override.key, override.value) for override in typed if not override.is_group]
    return compose_directly(options, settings, chain, CONFIG_NAME)


def register_resolvers() -> None:
    """Let `${oc.env:NAME}` and `${luthier:conf}` be resolved as luthier does."""
    from omegaconf import OmegaConf

    env_references.register_resolver()
    OmegaConf.register_new_resolver(
        "luthier", lambda name: str(recipes.bundled_folder(name)), replace=True
    )


def _compose_with_hydra(
    overrides: list[str], chain: RecipeChain
) -> "tuple[DictConfig, Mistake | None]":
    """Return the config that Hydra composes, or an empty one and what is wrong."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from luthier.config import hydra_plugins

    hydra_plugins.register_plugins()
    register_resolvers()
    conf = str(recipes.bundled_folder("conf"))
    cannot_compose = (
        *(HydraException, OmegaConfBaseException, RecursionError),  # what was typed, or a cycle
        *(yaml.YAMLError, ValueError, OSError),  # a file
    )
    try:
        with (
            hydra_plugins.drop_groups(chain.dropped),
            initialize_config_dir(conf, job_name="luthier", version_base="1.3"),
        ):
            return compose(CONFIG_NAME, overrides, return_hydra_config=True), None
    except cannot_compose as error:
        return OmegaConf.create(), _hydra_mistake(error)


def _wrong_option(typed: TypedOverride) -> Mistake | None:
    if typed.is_group and typed.key in SWEEP_GROUPS:
        return None if typed.is_delete else check_option(typed.key, str(typed.value))
    if not typed.is_group or typed.is_delete or typed.key.startswith("hydra"):
        return None
    group = typed.key
    if "/" in group or group not in (*GROUPS, "recipe"):
        return Mistake(typed.line, "there is no such group. Write GROUP=OPTION or key=value.")
    if not typed.is_plain:
        return Mistake(typed.line, f"`+` would add a second {group}. Write {group}={typed.value}.")
    if typed.value is None and group != "recipe":
        off = "none" if "none" in list_options(group) else "NAME"
        return Mistake(group, f"null is not an option. Write {group}={off}.")
    return None if typed.value is None else check_option(group, str(typed.value))


def _chain(typed: list[TypedOverride]) -> RecipeChain:
    groups = frozenset(override.key for override in typed if override.is_group)
    named = [override.value for override in typed if override.is_group and override.key == "recipe"]
    if not named or named[-1] is None:
        return RecipeChain()
    return read_recipe_chain(str(named[-1]), groups - {"recipe", "debug"})


def _late_values(
    config: Mapping[str, Any],
    choices: Mapping[str, str | None],
    typed: list[TypedOverride],
    lines: list[str],
) -> Iterator[tuple[str, Any]]:
    """Yield the recipe's name and the run's folder, and what lets typed settings win over files."""
    recipe = choices.get("recipe")
    yield "recipe", recipe
    if config.get("output_dir") is None:
        yield "output_dir", run_folder({**config, "recipe": recipe}, lines)
    keys = {override.key for override in typed if override.value is not None}
    ways = {f"dataset.eval.{way}" for way in HELD_OUT_KEYS}
    if len(keys & ways) == 1:  # this way of holding out rows replaces the one that a file names
        yield from ((other, None) for other in sorted(ways - keys))
    lengths = {"trainer.args.num_train_epochs", "trainer.args.max_steps"}
    if keys & lengths == {"trainer.args.num_train_epochs"}:  # max_steps in a file would win
        yield "trainer.args.max_steps", -1


def resolve_config(composed: ComposedConfig) -> dict[str, Any]:
    """Return the config as plain values; an interpolation that fails is noted and left out."""
    if composed.values is not None:
        return deepcopy(composed.values)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = _without_hydra(composed)
    for _ in range(_PATIENCE):
        try:
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        except OmegaConfBaseException as error:
            key = str(error.full_key)
            composed.mistakes.append(Mistake(key, _explain_interpolation(error)))
            OmegaConf.update(config, key, "???")
            composed.unsure.add(key)
        else:
            assert isinstance(plain, dict)
            return {str(name): value for name, value in plain.items()}
    return {}


def resolve_for_record(composed: ComposedConfig) -> dict[str, Any]:
    """Return a config that resolves, with `${oc.env:NAME}` for what comes from the environment."""
    if composed.values is not None:
        return deepcopy(composed.values)
    from omegaconf.errors import OmegaConfBaseException

    config = _without_hydra(composed)
    try:
        recorded: dict[str, Any] = env_references.resolve_with_references(config)
    except OmegaConfBaseException:
        # Another resolver needs the value itself (`oc.decode`). Redaction then goes by the value.
        return {}
    return recorded


def _without_hydra(composed: "ComposedConfig") -> "DictConfig":
    from omegaconf import DictConfig, OmegaConf

    assert isinstance(composed.config, DictConfig)
    config = composed.config.copy()
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    return config


def _explain_interpolation(error: "OmegaConfBaseException") -> str:
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError

    if isinstance(error, GrammarParseError):
        return f"{WRONG_INTERPOLATION}."
    first = str(error.msg).strip().splitlines()[0]
    if isinstance(error, InterpolationResolutionError) and "Environment variable" in first:
        return f"{first.split(':', 1)[-1].strip()}. Set it, or write ${{oc.env:NAME,default}}."
    return f"{first}. Correct what stands in ${{...}}."


def _hydra_mistake(error: BaseException) -> Mistake:
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError):
        return explain_yaml_error(error)
    if isinstance(error, RecursionError):
        return Mistake("conf", "an option includes itself in its defaults list. Remove that line.")
    if isinstance(error, GrammarParseError) or isinstance(error.__cause__, GrammarParseError):
        return Mistake("configuration", f"{WRONG_INTERPOLATION}.")
    cause = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    text = f"{error}{cause}".strip().partition("\nConfig search path")[0]
    return Mistake("Hydra", " ".join(text.split()))
