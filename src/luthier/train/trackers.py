"""Trackers besides `metrics.jsonl`: opened before the trainer, told the results, closed after.

A run is one run in each of them, however often it stops and goes on: their ids stand in its record.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig, TrackerConfig
from luthier.errors import UserError
from luthier.record.config_diff import flatten_config
from luthier.record.record import RunRecord
from luthier.redaction import redact, redact_override
from luthier.terminal import unguarded_output
from luthier.train.signals import STOPPED_EXIT_CODE, StoppedBySignal

# Files of the run's folder that a tracker keeps beside the metrics.
_TRACKED_FILES = (
    *("run.json", "config.yaml", "overrides.yaml"),
    *("metrics.jsonl", "replies.jsonl", "loss.png"),
)
# MLflow refuses parameters of more than 6,000 characters, and shows far fewer; and it refuses more
# than 100 parameters in one call.
_MAX_PARAM_CHARS = 500
_PARAMS_PER_CALL = 100


def check_trackers_installed(config: RunConfig) -> None:
    """Raise UserError, before anything heavy is imported, for a tracker that is not installed."""
    for name in config.tracker.to:
        if importlib.util.find_spec(name) is None:
            # wandb is a dependency of luthier itself, the others are extras.
            package = name if name == "wandb" else f"'luthier[{name}]'"
            raise UserError(
                f"tracker.to: the package {name} is not installed. Install it with\n"
                f"    pip install {package}\nor leave the tracker out: tracker=none"
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
    settings = redact(resolved)
    name = f"{config.recipe or folder.absolute().parent.name}/{folder.name}"
    opened = {}
    with ExitStack() as stack:
        stack.enter_context(_redacted_trainer_arguments())
        for tracker, open_tracker in (("wandb", _open_wandb), ("mlflow", _open_mlflow)):
            if tracker in config.tracker.to:
                run = open_tracker(config.tracker, settings, name, record)
                opened[tracker] = stack.enter_context(run)
        if opened:
            record.update(trackers=record.entries.get("trackers", {}) | opened)
        yield


@contextmanager
def _redacted_trainer_arguments() -> Iterator[None]:
    """Have transformers' callbacks give the trackers a trainer's arguments without secrets.

    They call `to_dict` (transformers 5.23), and hide no more than what ends in `_token`.
    """
    from transformers import TrainingArguments

    to_dict = TrainingArguments.to_dict
    TrainingArguments.to_dict = lambda self: redact(to_dict(self))
    try:
        yield
    finally:
        TrainingArguments.to_dict = to_dict


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Show the process's command line without secrets to who reads it within the block."""
    typed = sys.argv
    sys.argv = [redact_override(word) for word in typed]
    try:
        yield
    finally:
        sys.argv = typed


def log_results(config: RunConfig, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results and the sample replies where the trackers show them."""
    if "wandb" in config.tracker.to:
        import wandb

        assert wandb.run is not None
        wandb.run.summary.update(results)
        if rows:
            wandb.log({"replies": _wandb_table(rows)})
    if "mlflow" in config.tracker.to:
        import mlflow

        values = {f"result/{name}": value for name, value in results.items() if value is not None}
        mlflow.log_metrics(values)


def log_files(config: RunConfig, folder: Path) -> None:
    """Give the trackers the run's small files, and with `tracker.artifacts` the model too."""
    files = [folder / name for name in _TRACKED_FILES if (folder / name).is_file()]
    model = folder / "model" if config.tracker.artifacts else None
    if "wandb" in config.tracker.to:
        import wandb

        assert wandb.run is not None
        artifact = wandb.Artifact(f"run-{wandb.run.id}", type="run")
        for file in files:
            artifact.add_file(str(file))
        wandb.run.log_artifact(artifact)
        if model is not None:
            weights = wandb.Artifact(f"model-{wandb.run.id}", type="model")
            weights.add_dir(str(model))
            wandb.run.log_artifact(weights)
    if "mlflow" in config.tracker.to:
        import mlflow

        for file in files:
            mlflow.log_artifact(str(file))
        if model is not None:
            mlflow.log_artifacts(str(model), "model")


def log_replies(config: RunConfig, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table; `name` is the evaluation set's."""
    if "wandb" in config.tracker.to and rows:
        import wandb

        key = f"eval/{name}_replies" if name else "eval/replies"
        # transformers logs its numbers against this step, not wandb's own.
        wandb.log({key: _wandb_table(rows), "train/global_step": step})


@contextmanager
def _open_wandb(
    config: TrackerConfig, settings: dict[str, Any], name: str, record: RunRecord
) -> Iterator[dict[str, Any]]:
    """Keep a run of Weights & Biases open, the one of the record if it has one; yield its id."""
    import wandb

    run_id = _recorded_id(record, "wandb")
    options: dict[str, Any] = {"project": "luthier", "name": name, "dir": str(record.path.parent)}
    if run_id is not None:
        # `allow` and not `must`: a run that was recorded offline is not on the server yet.
        options |= {"id": run_id, "resume": "allow"}
    try:
        # wandb 0.31 records the command line of the process, in wandb-metadata.json; and what is
        # printed, by a hook in the streams, which must stand behind those that hide secrets.
        with _redacted_command_line(), unguarded_output():
            run = wandb.init(**options | config.wandb, config=settings)
    except (TypeError, ValueError, wandb.errors.Error) as error:
        raise UserError(
            f"tracker.wandb: {error}\nWithout an account or a network: tracker.wandb.mode=offline"
        ) from error
    code = 1
    try:
        yield {"id": run.id, "project": run.project, "url": run.url}
        code = STOPPED_EXIT_CODE if _is_stopped(record) else 0
    except StoppedBySignal:
        code = STOPPED_EXIT_CODE
        raise
    finally:
        # Shown as preempted and not as crashed, since the same run goes on later.
        if code == STOPPED_EXIT_CODE:
            run.mark_preempting()
        run.finish(exit_code=code)


@contextmanager
def _open_mlflow(
    config: TrackerConfig, settings: dict[str, Any], name: str, record: RunRecord
) -> Iterator[dict[str, Any]]:
    """Keep a run of MLflow open, the one of the record if it has one; yield its id and address."""
    import mlflow

    run_id, options = _recorded_id(record, "mlflow"), config.mlflow
    # Without a server: files, which need no database and no further package.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    local = (record.path.parent / "mlflow").resolve().as_uri()
    mlflow.set_tracking_uri(options.uri or os.environ.get("MLFLOW_TRACKING_URI") or local)
    try:
        mlflow.set_experiment(options.experiment)
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else options.name or name)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"tracker.mlflow: {error}") from error
    if run_id is None:
        flat = flatten_config(settings).items()
        # Only once: MLflow refuses a parameter of a run that comes again with another value.
        params = [(key, str(value)[:_MAX_PARAM_CHARS]) for key, value in flat]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            mlflow.log_params(dict(params[start : start + _PARAMS_PER_CALL]))
        mlflow.set_tags(options.tags)
    status = "FAILED"
    try:
        yield {"id": run.info.run_id, "uri": mlflow.get_tracking_uri()}
        status = "KILLED" if _is_stopped(record) else "FINISHED"
    except StoppedBySignal:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)


def _recorded_id(record: RunRecord, tracker: str) -> str | None:
    """Return the id that a tracker gave this run when it began; None for a new run."""
    run = record.entries.get("trackers", {}).get(tracker)
    return run["id"] if run else None


def _is_stopped(record: RunRecord) -> bool:
    """Return whether the run ended by a signal, from which it goes on."""
    return record.entries.get("status") == "stopped"


def _wandb_table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[str(row[c]) for c in columns] for row in rows])
