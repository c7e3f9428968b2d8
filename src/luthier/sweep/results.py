"""The best trial as a recipe: what `recipe=` takes, equal to the trial's configuration."""

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from luthier.config.compose import (
    TypedOverride,
    compose_config,
    parse_overrides,
    resolve_config,
    resolve_for_record,
)
from luthier.config.env_references import put_references
from luthier.config.load import load_config
from luthier.config.recipes import list_options
from luthier.config.schema import GROUPS
from luthier.errors import UserError
from luthier.record.config_diff import NEUTRAL_KEYS
from luthier.redaction import redact
from luthier.storage.atomic import write_text
from luthier.sweep.page import write_page
from luthier.sweep.plots import draw_plots, importance_hint
from luthier.sweep.sweep_plan import SweepPlan
from luthier.sweep.trials import (
    Trial,
    best_trial,
    describe_tie,
    format_number,
    trial_table,
    write_csv,
)
from luthier.terminal import print_table
from luthier.train.launch.request import format_train_command

_NOT_OF_A_RECIPE = NEUTRAL_KEYS
_ABSENT = object()


def write_recipe(planned: SweepPlan, trial: Trial, name: str, count: int) -> Path:
    """Write `recipes/<name>.yaml` in the sweep's folder for a trial that is one of `count`.

    It is composed again and held against the trial: what typing means and a recipe does not (such
    as `debug`) becomes keys. Raises UserError where a recipe cannot say the same.
    """
    path = _recipe_path(planned, name)
    choices = planned.choices(trial.params)
    typed, _ = parse_overrides(choices)
    # Redacted, as the recipe is written: a secret does not stand in it, and is typed again.
    resolved = redact(load_config(choices, planned.is_trusted).recorded)
    keys = _collect_typed_keys(typed, resolved)
    # A key that is added may change what others come to (through an interpolation), so it is
    # compared anew.
    for _ in range(3):
        write_text(path, _format_recipe(planned, trial, name, count, typed, keys))
        with _search_recipes_in(path.parent):
            differing = _compare_recipe(name, resolved)
        if not differing:
            return path
        keys |= differing
    # A recipe that trains something else would be worse than none.
    path.unlink()
    raise UserError(f"a recipe cannot say {', '.join(differing)} as it was typed.")


def train_command(planned: SweepPlan, name: str) -> str:
    """Return what to type to train with the recipe."""
    folder = shlex.quote(str(planned.folder.path / "recipes"))
    return f"LUTHIER_RECIPES={folder} {format_train_command(f'recipe={name}')}"


def parameter_names(planned: SweepPlan, leaders: Sequence[Trial]) -> dict[int, str]:
    """Return a recipe name for each of the best trials, by number; none that another one has."""
    stem = f"{planned.group}_best"
    while _is_taken(planned, stem):
        stem += "_"
    if len(leaders) == 1:
        return {leaders[0].number: stem}
    return {trial.number: f"{stem}_{trial.name}" for trial in leaders}


def _recipe_path(planned: SweepPlan, name: str) -> Path:
    return planned.folder.path / "recipes" / f"{name}.yaml"


def _is_taken(planned: SweepPlan, name: str) -> bool:
    there = list_options("recipe").get(name)
    return there is not None and there.resolve() != _recipe_path(planned, name).resolve()


@contextmanager
def _search_recipes_in(folder: Path) -> Iterator[None]:
    """Have the recipes of a folder found, as the command that is printed does."""
    before = os.environ.get("LUTHIER_RECIPES")
    # In front of the user's own folders, so that this very file is what is found.
    os.environ["LUTHIER_RECIPES"] = os.pathsep.join([str(folder), *([before] if before else [])])
    try:
        yield
    finally:
        os.environ.pop("LUTHIER_RECIPES")
        os.environ |= {"LUTHIER_RECIPES": before} if before else {}


