"""Recipes: what there is, and what a recipe inherits, checked before Hydra reads it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from luthier.config.schema import GROUPS, RunConfig
from luthier.errors import Mistake, UserError, format_override, suggest_options
from luthier.storage.typed_files import (
    TOO_DEEP,
    ExcessiveYamlError,
    check_yaml_size,
    compose_yaml,
    parse_config_yaml,
)

# Where config groups and recipes lie: the user's own folders first, then the bundled ones.

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]


def bundled_folder(name: str) -> Path:
    """Return the folder `conf` or `recipes` that came with luthier.

    A wheel carries it inside the package; a checkout (and so an editable install) beside `src`.
    """
    for folder in (_PACKAGE / name, _CHECKOUT / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"luthier's own {name}/ folder is missing next to {_PACKAGE}; reinstall luthier."
    )


def conf_folders() -> list[Path]:
    """Return the folders with config groups, the first to be searched first."""
    user_folder, shipped = Path.cwd() / "conf", bundled_folder("conf")
    return (
        [user_folder, shipped]
        if user_folder.is_dir() and user_folder.resolve() != shipped.resolve()
        else [shipped]
    )


def recipe_folders() -> list[Path]:
    """Return ./recipes, the folders of $LUTHIER_RECIPES and the bundled one, without repeats."""
    named = [Path(part) for part in os.environ.get("LUTHIER_RECIPES", "").split(os.pathsep) if part]
    for folder in named:
        if not folder.is_dir():
            raise UserError(f"LUTHIER_RECIPES names {folder}, which is not a folder. Correct it.")
    user_folders = [folder for folder in [Path.cwd() / "recipes"] if folder.is_dir()]
    folders = [folder.resolve() for folder in [*user_folders, *named, bundled_folder("recipes")]]
    return list(dict.fromkeys(folders))


def format_path(path: Path) -> str:
    """Return a path as the user would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


@dataclass(frozen=True)
class RecipeInfo:
    """A recipe that can be typed as `recipe=name`, and the first line of its header."""

    name: str
    path: Path
    header: str


