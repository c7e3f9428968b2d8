"""The plan of a sweep: what was typed, checked for every trial before anything runs; its lock."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

import luthier
from luthier.config.compose import ComposedConfig, compose_config, parse_overrides
from luthier.config.load import LoadedConfig, format_mistakes, load_config
from luthier.config.run_names import run_folder, run_group
from luthier.errors import Mistake, UserError
from luthier.record.config_diff import NEUTRAL_KEYS, compare_configs
from luthier.record.run_dir import to_yaml
from luthier.redaction import redact_override
from luthier.storage.atomic import write_json, write_text
from luthier.storage.typed_files import load_yaml
from luthier.storage.write_errors import explain_write_errors
from luthier.sweep import objective, settings, space, strategies
from luthier.sweep.objective import Objective, PruningSignal
from luthier.sweep.settings import (
    LocalSettings,
    OptunaSettings,
    RandomSettings,
    SubmititSettings,
    SweeperSettings,
)
from luthier.sweep.space import SearchSpace
from luthier.sweep.trials import Trial, TrialFolder

_NOTHING = (
    "nothing varies, so there is nothing to search. Write several values, such as lora.r=8,16,32, "
    "or name keys with their values under hydra.sweeper.params in a recipe."
)
_OVERWRITE = (
    "a sweep never overwrites a trial. Choose another output_dir=..., or delete the old folder."
)
_MOST_EXAMPLES = 3
_OF_THE_MODEL = ("path", "revision", "tokenizer", "add_tokens", "add_special_tokens")
_OF_THE_MACHINE = ("workers", "cache")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is known to be valid."""

    words: list[str]
    """As typed behind `-m`."""
    space: SearchSpace
    sweeper: SweeperSettings
    launcher: LocalSettings | SubmititSettings
    objectives: tuple[Objective, ...]
    watched: PruningSignal | None
    folder: TrialFolder
    base: LoadedConfig
    """The configuration with the first value of each axis."""
    points: list[strategies.Point] | None
    """All points, where they are known ahead."""
    data: dict[tuple[str, ...], str]
    """What decides the data of a point that was checked, by its values."""
    is_trusted: bool = False
    """Whether recipes may name code that is not the user's own (`--trust`)."""

    @property
    def recipe(self) -> str | None:
        """Return the recipe that all trials share."""
        varied = any(axis.name == "recipe" for axis in self.space.axes)
        return None if varied else self.base.config.recipe

    @property
    def group(self) -> str:
        """Return the name of the folder below `runs` that the sweep belongs to."""
        return run_group(_shared_choices(self.space, self.base))

    def overrides(self, trial: Trial) -> list[str]:
        """Return what a trial is started with."""
        return [
            *self.choices(trial.params),
            f"output_dir={_quote_text(str(self.folder.run(trial)))}",
            *self._tracking_overrides(),
        ]

    def choices(self, params: dict[str, str]) -> list[str]:
        """Return what makes a trial what it is: the words that hold for all, and its own values."""
        return [*self.space.fixed, *(f"{key}={text}" for key, text in params.items())]

    def _tracking_overrides(self) -> list[str]:
        """Return what groups the trials in Weights & Biases, if they are tracked there."""
        tracker = self.base.config.tracker
        # A group that the user chose is left alone.
        if "wandb" not in tracker.to or "group" in tracker.wandb:
            return []
        group = f"{self.group}/{self.folder.path.name}"
        return [f"tracker.wandb.group={_quote_text(group)}"]


