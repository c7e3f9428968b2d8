"""From a RunConfig to the trainer's own arguments: what the user set, and what luthier must set."""

from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError


def sft_arguments(config: RunConfig, machine: Any, folder: Path, has_eval: bool) -> Any:
    """The `trl.SFTConfig` of a run.

    Rows come as tokens and labels already, so everything in TRL that would touch them is off.
    `machine` is a `luthier.model.machine.Machine`.
    """
    from trl import SFTConfig

    settings: dict[str, Any] = {
        # A NaN must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "bf16": machine.dtype == "bfloat16",
        "fp16": machine.dtype == "float16",
        # Page-locked memory is for copies to a GPU.
        "dataloader_pin_memory": machine.kind == "cuda",
        "prediction_loss_only": True,
    }
    settings |= config.trainer.args
    if not has_eval:
        settings["eval_strategy"] = "no"
    settings |= {
        "output_dir": str(folder / "checkpoints"),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": machine.kind == "cpu",
        "max_length": None,
        "packing": False,
        "assistant_only_loss": False,
        "completion_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": list(config.tracker.to),
        "run_name": run_name(config, folder),
    }
    try:
        return SFTConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer.args: {error}") from error


def run_name(config: RunConfig, folder: Path) -> str:
    """What trackers call the run."""
    return f"{config.recipe}/{folder.name}" if config.recipe else folder.name
