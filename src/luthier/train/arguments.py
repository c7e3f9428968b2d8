"""From a RunConfig to the trainer's own arguments: what the user set, and what luthier must set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.config.cross_checks import ROUTER_LOSS_OF_A_BATCH
from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.model.device import check_gpu_settings
from luthier.model.load import read_model_config
from luthier.model.trainable import find_skipped_parameters
from luthier.python_code import is_python_path
from luthier.terminal import shows_bars


def build_sft_arguments(config: RunConfig, machine: Any, folder: Path, has_eval: bool) -> Any:
    """Return the `trl.SFTConfig` of a run.

    Rows come as tokens and labels already, so everything in TRL that would touch them is off.
    `machine` is a `luthier.model.device.Machine`.
    """
    from trl import SFTConfig

    required = {
        "max_length": None,
        # luthier packs itself (luthier.data.batching); TRL would flatten for every attention.
        "packing": False,
        "eval_packing": False,
        "assistant_only_loss": False,
        "completion_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return build_trainer_arguments(SFTConfig, config, machine, folder, has_eval, required)


def build_trainer_arguments(
    make: Callable[..., Any],
    config: RunConfig,
    machine: Any,
    folder: Path,
    has_eval: bool,
    required: dict[str, Any],
) -> Any:
    """Return the arguments of a trainer of transformers or TRL, as their class `make` makes them.

    The user's settings come over luthier's defaults, and `required` over both: what luthier must
    set for this trainer. Raises UserError for what the class does not allow.
    """
    check_gpu_settings(config.trainer.args, machine.device_type)
    settings: dict[str, Any] = {
        # A NaN must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "bf16": machine.dtype == "bfloat16",
        "fp16": machine.dtype == "float16",
        # Page-locked memory is for copies to a GPU.
        "dataloader_pin_memory": machine.device_type == "cuda",
        "prediction_loss_only": True,
    }
    # TRL 1.16 takes the weight of the router's loss from the model's config, without a word.
    if "router_aux_loss_coef" in getattr(make, "__dataclass_fields__", {}):
        settings["router_aux_loss_coef"] = 0.0
    settings |= config.trainer.args
    name = config.trainer.optimizer.name
    if isinstance(name, str) and name != "muon" and not is_python_path(name):
        settings["optim"] = name
    if not has_eval:
        settings["eval_strategy"] = "no"
    # Behind the user's settings: these follow from other keys of the config, and two truths about a
    # seed or a folder would part company.
    settings |= {
        "output_dir": str(folder / "checkpoints"),
        "seed": config.seed,
        "data_seed": config.seed,
        # Left open, transformers 5.23 decides it by the level of its logger; off a terminal a bar
        # would fill the log.
        "disable_tqdm": config.trainer.args.disable_tqdm or not shows_bars(),
        "use_cpu": machine.device_type == "cpu",
        "report_to": list(config.tracker.to),
        "project": config.tracker.trackio.project,
        "trackio_space_id": config.tracker.trackio.space_id,
        "run_name": run_name(config, folder),
    }
    try:
        args = make(**settings | required)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer.args: {error}") from error
    if config.trainer.args.router_aux_loss_coef and args.world_size > 1:
        raise UserError(f"trainer.args.router_aux_loss_coef: {ROUTER_LOSS_OF_A_BATCH}")
    return args


def set_unused_search(args: Any, model: Any, config: RunConfig) -> None:
    """Have DDP look for weights without a gradient in each step only where there may be some.

    transformers 5.23 has it look wherever activations are kept and nowhere else: for nothing in
    most models, and not where experts or a tower need it. What a trainer or a model of the user's
    own leaves out is not known. `args` are the trainer's, in which the user's own setting stays;
    `model` is as it trains.
    """
    if args.ddp_find_unused_parameters is not None:
        return
    # torch refuses the two together: a reentrant backward reaches weights more than once.
    kwargs = args.activation_checkpointing_kwargs or {}
    is_reentrant = args.activation_checkpointing and kwargs.get("use_reentrant")
    is_own = config.model.loader is not None or is_python_path(config.trainer.method)
    may_skip = is_own or bool(find_skipped_parameters(model))
    args.ddp_find_unused_parameters = may_skip and not is_reentrant


def check_router_loss(config: RunConfig) -> None:
    """Raise UserError where the routers' loss is set, and TRL does not compute it for the model.

    Takes a look at config.json; nothing is loaded.
    """
    if not config.trainer.args.router_aux_loss_coef:
        return
    text_config = read_model_config(config.model).get_text_config()
    # TRL 1.16 reads these in the model's config, and ends in a traceback where one is missing.
    fields = ("output_router_logits", "num_experts", "num_experts_per_tok")
    lacks = [name for name in fields if getattr(text_config, name, None) is None]
    if lacks:
        raise UserError(
            f"trainer.args.router_aux_loss_coef: TRL has no router loss for {config.model.path} "
            f"({text_config.model_type}), whose config has no {lacks[0]}.\n"
            "Leave it out; the routers learn from the loss of the tokens, too."
        )


def run_name(config: RunConfig, folder: Path) -> str:
    """Return what trackers call the run."""
    return f"{config.recipe}/{folder.name}" if config.recipe else folder.name


def run_title(config: RunConfig, folder: Path) -> str:
    """Return what plots call the run: its recipe, with the folder where the recipe was changed."""
    is_plain = config.recipe is not None and folder.name == "default"
    return str(config.recipe) if is_plain else run_name(config, folder)