def plan_sweep(
    typed_overrides: list[str],
    checking: Callable[[int], None] = lambda count: None,
    is_trusted: bool = False,
) -> SweepPlan:
    """Read and check a sweep; `checking` hears how many configurations are composed for it.

    `is_trusted` lets recipes name code that is not the user's own. Raises UserError with what is
    wrong in the search space, the settings of the sweep, or the configuration of any trial.
    """
    composed = compose_config(space.first_point(typed_overrides), with_hydra=True)
    if composed.mistakes:
        raise UserError(format_mistakes(composed.mistakes, composed))
    sweeper, launcher, mistakes = settings.read_settings(composed)
    search_space, wrong = space.read_space(typed_overrides, sweeper.params if sweeper else {})
    mistakes += [*wrong, *_check_space(search_space, sweeper, any_wrong=bool(wrong))]
    fixed, folder = _split_own_words(search_space.fixed, mistakes)
    search_space = SearchSpace(search_space.axes, tuple(fixed))
    if mistakes or sweeper is None or launcher is None:
        raise UserError(format_mistakes(mistakes, composed))
    points = _list_points(search_space, sweeper)
    first = {axis.key: axis.ends()[0] for axis in search_space.axes}
    base, data = _load_points(search_space, [first], checking, is_trusted)
    objectives, watched = _read_goal(sweeper, base, composed)
    # Of points that are not known ahead, each value and each bound is checked once, the other axes
    # at their first: settings that are wrong only together show when they are drawn.
    checked_points = points or [
        first | {axis.key: end} for axis in search_space.axes for end in axis.ends()[1:]
    ]
    different = [
        point for n, point in enumerate(checked_points) if point not in [first, *checked_points[:n]]
    ]
    if different:
        data |= _load_points(search_space, different, checking, is_trusted)[1]
    return SweepPlan(
        words=typed_overrides,
        space=search_space,
        sweeper=sweeper,
        launcher=launcher,
        objectives=objectives,
        watched=watched,
        folder=TrialFolder(folder or _default_folder(typed_overrides, sweeper, base, search_space)),
        base=base,
        points=points,
        data=data,
        is_trusted=is_trusted,
    )


def _read_goal(
    sweeper: SweeperSettings, base: LoadedConfig, composed: ComposedConfig
) -> tuple[tuple[Objective, ...], PruningSignal | None]:
    """Read what is compared and what ends bad trials; raises UserError for what is wrong."""
    objectives, mistakes = objective.read_objectives(sweeper, base.resolved)
    watched = None
    if isinstance(sweeper, OptunaSettings):
        mistakes += strategies.check_strategy(sweeper)
        if not mistakes and strategies.has_pruner(sweeper):
            seen = objective.pruning_signal(sweeper, objectives, base.resolved)
            mistakes += [seen] if isinstance(seen, Mistake) else []
            watched = seen if isinstance(seen, PruningSignal) else None
    if mistakes:
        raise UserError(format_mistakes(mistakes, composed))
    return objectives, watched


def _check_space(
    search_space: SearchSpace, sweeper: SweeperSettings | None, any_wrong: bool
) -> list[Mistake]:
    if not search_space.axes and not any_wrong:
        return [Mistake("--multirun", _NOTHING)]
    if sweeper is None or sweeper.kind != "basic":
        return []
    return [
        Mistake(
            axis.name,
            f"{axis.text} has no end of values, and a grid tries them all. "
            "Take hydra/sweeper=random or hydra/sweeper=optuna.",
        )
        for axis in search_space.axes
        if axis.is_interval
    ]


def _split_own_words(
    typed_overrides: Iterable[str], mistakes: list[Mistake]
) -> tuple[list[str], Path | None]:
    """Return the words that each trial gets, and the sweep's folder where one was typed."""
    fixed_overrides: list[str] = []
    folder: Path | None = None
    for word in typed_overrides:
        typed, _ = parse_overrides([word])
        key, override_value = (typed[0].key, typed[0].value) if typed else ("", None)
        if key == "output_dir":
            folder = Path(str(override_value))
        elif key == "overwrite" and override_value is not False:
            mistakes.append(Mistake("overwrite", _OVERWRITE))
        elif key.startswith("hydra.sweep."):
            mistakes.append(Mistake(key, "the folder of a sweep is output_dir=NAME."))
        # A name is that of the sweep's folder.
        elif key != "name" and not key.startswith(("hydra.", "hydra/")):
            fixed_overrides.append(word)
    return fixed_overrides, folder


def _list_points(
    search_space: SearchSpace, sweeper: SweeperSettings
) -> list[strategies.Point] | None:
    if isinstance(sweeper, OptunaSettings):
        return None
    if isinstance(sweeper, RandomSettings):
        return strategies.random_points(search_space, sweeper.n_trials, sweeper.seed)
    return strategies.grid_points(search_space)


