"""The best trial as a recipe: what `train.py recipe=` takes, equal to the trial's configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier.config.overrides import parse
from luthier.config.run_config import load
from luthier.config.schema import GROUPS
from luthier.record.files import write_text
from luthier.record.rundir import HIDDEN, NEUTRAL, redacted
from luthier.sweep.planning import Sweep
from luthier.sweep.table import shown_number
from luthier.sweep.trials import Trial

_NOT_OF_A_RECIPE = (*NEUTRAL, "recipe")


def write_recipe(planned: Sweep, trial: Trial, name: str, count: int) -> Path:
    """Write `recipes/<name>.yaml` in the sweep's folder for a trial that is one of `count`."""
    choices = planned.choices(trial.params)
    typed, _ = parse(choices)
    groups = {
        one.key: str(one.value)
        for one in typed
        if one.is_group and not one.is_delete and one.key in GROUPS and one.key != "debug"
    }
    parent = next((str(one.value) for one in reversed(typed) if one.key == "recipe"), None)
    start = load_start(parent, groups)
    wanted = load(choices).resolved
    keys = _differing(start, wanted)
    for key in trial.params:  # what was searched is said, even where the recipe has it already
        bare = key.lstrip("+")
        keys |= {} if bare in groups or bare == "recipe" else {bare: _at(wanted, bare)}
    path = planned.folder.path / "recipes" / f"{name}.yaml"
    lines = [
        *_header(planned, trial, name, count),
        *_defaults(parent, groups),
        *_settings(keys, planned, trial),
    ]
    write_text(path, "\n".join(lines) + "\n")
    return path


def load_start(parent: str | None, groups: dict[str, str]) -> dict[str, Any]:
    """The configuration that a recipe with this defaults list alone stands for."""
    words = [f"recipe={parent}"] if parent else []
    return load([*words, *(f"{group}={option}" for group, option in groups.items())]).resolved


def command(planned: Sweep, name: str) -> str:
    """What to type to train with the recipe."""
    return f"LUTHIER_RECIPES={planned.folder.path / 'recipes'} python train.py recipe={name}"


def _header(planned: Sweep, trial: Trial, name: str, count: int) -> list[str]:
    values = ", ".join(
        f"{one.name} {shown_number(trial.values.get(one.name))}" for one in planned.objectives
    )
    what = f"# The best of {count} trials: {values} (trial {trial.name})."
    if len(planned.objectives) > 1:
        what = f"# One of the trials that none of {count} beats: {values} (trial {trial.name})."
    needs = f"recipe={planned.recipe} needs" if planned.recipe else "trial needed"
    return [what, f"# Needs: what {needs}.", f"# Command: {command(planned, name)}"]


def _defaults(parent: str | None, groups: dict[str, str]) -> list[str]:
    entries = [f"  - {parent}  # what the sweep was over"] if parent else []
    entries += [f"  - override /{group}: {option}  # chosen" for group, option in groups.items()]
    return ["defaults:", *entries, ""] if entries else []


def _differing(start: Any, wanted: Any, prefix: str = "") -> dict[str, Any]:
    """The keys in which the trial differs from its recipe, with the trial's values."""
    if not isinstance(wanted, dict) or not isinstance(start, dict):
        return {} if start == wanted else {prefix: wanted}
    found: dict[str, Any] = dict.fromkeys(_missing(start, wanted, prefix))
    for name, value in wanted.items():
        key = f"{prefix}.{name}".lstrip(".")
        if key.split(".")[0] in _NOT_OF_A_RECIPE:
            continue
        found |= _differing(start[name], value, key) if name in start else {key: value}
    return found


def _at(resolved: dict[str, Any], key: str) -> Any:
    node: Any = resolved
    for part in key.split("."):
        node = node[part]
    return node


def _missing(start: dict[str, Any], wanted: dict[str, Any], prefix: str) -> list[str]:
    return [f"{prefix}.{name}".lstrip(".") for name in start if name not in wanted]


def _settings(keys: dict[str, Any], planned: Sweep, trial: Trial) -> list[str]:
    """The keys as YAML, those that were searched with a word about it."""
    swept = {key.lstrip("+") for key in trial.params}
    tree: dict[str, Any] = {}
    for key, value in redacted(keys).items():
        if value == HIDDEN:
            continue
        node = tree
        *path, name = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else ""
    return _commented(text.splitlines(), swept)


def _commented(lines: Sequence[str], swept: set[str]) -> list[str]:
    """Each line with where its value is from."""
    trail: list[tuple[int, str]] = []
    found = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        name, colon, value = line.strip().partition(":")
        trail = [one for one in trail if one[0] < indent]
        key = ".".join([*(part for _, part in trail), name])
        trail.append((indent, name))
        is_leaf = bool(colon and value.strip() and not value.strip().startswith(("|", ">")))
        about = "  # searched" if key in swept else "  # typed"
        found.append(line + about if is_leaf else line)
    return found


def names(planned: Sweep, leaders: Sequence[Trial]) -> dict[int, str]:
    """A recipe's name for each of the best trials, by number."""
    stem = planned.recipe or "custom"
    if len(leaders) == 1:
        return {leaders[0].number: f"{stem}_best"}
    return {trial.number: f"{stem}_best_{trial.name}" for trial in leaders}