@dataclass
class RecipeChain:
    """A recipe with all that it inherits: files (the heir first), chosen options, mistakes."""

    files: dict[str, Path] = field(default_factory=dict)
    dropped: dict[str, frozenset[str]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def read_recipe_header(path: Path) -> str:
    """Return the first comment line of a YAML file."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").rstrip()
    return ""


class KeyComment(NamedTuple):
    """What a YAML file says about a key: its value as it stands there, and the comment behind."""

    value: str
    comment: str
    line: int


def read_key_comments(path: Path) -> dict[str, KeyComment]:
    """Return every dotted key of a YAML file with its value and its comment, in their order.

    A key that holds others has no value, and the comment of its own line.
    """
    text = path.read_text(encoding="utf-8")
    return dict(_comments(compose_yaml(text), text, text.splitlines(), ""))


def _comments(
    node: yaml.Node | None, text: str, lines: list[str], above: str
) -> Iterator[tuple[str, KeyComment]]:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else []:
        key = f"{above}.{name.value}".lstrip(".")
        line = name.start_mark.line
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        behind = name.end_mark.column if is_block else value.end_mark.column
        written = "" if is_block else text[value.start_mark.index : value.end_mark.index]
        _, mark, comment = lines[line][behind:].partition("# ")
        yield key, KeyComment(written, comment.strip() if mark else "", line + 1)
        if is_block:
            yield from _comments(value, text, lines, key)


def list_recipes() -> list[RecipeInfo]:
    """Return every recipe that can be named, the user's own first; an earlier folder wins."""
    recipes: dict[str, RecipeInfo] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            recipes.setdefault(path.stem, RecipeInfo(path.stem, path, read_recipe_header(path)))
    return list(recipes.values())


def list_options(group: str) -> dict[str, Path]:
    """Return the options of a config group and their files, sorted; an earlier folder wins."""
    if group == "recipe":
        return {recipe.name: recipe.path for recipe in list_recipes()}
    files: dict[str, Path] = {}
    for folder in conf_folders():
        for path in sorted((folder / group).glob("*.yaml")):
            files.setdefault(path.stem, path)
    return dict(sorted(files.items()))


def check_option(group: str, name: str) -> Mistake | None:
    """Return the mistake of choosing an option that a group does not have."""
    available = list_options(group)
    if name in available:
        return None
    stem = Path(name).stem
    if stem in available:
        return Mistake(group, f"{name!r} is a file's name. Write {group}={stem}.")
    if setting := _path_setting(group, name):
        return Mistake(group, f"{name!r} is no option but a path. Write {setting}.")
    what = "recipe" if group == "recipe" else f"{group} option"
    return Mistake(group, f"there is no {what} {name!r}. {suggest_options(name, available)}")


def _path_setting(group: str, name: str) -> str | None:
    """Return what to type for a model or for rows whose path stands in place of an option."""
    if group not in ("model", "dataset") or not ("/" in name or Path(name).suffix):
        return None
    is_file = bool(Path(name).suffix) or Path(name).exists()
    option = "hub" if group == "model" or not is_file else "files"
    return f"{group}={option} {format_override(f'{group}.path', name)}"


WRONG_INTERPOLATION = (
    "what stands in ${...} cannot be read. Write ${KEY} for another setting, ${oc.env:NAME} for a "
    "variable, and \\${ for these two characters themselves"
)


def load_yaml(path: Path) -> dict[str, Any] | Mistake:
    """Read a YAML file as a mapping; what is wrong with it comes with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml_size(text, str(path))
        plain = _read_plain(text)
        content = _load_with_omegaconf(path) if plain is None else plain
    except RecursionError:
        return Mistake(format_path(path), f"{TOO_DEEP}.")
    except yaml.MarkedYAMLError as error:
        return explain_yaml_error(error)
    except (ValueError, OSError, yaml.YAMLError) as error:  # a number of 5,000 digits
        return Mistake(format_path(path), f"cannot be read: {error}.")
    if isinstance(content, Mistake):
        return content
    if not isinstance(content, dict):
        return Mistake(format_path(path), "must be a mapping of keys to values.")
    return {str(key): value for key, value in content.items()}


def _load_with_omegaconf(path: Path) -> Any:
    """Return what a YAML file holds, or the mistake in one of its interpolations."""
    # Most files have none, and it takes longer to import than they take to read.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except OmegaConfBaseException as error:
        return Mistake(f"{format_path(path)}: {error.full_key}", f"{WRONG_INTERPOLATION}.")


def _read_plain(text: str) -> dict[Any, Any] | None:
    """Return what a YAML file without interpolations holds; None where OmegaConf has to read it."""
    with suppress(ValueError, yaml.YAMLError):
        content = parse_config_yaml(text) if "${" not in text else None
        return content if isinstance(content, dict) else None
    return None


def explain_yaml_error(error: yaml.MarkedYAMLError) -> Mistake:
    """Return a mistake in a YAML file's grammar with the file and line."""
    mark = error.problem_mark
    where = f"{format_path(Path(mark.name))}:{mark.line + 1}" if mark else "a YAML file"
    problem = str(error.problem)
    if isinstance(error, ExcessiveYamlError):
        return Mistake(where, f"{problem}.")
    words = next((text for mark, text in _YAML_EXPLANATIONS.items() if mark in problem), problem)
    return Mistake(where, f"not valid YAML: {words}.")


_YAML_EXPLANATIONS = {
    "expected <block end>": "this line is not indented as the lines around it are",
    "mapping values are not allowed": "a second `:` in a line, or the indentation of this line is "
    "wrong; text with `: ` in it needs quotes",
    "character '\\t' that cannot": "lines are indented with spaces, and this one has a tab",
    "could not find expected ':'": "this line, or the one before it, is no `key: value`",
    "character '@' that cannot": "text that begins with @ needs quotes",
    "character '%' that cannot": "text that begins with % needs quotes",
    "character '`' that cannot": "text that begins with ` needs quotes",
    "expected ',' or": "a list or a mapping in brackets is not closed, or lacks a comma",
    "unexpected end of stream": "a quote is opened and not closed",
    "found undefined alias": "`*` begins an alias; text that begins with it needs quotes",
}
"""What PyYAML says -> what it means."""


def read_recipe_chain(name: str, typed_groups: frozenset[str]) -> RecipeChain:
    """Follow a recipe and what it inherits.

    `typed_groups` were chosen on the command line: what any recipe says about them is dropped,
    and so is what a parent says about a group that its heir chooses.
    """
    chain = RecipeChain()
    _follow(name, (), typed_groups, chain)
    return chain


def _follow(name: str, trail: tuple[str, ...], dropped: frozenset[str], chain: RecipeChain) -> None:
    if name in trail:
        cycle = " -> ".join([*trail[trail.index(name) :], name])
        chain.mistakes.append(
            Mistake("recipe", f"a recipe includes itself: {cycle}. Remove one `- ` line of these.")
        )
        return
    if unknown := check_option("recipe", name):
        chain.mistakes.append(_blame(unknown, trail, chain))
        return
    path = list_options("recipe")[name]
    content = load_yaml(path)
    if isinstance(content, Mistake):
        chain.mistakes.append(content)
        return
    chain.files[name], chain.dropped[name] = path, dropped
    _follow_defaults(content.get("defaults") or [], (*trail, name), dropped, chain)


def _follow_defaults(
    defaults: Any, trail: tuple[str, ...], dropped: frozenset[str], chain: RecipeChain
) -> None:
    path = chain.files[trail[-1]]
    if not isinstance(defaults, list):
        where = format_path(path)
        chain.mistakes.append(Mistake(where, "`defaults` must be a list of `- ` lines."))
        return
    chosen: set[str] = set()
    for entry, line in zip(defaults, default_lines(path), strict=True):
        if isinstance(entry, Mapping) and entry:
            text = _check_choice(dict(entry), chosen)
            chain.mistakes += [Mistake(f"{format_path(path)}:{line}", text)] if text else []
    for parent in [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]:
        _follow(parent.removeprefix("/recipe/"), trail, dropped | chosen, chain)


def default_lines(path: Path) -> list[int]:
    """Return the line of each entry of a file's defaults list."""
    node = compose_yaml(path.read_text(encoding="utf-8"))
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            return [entry.start_mark.line + 1 for entry in value.value]
    return []


def _check_choice(entry: dict[Any, Any], chosen: set[str]) -> str | None:
    """Return what is wrong with `- override /group: option`, and note the group that it chooses."""
    (key, option), *_ = entry.items()
    group = str(key).split()[-1].split("@")[0].removeprefix("/")
    if group == "recipe":
        return f"`- {key}: {option}` never ends. To inherit, write `- {option}`."
    if group.startswith("hydra"):
        return None
    if group not in GROUPS:
        return f"there is no group {group!r}. {suggest_options(group, GROUPS)}"
    if "override" not in str(key).split() or "/" not in str(key):
        right = f"`- override /{group}: {option}`"
        return f"`- {key}: {option}` adds a second {group}. Write {right}."
    chosen.add(group)
    unknown = check_option(group, str(option))
    return unknown.text if unknown else None


# What a script makes for a recipe, before it can be run.

_FIRST = "# First: "
"""How the line of a recipe's header begins that has the command to run before."""
DATA_PATHS = ("dataset.path", "dataset.eval.path")


def check_recipe_files(
    config: RunConfig, keys: Iterable[str] = ("model.path", *DATA_PATHS)
) -> None:
    """Raise UserError where files are missing that a command makes first, and name that command.

    These are the relative paths that a recipe sets for `keys`, and the command is the line
    `# First: ` of its header.
    """
    values = {key: str(reduce(getattr, key.split("."), config)) for key in keys}
    missing = {
        key: value
        for key, value in values.items()
        # pathlib (3.11) raises an error for a name that is too long.
        if value.startswith("./") and not os.path.exists(value)  # noqa: PTH110
    }
    if not missing or config.recipe is None:
        return
    for path in read_recipe_chain(config.recipe, frozenset()).files.values():
        command = _read_first_command(path)
        written = read_key_comments(path) if command else {}
        of_a_script = {
            key: value for key, value in missing.items() if value == _value_of(written, key)
        }
        if of_a_script:
            names = ", ".join(f"{value} ({key})" for key, value in of_a_script.items())
            raise UserError(
                f"recipe={config.recipe} trains on files that a script makes, and these are not in "
                f"{Path.cwd()}: {names}. Make them, then run the same command again:\n    {command}"
            )


def _value_of(comments: Mapping[str, KeyComment], key: str) -> str | None:
    return comments[key].value if key in comments else None


def _read_first_command(path: Path) -> str | None:
    """Return the command to run before a recipe, as it is typed from here; None if there is none.

    A word `recipes/...` of it is a file beside the recipe.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(_FIRST):
            words = line.removeprefix(_FIRST).split()
            return " ".join(
                quote(format_path(path.parent / word.removeprefix("recipes/")))
                if word.startswith("recipes/")
                else word
                for word in words
            )
    return None


def _blame(mistake: Mistake, trail: tuple[str, ...], chain: RecipeChain) -> Mistake:
    return Mistake(format_path(chain.files[trail[-1]]), mistake.text) if trail else mistake
