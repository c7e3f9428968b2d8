"""From what was typed to one plain mapping: Hydra composes, OmegaConf resolves, once."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from luthier.config import env_references, hydra_plugins, recipes
from luthier.config.cross_checks import HELD_OUT_KEYS
from luthier.config.override_errors import (
    explain_unreadable,
    is_cut_off,
    parse_override,
)
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
    parser = OverridesParser.create()
    typed, mistakes = list[TypedOverride](), list[Mistake]()
    words = list(lines)
    while words:
        line = words.pop(0)
        try:
            override = None if is_cut_off(line, words) else parse_override(parser, line)
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            text, cut_words = explain_unreadable(line, words)
            mistakes.append(Mistake(line.partition("=")[0] or line, text))
            del words[:cut_words]
            continue
        if override.is_sweep_override():
            mistakes.append(_sweep(override, line))
        else:
            # What Hydra has read is what it reads again, when it composes.
            typed.append(_typed(override, override.input_line or line))
    return typed, mistakes


def _typed(override: Override, line: str) -> TypedOverride:
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


def _sweep(override: Override, line: str) -> Mistake:
    key, value = override.key_or_group, line.partition("=")[2]
    as_list = f" For a list write {quote(f'{key}=[{value}]')}." if "(" not in value else ""
    return Mistake(
        key,
        f"{value} is several values, and one run takes one. To try each, add -m.{as_list} As text "
        f"write {format_override(key, value)}.",
    )


CONFIG_NAME = "config"
_CANNOT_COMPOSE = (
    *(HydraException, OmegaConfBaseException, RecursionError),  # what was typed, or a cycle
    *(yaml.YAMLError, ValueError, OSError),  # a file
)
_PATIENCE = 100
"""Interpolations that may fail before the rest are left for the next try."""


@dataclass
class ComposedConfig:
    """A composed config with what is wrong so far.

    `unsure` are the groups of which nothing more can be said: their own choice is a mistake.
    """

    config: DictConfig
    lines: list[str]
    chain: RecipeChain
    mistakes: list[Mistake] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)

    @property
    def keys_typed(self) -> set[str]:
        """Return the keys of the command line, of readable and unreadable overrides alike."""
        return {line.lstrip("+~").partition("=")[0] for line in self.lines}

    def files(self) -> list[tuple[str, Path]]:
        """Return the YAML files behind the config with the key each begins at, last word first."""
        choices = OmegaConf.select(self.config, "hydra.runtime.choices") or {}
        files = [("", path) for path in self.chain.files.values()]
        for group in GROUPS:
            path = list_options(group).get(str(choices.get(group)))
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


def compose_config(lines: list[str]) -> ComposedConfig:
    """Compose what was typed; mistakes are collected, and what carries them is left out."""
    typed, chain, mistakes, unsure = check_overrides(lines)
    try:
        config = _compose([override.for_hydra for override in typed], chain)
    except _CANNOT_COMPOSE as error:
        mistakes.append(_hydra_mistake(error))
        return ComposedConfig(OmegaConf.create(), lines, chain, mistakes, {*GROUPS, "recipe"})
    if config.get("output_dir") is not None and any(word.key == "name" for word in typed):
        text = f"has no effect, as output_dir names the folder: {config.output_dir}. Leave one out."
        mistakes.append(Mistake("name", text))
    _finish(config, typed, lines)
    return ComposedConfig(config, lines, chain, mistakes, unsure)


def _compose(overrides: list[str], chain: RecipeChain) -> DictConfig:
    hydra_plugins.register_plugins()
    env_references.register_resolver()
    conf = str(recipes.bundled_folder("conf"))
    with (
        hydra_plugins.drop_groups(chain.dropped),
        initialize_config_dir(conf, job_name="luthier", version_base="1.3"),
    ):
        return compose(CONFIG_NAME, overrides, return_hydra_config=True)


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


def _finish(config: DictConfig, typed: list[TypedOverride], lines: list[str]) -> None:
    """Fill in the recipe's name and the run's folder, and let what was typed win over files."""
    with open_dict(config):
        config.recipe = config.hydra.runtime.choices.get("recipe")
        if config.get("output_dir") is None:
            named = OmegaConf.masked_copy(config, ["recipe", "name", "model", "dataset"])
            # A name that holds `${...}` is resolved in the folder's name, too.
            plain = cast(dict[str, Any], OmegaConf.to_container(named))
            config.output_dir = run_folder(plain, lines)
    keys = {override.key for override in typed if override.value is not None}
    ways = {f"dataset.eval.{way}" for way in HELD_OUT_KEYS}
    if len(keys & ways) == 1:  # this way of holding out rows replaces the one that a file names
        for other in ways - keys:
            OmegaConf.update(config, other, None, force_add=True)
    lengths = {"trainer.args.num_train_epochs", "trainer.args.max_steps"}
    if keys & lengths == {"trainer.args.num_train_epochs"}:  # max_steps in a file would win
        OmegaConf.update(config, "trainer.args.max_steps", -1, force_add=True)


def resolve_config(composed: ComposedConfig) -> dict[str, Any]:
    """Return the config as plain values; an interpolation that fails is noted and left out."""
    config = composed.config.copy()
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    for _ in range(_PATIENCE):
        try:
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        except OmegaConfBaseException as error:
            key = str(error.full_key)
            composed.mistakes.append(Mistake(key, _interpolation_words(error)))
            OmegaConf.update(config, key, "???")
            composed.unsure.add(key)
        else:
            assert isinstance(plain, dict)
            return {str(name): value for name, value in plain.items()}
    return {}


def resolve_for_record(composed: ComposedConfig) -> dict[str, Any]:
    """Return a config that resolves, with `${oc.env:NAME}` for what comes from the environment."""
    config = composed.config.copy()
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    try:
        recorded: dict[str, Any] = env_references.resolve_with_references(config)
    except OmegaConfBaseException:
        # Another resolver needs the value itself (`oc.decode`). Redaction then goes by the value.
        return {}
    return recorded


def _interpolation_words(error: OmegaConfBaseException) -> str:
    if isinstance(error, GrammarParseError):
        return f"{WRONG_INTERPOLATION}."
    first = str(error.msg).strip().splitlines()[0]
    if isinstance(error, InterpolationResolutionError) and "Environment variable" in first:
        return f"{first.split(':', 1)[-1].strip()}. Set it, or write ${{oc.env:NAME,default}}."
    return f"{first}. Correct what stands in ${{...}}."


def _hydra_mistake(error: Exception) -> Mistake:
    if isinstance(error, yaml.MarkedYAMLError):
        return explain_yaml_error(error)
    if isinstance(error, RecursionError):
        return Mistake("conf", "an option includes itself in its defaults list. Remove that line.")
    if isinstance(error, GrammarParseError) or isinstance(error.__cause__, GrammarParseError):
        return Mistake("configuration", f"{WRONG_INTERPOLATION}.")
    cause = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    text = f"{error}{cause}".strip().partition("\nConfig search path")[0]
    return Mistake("Hydra", " ".join(text.split()))
