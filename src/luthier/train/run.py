"""The order of a run: everything that can fail cheaply first, then the model, then the training."""

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import data, model
from luthier.config.schema import ModelConfig, RunConfig
from luthier.model.weights import CHATTY
from luthier.record import rundir
from luthier.record.record import RunRecord
from luthier.train import launch
from luthier.train.batching import batching_of

if TYPE_CHECKING:
    from luthier.config import Loaded


def run(loaded: "Loaded") -> int:
    """Train what the config says; return the exit code. Raises UserError for a user's mistake."""
    config, folder = loaded.config, Path(loaded.config.output_dir)
    set_environment(config)
    check(config)
    state = claim(loaded, folder)
    if state == "finished":
        from luthier.train import report

        report.say(f"{folder} holds this run, finished; overwrite=true trains it again.\n")
        report.show_results(RunRecord(folder).entries, folder)
        return 0
    from luthier.train.build import train

    return train(loaded, folder)


def check(config: RunConfig) -> None:
    """Everything that can be known to be wrong without a heavy import."""
    data.check_files(config.dataset, config.trainer.method)
    model.check_path(config.model)
    if config.trainer.teacher is not None:
        model.check_path(ModelConfig(path=config.trainer.teacher), "trainer.teacher")
    batching_of(config)
    launch.check_before()


def claim(loaded: "Loaded", folder: Path) -> rundir.Claim:
    """Take the run's directory, on the first rank; the others only ask whether all is done."""
    overwrite = loaded.config.overwrite
    if int(os.environ.get("RANK", "0")) > 0:
        return "finished" if not overwrite and rundir.is_finished(folder) else "unfinished"
    state = rundir.claim(folder, loaded.resolved, overwrite)
    if state == "new" and not loaded.config.dry_run:
        rundir.clear(folder)
    if state != "finished" and not loaded.config.dry_run:
        rundir.prepare(folder, loaded.resolved, loaded.overrides)
    return state


def set_environment(config: RunConfig) -> None:
    """What the libraries read from the environment, set before any of them is imported."""
    settings: dict[str, Any] = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if config.deterministic:
        settings |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    os.environ |= settings
    # What the libraries call each other by is nothing that a user could mend.
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|trl\.|peft\.")
    # Waiting threads that spin would starve every other process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