def _load_points(
    search_space: SearchSpace,
    points: list[strategies.Point],
    checking: Callable[[int], None],
    is_trusted: bool,
) -> tuple[LoadedConfig, dict[tuple[str, ...], str]]:
    """Compose and check every configuration; returns the first, and what decides each one's data.

    Raises UserError with the mistakes of all.
    """
    from luthier.train.run import check_before_torch

    checking(len(points))
    bad: dict[str, list[strategies.Point]] = {}
    seen: set[str] = set()
    data: dict[tuple[str, ...], str] = {}
    base = None
    for point in points:
        try:
            loaded = load_config(
                [*search_space.fixed, *(f"{key}={text}" for key, text in point.items())],
                is_trusted,
            )
            base = base or loaded
            # check_before_torch reads files of model and data, which most points of a grid share.
            checked_settings = json.dumps([loaded.resolved["model"], loaded.resolved["dataset"]])
            if checked_settings not in seen:
                check_before_torch(loaded.config)
            seen.add(checked_settings)
            data[tuple(point.values())] = data_key(loaded.resolved)
        except UserError as error:
            # All points are checked before an error is raised, so that a grid is mended only once.
            bad.setdefault(str(error), []).append(point)
    if bad or base is None:
        raise UserError(_describe_bad_points(bad, len(points)))
    return base, data


def data_key(resolved: dict[str, Any]) -> str:
    """Return what decides a configuration's encoded rows: those with the same text share them."""
    model, dataset = resolved["model"], resolved["dataset"]
    # The weights' format and the device change no token: such trials share their rows.
    of_model = {name: model[name] for name in _OF_THE_MODEL}
    of_data = {name: setting for name, setting in dataset.items() if name not in _OF_THE_MACHINE}
    method = resolved["trainer"]["method"]
    return json.dumps([of_model, of_data, resolved["chat"], method], sort_keys=True)


def _describe_bad_points(bad: dict[str, list[strategies.Point]], total: int) -> str:
    """Return the mistakes of all trials; one that all share is said as in a single run."""
    texts = []
    for text, points in islice(bad.items(), _MOST_EXAMPLES):
        point_text = " ".join(f"{key}={value}" for key, value in points[0].items())
        of_all = len(points) == total
        texts.append(
            text if of_all else f"{point_text} ({len(points)} of {total} checked):\n{text}"
        )
    more = len(bad) - _MOST_EXAMPLES
    return "\n".join(texts) + (f"\nand {more} further kinds of mistakes" if more > 0 else "")


def _default_folder(
    typed_overrides: list[str],
    sweeper: SweeperSettings,
    base: LoadedConfig,
    search_space: SearchSpace,
) -> Path:
    """Name the folder of a sweep that names none by its words, so that it is found again."""
    strategy_names = [] if sweeper.kind == "basic" else [sweeper.kind]
    config = _shared_choices(search_space, base)
    return Path(run_folder(config, [*strategy_names, *typed_overrides], "sweeps"))


def _shared_choices(search_space: SearchSpace, base: LoadedConfig) -> dict[str, Any]:
    """Return the config without the model or the dataset where these vary.

    Where the recipe varies, all recipes stand in its place.
    """
    config = dict(base.recorded)
    for axis in search_space.axes:
        if axis.name == "recipe":
            return {"recipe": "-".join(axis.values), "name": config.get("name")}
        if axis.name in ("model", "model.path", "dataset", "dataset.path"):
            config.pop(axis.name.split(".")[0], None)
    return config