def _collect_typed_keys(typed: Sequence[TypedOverride], resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that were typed or searched, with the values that they came to have."""
    keys = {
        override.key: _value_at(resolved, override.key)
        for override in typed
        if not override.is_group
    }
    return {
        key: value
        for key, value in keys.items()
        if value is not _ABSENT and key.split(".")[0] not in _NOT_OF_A_RECIPE
    }


def _value_at(resolved: dict[str, Any], key: str) -> Any:
    node: Any = resolved
    for name in key.split("."):
        node = node.get(name, _ABSENT) if isinstance(node, dict) else _ABSENT
    return node


def _compare_recipe(name: str, resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the keys in which a recipe differs from what is wanted, with the wanted values."""
    try:
        recorded = load_config([f"recipe={name}"], is_trusted=True).recorded
        return _find_differences(redact(recorded), resolved)
    except UserError:
        # Keys that exclude each other: what is wrong with the recipe is among what differs.
        composed = compose_config([f"recipe={name}"])
        return _find_differences(
            redact(put_references(resolve_config(composed), resolve_for_record(composed))),
            resolved,
            is_whole=False,
        )


def _find_differences(
    composed: Any, resolved: Any, prefix: str = "", is_whole: bool = True
) -> dict[str, Any]:
    """Return the keys in which two configurations differ, with the wanted values; None for none.

    `is_whole`: whether a key that is missing in the first differs.
    """
    if not isinstance(resolved, dict) or not isinstance(composed, dict):
        return {} if composed == resolved else {prefix: resolved}
    keys: dict[str, Any] = {}
    for name in {**resolved, **composed} if is_whole else composed:
        key = f"{prefix}.{name}".lstrip(".")
        if key.split(".")[0] not in _NOT_OF_A_RECIPE:
            keys |= _find_differences(
                composed.get(name, _ABSENT), resolved.get(name), key, is_whole
            )
    return keys


def _format_recipe(
    planned: SweepPlan,
    trial: Trial,
    name: str,
    count: int,
    typed: Sequence[TypedOverride],
    keys: dict[str, Any],
) -> str:
    lines = [*_header_lines(planned, trial, name, count), *_default_lines(typed)]
    lines += _setting_lines(keys, {key.lstrip("+") for key in trial.params})
    return "\n".join(lines) + "\n"


def _header_lines(planned: SweepPlan, trial: Trial, name: str, count: int) -> list[str]:
    values = ", ".join(
        f"{objective.name} {format_number(trial.values.get(objective.name))}"
        for objective in planned.objectives
    )
    what = f"# The best of {count} trials: {values} (trial {trial.name})."
    if len(planned.objectives) > 1:
        what = f"# One of the trials that none of {count} beats: {values} (trial {trial.name})."
    needs = f"recipe={planned.recipe} needs" if planned.recipe else "the sweep's trials needed"
    return [what, f"# Needs: what {needs}.", f"# Command: {train_command(planned, name)}"]


def _default_lines(typed: Sequence[TypedOverride]) -> list[str]:
    """Return the defaults: what the recipe inherits, and the options typed or searched."""
    chosen = {
        override.key: override.value
        for override in typed
        if override.is_group and not override.is_delete
    }
    parent = chosen.get("recipe")
    entries = [f"  - {parent}  # what the sweep was over"] if parent else []
    entries += [
        f"  - override /{group}: {option}  # chosen"
        for group, option in chosen.items()
        if group in GROUPS and group != "debug"
    ]
    return ["defaults:", *entries, ""] if entries else []


def _setting_lines(keys: dict[str, Any], searched: set[str]) -> list[str]:
    """Return the keys as YAML, each line with where its value is from."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *path, name = key.split(".")
        node = tree
        for component in path:
            node = node.setdefault(component, {})
        node[name] = _Leaf(value, "searched" if key in searched else "typed")
    return _tree_lines(tree, "")


class _Leaf(NamedTuple):
    value: Any
    origin: str


def _tree_lines(tree: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, node in tree.items():
        if isinstance(node, _Leaf):
            # Flow style on one endless line; for a bare number PyYAML adds an end mark, "...".
            value = yaml.safe_dump(
                node.value, default_flow_style=True, allow_unicode=True, width=math.inf
            )
            value = value.removesuffix("...\n").strip()
            lines.append(f"{indent}{name}: {value}  # {node.origin}")
        else:
            lines += [f"{indent}{name}:", *_tree_lines(node, f"{indent}  ")]
    return lines


# The results of a sweep: table, `results.csv`, plots, HTML page, the best trial as a recipe.

_MOST_RECIPES = 10
"""With several objectives, so many of the trials that none beats become recipes."""


def report_progress(planned: SweepPlan, trials: Sequence[Trial], console: Console) -> None:
    """Write `results.csv`, and print the table and the errors, also of a sweep that was stopped."""
    write_csv(trials, planned.objectives, planned.folder.path / "results.csv")
    console.print()
    print_table(console, trial_table(trials, planned.objectives))
    print_errors(trials, console)


def report_results(planned: SweepPlan, trials: Sequence[Trial], console: Console) -> None:
    """Write everything that a sweep leaves when its trials have ended, and print the results."""
    folder = planned.folder.path
    plots = draw_plots(trials, planned.objectives, folder)
    written = _write_recipes(planned, trials, console)
    title = f"Sweep over {planned.recipe}" if planned.recipe else "Sweep"
    texts = [(command, path.read_text(encoding="utf-8")) for command, path in written]
    write_page(title, trials, planned.objectives, plots, texts, folder / "sweep.html")
    report_progress(planned, trials, console)
    names = ["results.csv", "sweep.html", *(plot.path.name for plot in plots)]
    _print_line(console, f"\nwritten   {folder}: {' '.join(names)}")
    tie = describe_tie(trials, planned.objectives)
    if tie:
        _print_line(console, f"tie       {tie}")
    hint = importance_hint(trials, planned.objectives)
    if hint:
        _print_line(console, f"left out  {hint}")
    for command, _ in written[:1]:
        _print_line(console, f"the best  {command}")


def print_errors(trials: Sequence[Trial], console: Console) -> None:
    """Print why trials failed, once for those that failed with the same error."""
    trials_by_error: dict[str, list[str]] = {}
    for trial in trials:
        if trial.error:
            trials_by_error.setdefault(trial.error, []).append(trial.name)
    for error, names in trials_by_error.items():
        indented = "\n".join(f"  {line}" for line in error.splitlines())
        _print_line(console, f"\nfailed    {', '.join(names)}\n{indented}")


def _write_recipes(
    planned: SweepPlan, trials: Sequence[Trial], console: Console
) -> list[tuple[str, Path]]:
    """Write the best trials as recipes, and return the command that trains each, and its file."""
    # A front of three objectives may hold most of the trials.
    best_trials = best_trial(trials, planned.objectives)[:_MOST_RECIPES]
    written = []
    for number, name in parameter_names(planned, best_trials).items() if best_trials else ():
        trial = next(trial for trial in best_trials if trial.number == number)
        try:
            path = write_recipe(planned, trial, name, len(trials))
        except UserError as error:  # the recipe it is made of is gone or has changed
            _print_line(console, f"no recipe of trial {trial.name}: {error}")
            continue
        written.append((train_command(planned, name), path))
    return written


def _print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
