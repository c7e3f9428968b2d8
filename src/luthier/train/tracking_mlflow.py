"""MLflow: one run there for one run here, however often it stops and goes on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.config.schema import TrackerConfig
from luthier.errors import UserError
from luthier.record.config_diff import flat
from luthier.train.stopping import Stopped

_LONGEST = 500
"""Characters of a parameter: MLflow refuses more than 6,000, and shows far fewer."""
_AT_ONCE = 100


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
        _log_settings(settings | {}, given.tags)
    status = "FAILED"
    try:
        yield {"id": run.info.run_id, "uri": mlflow.get_tracking_uri()}
        status = "KILLED" if stopped() else "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)


def log_results_to_mlflow(results: dict[str, Any]) -> None:
    """Put the results beside the metrics."""
    import mlflow

    mlflow.log_metrics({f"result/{n}": v for n, v in results.items() if v is not None})


def log_files_to_mlflow(files: list[Path], model: Path | None) -> None:
    """Keep the run's files as artefacts, and the model."""
    import mlflow

    for file in files:
        mlflow.log_artifact(str(file))
    if model is not None:
        mlflow.log_artifacts(str(model), "model")


def _log_settings(settings: dict[str, Any], tags: dict[str, str]) -> None:
    import mlflow

    values = list({key: str(value)[:_LONGEST] for key, value in flat(settings).items()}.items())
    for start in range(0, len(values), _AT_ONCE):
        mlflow.log_params(dict(values[start : start + _AT_ONCE]))
    mlflow.set_tags(tags)
