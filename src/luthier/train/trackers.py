"""Trackers besides `metrics.jsonl`: opened before the trainer, told the results, closed after."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError


@contextmanager
def tracking(
    config: RunConfig, resolved: dict[str, Any], folder: Path, main: bool
) -> Iterator[None]:
    """Keep the configured trackers open, on the main process."""
    # transformers' callback takes the folder from the environment alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if not main or "wandb" not in config.tracker.to:
        yield
        return
    import wandb

    settings = {"project": "luthier", "name": f"{config.recipe or 'custom'}/{folder.name}"}
    try:
        run = wandb.init(
            **{**settings, "dir": str(folder), **config.tracker.wandb, "config": resolved}
        )
    except (TypeError, wandb.errors.Error) as error:
        raise UserError(
            f"tracker.wandb: {error}\nWithout an account or a network: tracker.wandb.mode=offline"
        ) from error
    failed = True
    try:
        yield
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def log_results(config: RunConfig, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results and the sample replies where the trackers show them."""
    if "wandb" not in config.tracker.to:
        return
    import wandb

    assert wandb.run is not None
    wandb.run.summary.update(results)
    if rows:
        wandb.log({"replies": _table(rows)})


def log_replies(config: RunConfig, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Put the replies of one evaluation into a table; `name` is the evaluation set's."""
    if "wandb" not in config.tracker.to or not rows:
        return
    import wandb

    # transformers logs its numbers against this one.
    key = f"eval/{name}_replies" if name else "eval/replies"
    wandb.log({key: _table(rows), "train/global_step": step})


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[str(row[c]) for c in columns] for row in rows])
