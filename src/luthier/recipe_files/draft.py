"""A recipe while it is put together, and its text with a comment at each key."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.config.recipes import format_path, list_recipes, recipe_folders
from luthier.config.schema import GROUPS
from luthier.errors import UserError, format_for_hydra
from luthier.storage.atomic import write_text
from luthier.storage.write_errors import explain_write_errors

MAX_LINE = 100
"""Characters of a line; a longer comment stands above its key."""


@dataclass(frozen=True)
class Setting:
    """A value of a recipe and the comment beside it."""

    value: Any
    comment: str


@dataclass
class RecipeDraft:
    """A recipe: its header, the options of groups that it chooses, and its settings.

    The keys of `settings` are dotted, such as `trainer.args.learning_rate`; names between the dots
    have no dots of their own.
    """

    header: list[str] = field(default_factory=list)
    """The lines above everything, without the `#`."""
    options: dict[str, str] = field(default_factory=dict)
    """Group -> the option that is chosen."""
    settings: dict[str, Setting] = field(default_factory=dict)
    footer: list[str] = field(default_factory=list)
    """The lines below everything, without the `#`."""

    def set_key(self, key: str, value: Any, comment: str) -> None:
        """Set a key, in place of an earlier value of it."""
        self.settings[key] = Setting(value, comment)

    def value(self, key: str) -> Any:
        """Return what a key is set to; None where it is not set."""
        return self.settings[key].value if key in self.settings else None

    def overrides(self) -> list[str]:
        """Return what would be typed for the same config, for Hydra and not for a shell."""
        options = [f"{group}={option}" for group, option in self.options.items()]
        keys = [f"{key}={format_for_hydra(s.value)}" for key, s in self.settings.items()]
        return options + keys

    def text(self) -> str:
        """Return the YAML of the recipe."""
        lines = [f"# {line}".rstrip() for line in self.header]
        chosen = [group for group in GROUPS if group in self.options]
        lines += ["defaults:", *(f"  - override /{g}: {self.options[g]}" for g in chosen), ""]
        lines += _render(_nest(self.settings), 0)
        if self.footer:
            lines += ["", *(f"# {line}".rstrip() for line in self.footer)]
        return "\n".join(lines) + "\n"


def _nest(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the settings as nested mappings, groups in the order of `conf/config.yaml`."""
    tree: dict[str, Any] = {group: {} for group in GROUPS}
    for key, setting in settings.items():
        node = tree
        *groups, name = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = setting
    return {name: below for name, below in tree.items() if below}


def _render(tree: Mapping[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, below in tree.items():
        if not isinstance(below, Setting):
            yield f"{indent}{name}:"
            yield from _render(below, depth + 1)
            continue
        line = f"{indent}{name}: {format_yaml(below.value)}"
        comment = " ".join(below.comment.split())
        if len(line) + len(comment) + 4 <= MAX_LINE:
            yield f"{line}  # {comment}"
        else:
            yield from (f"{indent}# {text}" for text in wrap(comment, MAX_LINE - 2 - len(indent)))
            yield line


def wrap(text: str, width: int) -> list[str]:
    """Return a text as lines of at most so many characters; words are not cut."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def format_yaml(value: Any) -> str:
    """Return a value as one line of YAML, which OmegaConf reads as the same value."""
    if isinstance(value, bool | None):
        return json.dumps(value)
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_yaml(each) for each in value)}]"
    if isinstance(value, dict):
        pairs = [f"{format_yaml(str(key))}: {format_yaml(each)}" for key, each in value.items()]
        return f"{{{', '.join(pairs)}}}" if pairs else "{}"
    if isinstance(value, int):
        return str(value)
    return _format_text(str(value))


def _format_float(value: float) -> str:
    """Return the shortest decimal of a number, such as `2e-4`."""
    text = repr(value)
    if 0 < abs(value) < 1e-2 and "e" not in text:
        text = f"{value:.15e}"
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return text if float(text) == value else repr(value)
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), text)


_PLAIN = re.compile(r"[A-Za-z_./~][\w./@-]*(?: [\w./@-]+)*", re.ASCII)
_OTHER_VALUES = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"}


def _format_text(text: str) -> str:
    # `${` would begin an interpolation of OmegaConf.
    text = text.replace("${", "\\${")
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _OTHER_VALUES and text != "~"
    if is_plain and not text.startswith((".", "~")):
        return text
    if is_plain and "/" in text:
        return text
    return yaml.safe_dump(text, default_style='"', width=2**30, allow_unicode=True).strip()


def recipe_path(output: str | None, name: str, force: bool) -> Path:
    """Return the file that a new recipe goes to: what was typed, or `recipes/NAME.yaml`.

    Raises UserError for a name that is no recipe's and for a file that exists, unless `force`.
    """
    path = Path(output or f"recipes/{name}.yaml").expanduser()
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        raise UserError(f"-o {output}: a recipe is a .yaml file, such as recipes/{name}.yaml.")
    if path.suffix == ".yml":
        raise UserError(f"-o {output}: recipes end in .yaml. Write -o {path.with_suffix('.yaml')}.")
    if path.exists() and not force:
        raise UserError(
            f"{path} exists, and is not overwritten. Add --force to replace it, or -o FILE for "
            "another name."
        )
    return path


def recipe_name(text: str) -> str:
    """Return a name for a recipe, made of a file's or a hub dataset's."""
    stem = Path(text.rstrip("/")).name
    while Path(stem).suffix.lower() in _SUFFIXES:
        stem = Path(stem).stem
    name = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_").lower()
    return name or "mine"


_SUFFIXES = (
    ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather", ".txt",
    ".md", ".gz", ".bz2", ".xz", ".zst", ".zip", ".yaml", ".yml", ".sh",
)  # fmt: skip


def write_recipe(path: Path, draft: RecipeDraft) -> None:
    """Write a recipe, and its folder where that is missing; UserError where it cannot be."""
    with explain_write_errors(path, "-o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, draft.text())


def describe_shadowed(path: Path) -> str:
    """Return a sentence on a recipe of the same name that this one hides; empty for none.

    To be asked before the recipe is written.
    """
    hidden = [r for r in list_recipes() if r.name == path.stem and r.path != path.resolve()]
    if not hidden:
        return ""
    return f"recipe={path.stem} now means {path}, and no longer {format_path(hidden[0].path)}."


def typed_recipe(path: Path) -> str:
    """Return how a recipe of this file is typed, `recipe=NAME`.

    Where its folder is none that recipes are looked for in, an assignment of the variable that
    adds it stands before the command: see `command_prefix`.
    """
    return f"recipe={path.stem}"


def command_prefix(path: Path) -> str:
    """Return what stands before a command that finds a recipe only with its folder named."""
    folder = path.resolve().parent
    # The folder ./recipes may be made only when the recipe is written.
    if folder in [(Path.cwd() / "recipes").resolve(), *recipe_folders()]:
        return ""
    return f"LUTHIER_RECIPES={format_path(folder)} "
