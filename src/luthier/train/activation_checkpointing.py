"""`trainer.args.activation_checkpointing: auto`: recomputed where activations would not fit."""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.memory import choose_checkpointing
from luthier.memory.sharding import Sharding
from luthier.memory.workload import detect_hardware
from luthier.train import console
from luthier.train.launch_request import LaunchRequest, read_launch_request

AUTO = "auto"


def resolve_auto_checkpointing(config: RunConfig) -> RunConfig:
    """Return the config with `auto` decided by the memory plan, the same on all ranks.

    The first rank plans, since free memory may differ between ranks. Where a run cannot be
    planned, activations are computed again, which is slower and always fits best.
    """
    if config.trainer.args.activation_checkpointing != AUTO:
        return config
    chosen: list[bool] = [True]
    if PartialState().is_main_process:
        chosen = [_plan_checkpointing(config)]
    broadcast_object_list(chosen)
    return config.with_trainer_args(activation_checkpointing=chosen[0])


def planned_sharding(wish: LaunchRequest | None, processes: int) -> Sharding:
    """How the launched processes share the work, as the plan counts it."""
    if processes == 1:
        return Sharding()
    kinds = {"fsdp": "fsdp2", "deepspeed": f"zero{wish.zero_stage or 2}" if wish else ""}
    distributed = wish.distributed if wish else None
    return Sharding(kinds.get(distributed or "", "ddp"), processes)


def _plan_checkpointing(config: RunConfig) -> bool:
    processes = PartialState().num_processes
    try:
        hardware = detect_hardware(config.model, processes)
        recomputes = choose_checkpointing(
            config, hardware, planned_sharding(read_launch_request(), processes)
        )
    except UserError as error:
        console.print_line(f"memory    not planned ({error}); activations are computed again")
        return True
    said = "would not fit and are computed again" if recomputes else "fit and are kept"
    console.print_line(f"memory    activations {said}")
    return recomputes
