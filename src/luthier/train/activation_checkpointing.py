"""`trainer.args.activation_checkpointing: auto`: recomputed where activations would not fit."""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.memory import choose_checkpointing
from luthier.memory.sharding import Sharding
from luthier.memory.workload import AUTO_CHECKPOINTING, bound_by_rows, detect_hardware
from luthier.train import console
from luthier.train.launch.request import LaunchRequest, read_launch_request


def resolve_auto_checkpointing(
    config: RunConfig, longest: int = 0, images: tuple[tuple[int, int], ...] = ()
) -> RunConfig:
    """Return the config with `auto` decided by the memory plan, the same on all ranks.

    `longest` is the longest training row in tokens; 0 where it is not known, so that
    `chat.max_length` counts. `images` are the height and width of the images of the row with most.
    The first rank plans, since free memory may differ between ranks. Where a run cannot be
    planned, activations are computed again, which is slower and always fits best.
    """
    if config.trainer.args.activation_checkpointing != AUTO_CHECKPOINTING:
        return config
    chosen: list[bool] = [True]
    if PartialState().is_main_process:
        chosen = [_plan_checkpointing(bound_by_rows(config, longest), images)]
    broadcast_object_list(chosen)
    return config.with_trainer_args(activation_checkpointing=chosen[0])


def planned_sharding(request: LaunchRequest | None, processes: int) -> Sharding:
    """Return how the launched processes share the work, as the memory plan counts it."""
    if processes == 1:
        return Sharding()
    if request is not None and request.distributed == "fsdp":
        return Sharding("fsdp2", processes, request.parallelism.get("dp_replicate_size", 1))
    if request is not None and request.distributed == "deepspeed":
        # accelerate's own stage where nobody names one.
        return Sharding(f"zero{request.zero_stage or 2}", processes)
    return Sharding("ddp", processes)


def _plan_checkpointing(config: RunConfig, images: tuple[tuple[int, int], ...]) -> bool:
    """Return whether activations are computed again, and print why."""
    processes = PartialState().num_processes
    try:
        hardware = detect_hardware(config.model, processes)
        recomputes = choose_checkpointing(
            config, hardware, planned_sharding(read_launch_request(), processes), images
        )
    except UserError as error:
        console.print_line(f"memory    not planned ({error}); activations are computed again")
        return True
    decision = "would not fit and are computed again" if recomputes else "fit and are kept"
    console.print_line(f"memory    activations {decision}")
    return recomputes
