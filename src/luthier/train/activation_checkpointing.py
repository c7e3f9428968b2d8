"""`trainer.args.activation_checkpointing: auto`: recomputed where activations would not fit."""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.memory.plan import MemoryPlan, plan_auto
from luthier.memory.sharding import Sharding
from luthier.memory.workload import (
    AUTO_CHECKPOINTING,
    GIB,
    bound_by_rows,
    detect_hardware,
    format_size,
)
from luthier.record.record import RunRecord
from luthier.train import console
from luthier.train.launch.request import LaunchRequest, read_launch_request


def resolve_auto_checkpointing(
    config: RunConfig,
    longest: int = 0,
    images: tuple[tuple[int, int], ...] = (),
    record: RunRecord | None = None,
) -> RunConfig:
    """Return the config with `auto` decided by the memory plan, the same on all ranks.

    `longest` is the longest training row in tokens; 0 where it is not known, so that
    `chat.max_length` counts. `images` are the height and width of the images of the row with most.
    The first rank plans, since free memory may differ between ranks. Where a run cannot be
    planned, activations are computed again, which is slower and always fits best. The plan becomes
    an entry of `record`. Raises UserError on all ranks for a mistake in the adapter's settings.
    """
    if config.trainer.args.activation_checkpointing != AUTO_CHECKPOINTING:
        return config
    outcome: list[bool | UserError] = [True]
    if PartialState().is_main_process:
        try:
            plan = _plan_and_print(config, longest, images)
        except UserError as mistake:
            plan, outcome = None, [mistake]
        else:
            outcome = [plan is None or plan.workload.checkpointing is not None]
        if plan is not None and record is not None:
            record.entries["memory_plan"] = {
                "gib": round(plan.best.total / GIB, 2), "room_gib": round(plan.best.room / GIB, 2),
                "rows": plan.workload.rows, "tokens": plan.workload.length,
            }  # fmt: skip
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return config.with_trainer_args(activation_checkpointing=outcome[0])


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


def _plan_and_print(
    config: RunConfig, longest: int, images: tuple[tuple[int, int], ...]
) -> MemoryPlan | None:
    """Return the plan of a run and print what it decides; None where it cannot be planned."""
    processes = PartialState().num_processes
    try:
        hardware = detect_hardware(config.model, processes)
        sharding = planned_sharding(read_launch_request(), processes)
        plan = plan_auto(bound_by_rows(config, longest), hardware, sharding, images)
    except UserError as error:
        # The run would fail of it, too, after it has loaded the model.
        if str(error).startswith("lora."):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        console.print_line(f"memory    not planned, so gradient checkpointing is on: {reason}.")
        return None
    console.print_line(f"memory    {_describe_plan(plan, config.chat.max_length)}")
    return plan


def _describe_plan(plan: MemoryPlan, max_length: int | None) -> str:
    """Return what a plan says, for the line that a run prints."""
    work, best = plan.workload, plan.best
    is_longest = max_length is not None and work.length < max_length
    length = f"{work.length:,} tokens"
    if is_longest:
        length += f" (the longest; chat.max_length allows {max_length:,})"
    decision = "off: activations fit"
    if work.checkpointing is not None:
        decision = "on: activations would not fit without it"
    return (
        f"{format_size(best.total)} planned of {format_size(best.room)}, for {work.rows} rows of "
        f"{length}; gradient checkpointing is {decision}"
    )
