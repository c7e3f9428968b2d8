"""Trackers besides `metrics.jsonl`: opened before the trainer, told the results, closed after.

A run that goes on is the same run in each of them: their ids stand in its record.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.record.record import RunRecord
from luthier.record.secrets import redacted
from luthier.train import tracking_mlflow, tracking_wandb

_KEPT = ("run.json", "config.yaml", "overrides.yaml", "metrics.jsonl", "replies.jsonl", "loss.png")
"""Files of the run's folder that a tracker keeps beside the metrics."""


def check_installed(config: RunConfig) -> None:
    """Raise UserError, before anything heavy is imported, for a tracker that is not installed."""
    for name in config.tracker.to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracker.to: the package {name} is not installed. Install it with\n"
                f"    pip install 'luthier[{name}]'\nor leave the tracker out: tracker=none"
            )


@contextmanager
def tracking(
    config: RunConfig, resolved: dict[str, Any], folder: Path, record: RunRecord | None
) -> Iterator[None]:
    """Keep the configured trackers open, on the main process; `record` is None on the others."""
    # transformers' callbacks take these from the environment alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.environ["HF_MLFLOW_LOG_ARTIFACTS"] = os.environ["WANDB_LOG_MODEL"] = "false"
    os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"
    if record is None:
        yield
        return
    settings = redacted(resolved)
    name = f"{config.recipe or 'custom'}/{folder.name}"
    stopped = partial(_is_stopped, record)
    ids = {key: run["id"] for key, run in record.entries.get("trackers", {}).items()}
    with ExitStack() as open_ones:
        opened = {}
        for key, open_tracker in (
            ("wandb", tracking_wandb.open_wandb),
            ("mlflow", tracking_mlflow.open_mlflow),
        ):
            if key in config.tracker.to:
                run = open_tracker(config.tracker, settings, folder, name, ids.get(key), stopped)
                opened[key] = open_ones.enter_context(run)
        if opened:
            record.update(trackers=record.entries.get("trackers", {}) | opened)
        yield


def _is_stopped(record: RunRecord) -> bool:
    """Whether the run ended by a signal, from which it goes on."""
    return record.entries.get("status") == "stopped"


def log_results(config: RunConfig, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results and the sample replies where the trackers show them."""
    if "wandb" in config.tracker.to:
        tracking_wandb.log_results_to_wandb(results, rows)
    if "mlflow" in config.tracker.to:
        tracking_mlflow.log_results_to_mlflow(results)


def log_files(config: RunConfig, folder: Path) -> None:
    """Give the trackers the run's small files, and with `tracker.artifacts` the model too."""
    files = [folder / name for name in _KEPT if (folder / name).is_file()]
    model = folder / "model" if config.tracker.artifacts else None
    if "wandb" in config.tracker.to:
        tracking_wandb.log_files_to_wandb(files, model)
    if "mlflow" in config.tracker.to:
        tracking_mlflow.log_files_to_mlflow(files, model)


def log_replies(config: RunConfig, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table; `name` is the evaluation set's."""
    if "wandb" in config.tracker.to and rows:
        tracking_wandb.log_replies_to_wandb(name, rows, step)
