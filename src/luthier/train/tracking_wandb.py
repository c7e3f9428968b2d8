"""Weights & Biases: one run there for one run here, however often it stops and goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.config.schema import TrackerConfig
from luthier.errors import UserError
from luthier.train.stopping import STOPPED, Stopped


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
        code = STOPPED if stopped() else 0
    except Stopped:
        code = STOPPED
        raise
    finally:
        if code == STOPPED:
            run.mark_preempting()
        run.finish(exit_code=code)


def log_results_to_wandb(results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results into the summary, and the replies into a table."""
    import wandb

    assert wandb.run is not None
    wandb.run.summary.update(results)
    if rows:
        wandb.log({"replies": _table(rows)})


def log_replies_to_wandb(name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table."""
    import wandb

    # transformers logs its numbers against this one.
    key = f"eval/{name}_replies" if name else "eval/replies"
    wandb.log({key: _table(rows), "train/global_step": step})


def log_files_to_wandb(files: list[Path], model: Path | None) -> None:
    """Keep the run's files as an artefact, and the model as another."""
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


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[str(row[c]) for c in columns] for row in rows])
