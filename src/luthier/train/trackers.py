"""Trackers besides `metrics.jsonl`: opened before the trainer, told the results, closed after.

A run that goes on is the same run in each of them: their ids stand in its record.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig, TrackerConfig
from luthier.errors import UserError
from luthier.record.config_diff import flatten_config
from luthier.record.record import RunRecord
from luthier.record.secrets import redact_secrets
from luthier.train.signals import STOPPED_EXIT_CODE, StoppedBySignal

# Weights & Biases: one run there for one run here, however often it stops and goes on.


@contextmanager
def open_wandb(
    config: TrackerConfig,
    settings: dict[str, Any],
    folder: Path,
    name: str,
    known: str | None,
    stopped: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Keep a run open; its id and address.

    `known`: the id of the run that goes on; `stopped`: asked at the end.
    """
    import wandb

    own: dict[str, Any] = {"project": "luthier", "name": name, "dir": str(folder)}
    if known is not None:
        own |= {"id": known, "resume": "allow"}
    try:
        run = wandb.init(**own | config.wandb, config=settings)
    except (TypeError, ValueError, wandb.errors.Error) as error:
        raise UserError(
            f"tracker.wandb: {error}\nWithout an account or a network: tracker.wandb.mode=offline"
        ) from error
    code = 1
    try:
        yield {"id": run.id, "project": run.project, "url": run.url}
        code = STOPPED_EXIT_CODE if stopped() else 0
    except StoppedBySignal:
        code = STOPPED_EXIT_CODE
        raise
    finally:
        if code == STOPPED_EXIT_CODE:
            run.mark_preempting()
        run.finish(exit_code=code)


def log_results_to_wandb(results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results into the summary, and the replies into a table."""
    import wandb

    assert wandb.run is not None
    wandb.run.summary.update(results)
    if rows:
        wandb.log({"replies": _wandb_table(rows)})


def log_replies_to_wandb(name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table."""
    import wandb

    # transformers logs its numbers against this one.
    key = f"eval/{name}_replies" if name else "eval/replies"
    wandb.log({key: _wandb_table(rows), "train/global_step": step})


def log_files_to_wandb(files: list[Path], model: Path | None) -> None:
    """Keep the run's files as an artifact, and the model as another."""
    import wandb

    assert wandb.run is not None
    record = wandb.Artifact(f"run-{wandb.run.id}", type="run")
    for file in files:
        record.add_file(str(file))
    wandb.run.log_artifact(record)
    if model is not None:
        weights = wandb.Artifact(f"model-{wandb.run.id}", type="model")
        weights.add_dir(str(model))
        wandb.run.log_artifact(weights)


def _wandb_table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[str(row[c]) for c in columns] for row in rows])


# MLflow: one run there for one run here, however often it stops and goes on.

_MAX_PARAM_CHARS = 500
"""Characters of a parameter: MLflow refuses more than 6,000, and shows far fewer."""
_PARAMS_PER_CALL = 100


@contextmanager
def open_mlflow(
    config: TrackerConfig,
    settings: dict[str, Any],
    folder: Path,
    name: str,
    known: str | None,
    stopped: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Keep a run open; its id and place.

    `known`: the id of the run that goes on; `stopped`: asked at the end.
    """
    import mlflow

    given = config.mlflow
    # Without a server: files, which need no database and no further package.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(
        given.uri or os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
    )
    try:
        mlflow.set_experiment(given.experiment)
        run = mlflow.start_run(run_id=known, run_name=None if known else given.name or name)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"tracker.mlflow: {error}") from error
    if known is None:
        _log_mlflow_params(settings | {}, given.tags)
    status = "FAILED"
    try:
        yield {"id": run.info.run_id, "uri": mlflow.get_tracking_uri()}
        status = "KILLED" if stopped() else "FINISHED"
    except StoppedBySignal:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)


def log_results_to_mlflow(results: dict[str, Any]) -> None:
    """Put the results beside the metrics."""
    import mlflow

    mlflow.log_metrics({f"result/{n}": v for n, v in results.items() if v is not None})


def log_files_to_mlflow(files: list[Path], model: Path | None) -> None:
    """Keep the run's files as artifacts, and the model."""
    import mlflow

    for file in files:
        mlflow.log_artifact(str(file))
    if model is not None:
        mlflow.log_artifacts(str(model), "model")


def _log_mlflow_params(settings: dict[str, Any], tags: dict[str, str]) -> None:
    import mlflow

    values = list(
        {
            key: str(value)[:_MAX_PARAM_CHARS] for key, value in flatten_config(settings).items()
        }.items()
    )
    for start in range(0, len(values), _PARAMS_PER_CALL):
        mlflow.log_params(dict(values[start : start + _PARAMS_PER_CALL]))
    mlflow.set_tags(tags)


_TRACKED_FILES = (
    "run.json",
    "config.yaml",
    "overrides.yaml",
    "metrics.jsonl",
    "replies.jsonl",
    "loss.png",
)
"""Files of the run's folder that a tracker keeps beside the metrics."""


def check_trackers_installed(config: RunConfig) -> None:
    """Raise UserError, before anything heavy is imported, for a tracker that is not installed."""
    for name in config.tracker.to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracker.to: the package {name} is not installed. Install it with\n"
                f"    pip install 'luthier[{name}]'\nor leave the tracker out: tracker=none"
            )


@contextmanager
def open_trackers(
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
    settings = redact_secrets(resolved)
    name = f"{config.recipe or 'custom'}/{folder.name}"
    stopped = partial(_is_stopped, record)
    ids = {key: run["id"] for key, run in record.entries.get("trackers", {}).items()}
    with ExitStack() as open_ones:
        opened = {}
        for key, open_tracker in (
            ("wandb", open_wandb),
            ("mlflow", open_mlflow),
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
        log_results_to_wandb(results, rows)
    if "mlflow" in config.tracker.to:
        log_results_to_mlflow(results)


def log_files(config: RunConfig, folder: Path) -> None:
    """Give the trackers the run's small files, and with `tracker.artifacts` the model too."""
    files = [folder / name for name in _TRACKED_FILES if (folder / name).is_file()]
    model = folder / "model" if config.tracker.artifacts else None
    if "wandb" in config.tracker.to:
        log_files_to_wandb(files, model)
    if "mlflow" in config.tracker.to:
        log_files_to_mlflow(files, model)


def log_replies(config: RunConfig, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table; `name` is the evaluation set's."""
    if "wandb" in config.tracker.to and rows:
        log_replies_to_wandb(name, rows, step)
