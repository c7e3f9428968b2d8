"""What a config may say about what is kept of a run: its checkpoints, and its metrics elsewhere."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from luthier.config.strict import Strict

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?b)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CheckpointsConfig(Strict):
    """How many checkpoints are kept, besides what `trainer.args.save_total_limit` says."""

    budget: str | None = None
    """The most that all of them together take, such as `20GB`; the newest and the best stay."""

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if value is not None and not _SIZE.fullmatch(str(value)):
            raise ValueError("write a size with its unit, such as 500MB, 20GB or 1.5TB")
        return value

    @property
    def bytes(self) -> int | None:
        """The budget in bytes."""
        found = _SIZE.fullmatch(self.budget or "")
        return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None


class MlflowConfig(Strict):
    """Where MLflow keeps a run."""

    uri: str | None = None
    """The tracking server, or a folder or database; null for `mlflow` in the run's folder."""
    experiment: str = "luthier"
    """The experiment; it is made if it is not there."""
    name: str | None = None
    """The run's name; null for recipe/folder."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""


class TrackioConfig(Strict):
    """Where Trackio keeps a run."""

    project: str = "luthier"
    """The project."""
    space_id: str | None = None
    """A space of the hub to which the run is sent; null for this machine alone."""


class TrackerConfig(Strict):
    """Where metrics go besides `metrics.jsonl`."""

    to: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(default_factory=list)
    """The trackers; each needs its package (the extra of its name)."""
    artifacts: bool = False
    """Give wandb and MLflow the trained model, too, and not only the run's small files."""
    wandb: dict[str, Any] = Field(default_factory=dict)
    """Passed to `wandb.init`: project, entity, name, group, tags, mode, ..."""
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    """Settings of MLflow."""
    trackio: TrackioConfig = Field(default_factory=TrackioConfig)
    """Settings of Trackio."""
