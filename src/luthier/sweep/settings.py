"""The settings of a sweep: `hydra/sweeper` and `hydra/launcher`, strict, with the nearest name."""

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic import ValidationError as Invalid

from luthier.config.compose import ComposedConfig
from luthier.errors import Mistake, format_value, nearest_option, suggest_options

Direction = Literal["minimize", "maximize"]
Auto = Literal["auto"]
Slots = Auto | PositiveInt
Named = str | dict[str, Any]
"""A name, or a mapping of `name` and settings."""


class SweepSettings(BaseModel):
    """A group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SweeperSettings(SweepSettings):
    """What every sweeper takes."""

    kind: Literal["basic", "random", "optuna"]
    params: dict[str, Any] = Field(default_factory=dict)
    objective: str | list[str] | dict[str, Direction | None] | None = None
    on_failure: Literal["continue", "stop"] = "continue"
    retry_failed: bool = False


class RandomSettings(SweeperSettings):
    """Points drawn at random."""

    n_trials: PositiveInt = 20
    seed: NonNegativeInt = 0


class OptunaSettings(RandomSettings):
    """Points that Optuna chooses by what came out so far."""

    # The study knows a failed point and draws others; trying it again would tell it twice.
    retry_failed: Literal[False] = False
    sampler: Named = "tpe"
    pruner: Named = "none"
    prune_by: str | None = None


class LauncherSettings(SweepSettings):
    """What every launcher takes."""

    kind: Literal["basic", "submitit"]
    accelerate: str | list[str] | None = None
    gpus_per_trial: Auto | Annotated[float, Field(gt=0)] = "auto"
    grace: NonNegativeFloat = 60.0
    restarts: NonNegativeInt = 3

    def launch_words(self) -> list[str] | None:
        """Return the flags of `accelerate launch` for each trial; None if it was not asked for."""
        setting = self.accelerate
        return shlex.split(setting) if isinstance(setting, str) else setting


class LocalSettings(LauncherSettings):
    """Trials as processes of this machine."""

    slots: Slots = "auto"
    gpus: Auto | list[int | str] = "auto"


class SubmititSettings(LauncherSettings):
    """Trials as jobs of a cluster."""

    cluster: Literal["slurm", "local"] = "slurm"
    slots: PositiveInt = 16
    parameters: dict[str, Any] = Field(default_factory=dict)


_SWEEPERS: dict[str, type[SweepSettings]] = {
    "basic": SweeperSettings,
    "random": RandomSettings,
    "optuna": OptunaSettings,
}
_LAUNCHERS: dict[str, type[SweepSettings]] = {"basic": LocalSettings, "submitit": SubmititSettings}
_WORDS = {
    "slots": "Write how many trials run side by side, at least 1, or auto.",
    "n_trials": "Write how many trials the sweep has, at least 1.",
    "gpus_per_trial": "Write a number above 0, or auto.",
    "gpus": "Write a list such as [0,1], or auto.",
    "objective": "Write a name, a list of names, or {NAME: minimize, OTHER: maximize}.",
    "on_failure": "Write continue or stop.",
    "retry_failed": "Write true or false; Optuna draws other points instead.",
    "accelerate": "Write flags of `accelerate launch`, such as '--multi_gpu --num_processes 2'.",
}


def read_settings(
    composed: ComposedConfig,
) -> tuple[SweeperSettings | None, LocalSettings | SubmititSettings | None, list[Mistake]]:
    """Return the settings of the sweeper and the launcher that were chosen, or what is wrong."""
    mistakes: list[Mistake] = []
    settings: dict[str, Any] = {}
    for group, models in (("sweeper", _SWEEPERS), ("launcher", _LAUNCHERS)):
        assert composed.config is not None
        node = OmegaConf.select(composed.config, f"hydra.{group}")
        values: Any = OmegaConf.to_container(node, resolve=True) if node is not None else {}
        model = models.get(str(values.get("kind")))
        if model is None:
            suggestion = suggest_options(str(values.get("kind")), models)
            mistakes.append(Mistake(f"hydra/{group}", f"kind {values.get('kind')!r}. {suggestion}"))
            continue
        try:
            settings[group] = model.model_validate(values)
        except Invalid as error:
            mistakes += _describe_errors(error, f"hydra.{group}", values, model)
    return settings.get("sweeper"), settings.get("launcher"), mistakes


def _describe_errors(
    error: Invalid, key_prefix: str, values: Mapping[str, Any], model: type[BaseModel]
) -> list[Mistake]:
    wrong: dict[str, Mistake] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        key = f"{key_prefix}.{name}"
        if detail["type"] == "extra_forbidden":
            text = _describe_unknown_setting(name, key_prefix, values, model)
        else:
            fits = _WORDS.get(name) or f"{detail['msg']}."
            text = f"{format_value(values.get(name))} does not fit. {fits}"
        # A union reports each of its members; one mistake for a key is enough.
        wrong.setdefault(key, Mistake(key, text))
    return list(wrong.values())


def _describe_unknown_setting(
    name: str, key_prefix: str, values: Mapping[str, Any], model: type[BaseModel]
) -> str:
    names = [key for key in model.model_fields if key != "kind"]
    near = nearest_option(name, names)
    if near is not None:
        return f"there is no such setting. Did you mean {key_prefix}.{near}?"
    models = _SWEEPERS if key_prefix.endswith("sweeper") else _LAUNCHERS
    takers = [option for option, model_class in models.items() if name in model_class.model_fields]
    if takers:
        return f"{values['kind']} has no such setting; {' and '.join(takers)} have it."
    return f"there is no such setting. Settings: {', '.join(names)}."