def _quote_text(text: str) -> str:
    """Return a text as Hydra's grammar takes it, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# A sweep's folder: taken by one sweep at a time, and only by the one that made it. flock and not a
# POSIX record lock: guards inherit the open file and hold the lock too, and so a folder stays taken
# until the last process of an ended sweep is gone.

_PATIENCE = 15.0
"""Seconds beyond their grace in which trials of an ended sweep must be gone."""


def lock_sweep(sweep: SweepPlan) -> int:
    """Make or find the sweep's folder and lock it; returns the open lock.

    Raises UserError where another sweep lies there, or this one runs already.
    """
    path = sweep.folder.path
    if path.exists() and not sweep.folder.definition.is_file() and any(path.iterdir()):
        raise UserError(
            f"output_dir: {path} holds files that are no sweep. Choose another output_dir=..."
        )
    with explain_write_errors(path, "output_dir"):
        (path / "state").mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path, sweep.launcher.grace)
        _refuse_other_sweep(sweep)
        write_json(sweep.folder.definition, _describe_sweep(sweep))
        write_text(path / "base.yaml", to_yaml(sweep.base.recorded))
    return lock


def is_running(path: Path) -> bool:
    """Return whether a sweep or one of its trials lives in this folder."""
    file = path / "lock"
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        try:
            # A shared lock: two who look at the same time do not take each other for a sweep.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _take_lock(path: Path, grace: float) -> int:
    """Take the lock, which every guard of a trial holds too; wait for those of an ended sweep."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + grace + _PATIENCE
    waited = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            # The file names the sweep; if that process is gone, guards of its trials hold the lock.
            owner = os.read(lock, 20).decode().strip()
            os.lseek(lock, 0, os.SEEK_SET)
            if owner.isdigit() and psutil.pid_exists(int(owner)):
                raise UserError(
                    f"{path} is being swept by process {owner}. `luthier sweep {path}` shows how "
                    "it stands."
                ) from None
            if time.monotonic() > deadline:
                raise UserError(f"{path}: trials of an ended sweep still run. End them.") from None
            if not waited:
                print("waiting for the trials of the ended sweep to stop", flush=True)
            waited = True
            time.sleep(0.2)
    # The number of an earlier sweep may have had more digits.
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _describe_sweep(sweep: SweepPlan) -> dict[str, Any]:
    """Return what is searched, as `sweep.json` has it."""
    return {
        "luthier": luthier.__version__,
        "recipe": sweep.recipe,
        "words": [redact_override(word) for word in sweep.words],
        "identity": _describe_identity(sweep),
        "objectives": {objective.name: objective.direction for objective in sweep.objectives},
        "total": len(sweep.points) if sweep.points is not None else _count_trials(sweep),
    }


def _count_trials(sweep: SweepPlan) -> int:
    assert isinstance(sweep.sweeper, RandomSettings)
    return sweep.sweeper.n_trials


def _describe_identity(sweep: SweepPlan) -> dict[str, Any]:
    """Return what must not change while a sweep goes on."""
    sweeper = sweep.sweeper
    typed, _ = parse_overrides(sweep.space.fixed)
    fixed = [override for override in typed if override.key.split(".")[0] not in NEUTRAL_KEYS]
    identity: dict[str, Any] = {
        "hydra/sweeper": sweeper.kind,
        "words": sorted(redact_override(override.line) for override in fixed),
        "params": {axis.name: axis.text for axis in sweep.space.axes},
    }
    if isinstance(sweeper, RandomSettings):
        # More trials with the same seed continue a list; another seed is another list.
        identity["seed"] = sweeper.seed
    if isinstance(sweeper, OptunaSettings):
        # A study holds its directions; a grid can be compared by another objective afterwards.
        identity["objective"] = {
            objective.name: objective.direction for objective in sweep.objectives
        }
    return identity


def _refuse_other_sweep(sweep: SweepPlan) -> None:
    """Refuse a folder in which something else was searched, or whose recipe has changed."""
    old = sweep.folder.read_definition()
    if old is None:
        return
    new = _describe_identity(sweep)
    lines = [str(change) for change in compare_configs(old["identity"], new)]
    file = sweep.folder.path / "base.yaml"
    before = load_yaml(file, dict[str, Any], "Put it back from a copy, or remove it.")
    if not lines and before is not None:
        lines = [str(change) for change in compare_configs(before, sweep.base.recorded)]
    if lines:
        change_lines = "\n".join(f"  {line}" for line in lines[:10])
        raise UserError(
            f"output_dir: {sweep.folder.path} holds another sweep:\n{change_lines}\n"
            "Choose another output_dir=..., or type what was typed there."
        )
