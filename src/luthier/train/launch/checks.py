"""What was asked for is what runs: where accelerate gives way in silence, luthier stops.

`check_launch_request` needs neither torch nor accelerate, `check_devices` runs before a model is
loaded and `check_running_launch` before the first step. docs/launch.md lists what each of them
catches.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from luthier.config.library_settings import TrainerArgs
from luthier.errors import UserError
from luthier.record.checkpoints import list_checkpoints
from luthier.record.record import RunRecord, read_record
from luthier.train.launch.conflicts import refuse_recipe_conflicts
from luthier.train.launch.request import (
    LaunchRequest,
    find_unknown_keys,
    is_on,
    read_launch_request,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from transformers import TrainingArguments

_SHARDING_NAMES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}
_FIXED_LAUNCH = {
    "processes": "the number of processes",
    "sharding": "the sharding",
    "precision": "the mixed precision",
}
"""What a run that goes on must have as at its begin, and what a message calls it."""
_PARALLELISM = {
    "tp_size": ("Tensor", "luthier's batches and loss are for processes with rows of their own"),
    "cp_size": ("Context", "luthier's loss needs a row whole on its device"),
    "sp_size": ("Sequence", "luthier's loss needs a row whole on its device"),
}
"""Sizes of `parallelism_config` that are refused -> the kind's name, and why."""
_WITHOUT_PARALLELISM = (
    "luthier launch --config fsdp2 slices the weights of a model that is too big for one GPU, "
    "and trainer.args.activation_checkpointing=true makes room for long rows."
)
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")


class LaunchFacts(TypedDict):
    """What really runs, for the record of a run."""

    processes: int
    sharding: str
    """none, ddp, fsdp2, zero0 to zero3, or accelerate's own name for another kind."""
    precision: str
    """Mixed precision: no, fp16, bf16 or fp8."""
    device: str
    """cpu, cuda, mps, ..."""


def check_launch_request(args: TrainerArgs | None = None) -> None:
    """Stop, before torch is imported, where fewer processes or other sharding run than were asked.

    `use_cpu: true` of a config file, which accelerate forgets when it starts several processes, is
    passed on. `args` are the recipe's, which the launcher's settings must not contradict; None is
    without a recipe. Raises UserError with what was asked, by what, what runs, and what to type
    instead.
    """
    request = read_launch_request()
    if request is None:
        return
    _refuse_unknown_keys(request)
    _refuse_parallelism(request)
    _refuse_sharding_on_cpu(request)
    if request.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _refuse_other_count(request, os.environ)
    if args is not None:
        refuse_recipe_conflicts(request, args)


def check_planned_launch(request: LaunchRequest, args: TrainerArgs) -> None:
    """Stop, before any process is started, at a launch that each of them would refuse.

    Raises UserError for keys that accelerate would ignore, for sharding together with the CPU, for
    kinds of parallelism that luthier does not train, and for settings that contradict the recipe's.
    """
    _refuse_unknown_keys(request)
    _refuse_parallelism(request)
    _refuse_sharding_on_cpu(request)
    refuse_recipe_conflicts(request, args)


def refuse_changed_launch(folder: Path) -> None:
    """Stop, before torch is imported, where a run with checkpoints was launched in another way.

    The number of processes and the kind of sharding are compared with those in the folder's
    run.json; the rest is compared once the accelerator is there. Raises UserError.
    """
    if not list_checkpoints(folder / "checkpoints"):
        return
    old = read_record(folder).get("launch") or {}
    processes = _started_processes(os.environ)
    if old.get("processes", processes) != processes:
        raise UserError(other_launch_message(folder, "processes", old["processes"], processes))
    request = read_launch_request() or LaunchRequest()
    families = {"fsdp": "fsdp", "deepspeed": "zero", "none": "none", "ddp": "ddp"}
    plain = "none" if processes == 1 else "ddp"
    # What accelerate makes of other kinds (XLA, Megatron) is known once it runs.
    sharding = families.get(request.distributed or plain)
    if sharding in ("none", "ddp"):
        sharding = plain
    if sharding and not str(old.get("sharding", sharding)).startswith(sharding):
        raise UserError(other_launch_message(folder, "sharding", old["sharding"], sharding))


def other_launch_message(folder: Path, name: str, old: object, new: object) -> str:
    """Return the error's text for a run that was launched otherwise: `name` is an entry of it."""
    return (
        f"The run in {folder} was launched with {_FIXED_LAUNCH[name]} {old}, and now with {new}: "
        "its steps would be made of other batches.\nLaunch it as before, choose another "
        "output_dir=..., or overwrite=true to begin anew."
    )


def refuse_other_launch(record: RunRecord, launch: LaunchFacts) -> None:
    """Raise UserError where a run with checkpoints was launched in another way than now."""
    old = record.entries.get("launch", {})
    folder = record.path.parent
    if not list_checkpoints(folder / "checkpoints"):
        return
    new = dict(launch)
    for name in _FIXED_LAUNCH:
        if name in old and old[name] != new[name]:
            raise UserError(other_launch_message(folder, name, old[name], new[name]))


def check_devices(state: "PartialState | AcceleratorState") -> None:
    """Stop, before a model is loaded, where the processes do not have the devices they need.

    `state` is `training_args.distributed_state` or `accelerator.state`. Raises UserError.
    """
    request = read_launch_request() or LaunchRequest()
    _refuse_fsdp_without_gpu(request, state)
    _refuse_zero_without_gpu(request, state)
    # A device that nobody asked for computes with other rounding, and may belong to someone else.
    if request.use_cpu and state.device.type != "cpu":
        raise UserError(
            f"The CPU was asked for ({request.set_by['use_cpu']}), but {state.device} is used.\n"
            "Instead: hide the GPUs with CUDA_VISIBLE_DEVICES=-1, or do not ask for the CPU."
        )
    _refuse_training_alone(state, os.environ)
    _refuse_shared_gpus(state)


def check_running_launch(
    accelerator: "Accelerator", training_args: "TrainingArguments | None" = None
) -> LaunchFacts:
    """Stop, before the first step, where what runs is not what was asked; return what runs.

    Raises UserError for another sharding, mixed precision or number of GPUs than was asked for.
    """
    request = read_launch_request() or LaunchRequest()
    check_devices(accelerator.state)
    facts = _read_launch_facts(accelerator)
    _refuse_other_sharding(request, facts)
    _refuse_other_precision(request, facts)
    if training_args is not None:
        _refuse_data_parallel(training_args)
    return facts


def parallelism_message(key: str, origin: str) -> str:
    """Return the error's text for a size of `parallelism_config` that `origin` asked for."""
    name, reason = _PARALLELISM[key]
    return (
        f"{name} parallelism was asked for ({origin}), and {reason}.\n"
        f"Instead: {_WITHOUT_PARALLELISM}"
    )


def _refuse_unknown_keys(request: LaunchRequest) -> None:
    """Stop at keys within `fsdp_config` and its like that accelerate would ignore."""
    unknown = find_unknown_keys(request.config_file) if request.config_file is not None else []
    if not unknown:
        return
    lines = [f"{request.config_file}: accelerate does not know, and would ignore:"]
    for group, key, valid_keys in unknown:
        near = difflib.get_close_matches(key, valid_keys, n=1)
        lines.append(f"  {group}.{key}" + (f" (did you mean {near[0]}?)" if near else ""))
    raise UserError("\n".join(lines))


def _refuse_parallelism(request: LaunchRequest) -> None:
    """Stop where one row or one layer shall be computed by several devices."""
    for key in _PARALLELISM:
        if key in request.parallelism:
            raise UserError(parallelism_message(key, request.set_by[key]))
    if request.distributed == "megatron_lm":
        raise UserError(
            f"Megatron-LM was asked for ({request.set_by['distributed']}), and models and trainers "
            "of transformers do not train under it: there is no tensor, pipeline or expert "
            f"parallelism by it.\nInstead: {_WITHOUT_PARALLELISM}"
        )


def _refuse_sharding_on_cpu(request: LaunchRequest) -> None:
    """Stop where the CPU and a sharding that needs GPUs are asked for together."""
    if not request.use_cpu or request.distributed not in _SHARDING_NAMES:
        return
    name = _SHARDING_NAMES[request.distributed]
    raise UserError(
        f"{name} ({request.set_by['distributed']}) and the CPU ({request.set_by['use_cpu']}) were "
        f"both asked for: on the CPU, accelerate would train without {name}.\nInstead: leave the "
        "CPU setting out, or use luthier launch --config cpu or --config cpu_ddp."
    )


def _refuse_other_count(request: LaunchRequest, environ: Mapping[str, str]) -> None:
    """Stop where another number of processes was started than was asked for."""
    running = _started_processes(environ)
    if request.num_processes is None or request.num_processes == running:
        return
    raise UserError(
        f"{_count_phrase(request.num_processes)} asked for ({request.set_by['num_processes']}), "
        f"but {running} would train together: {_explain_other_count(request, running)}.\nInstead: "
        f"luthier launch --config cpu_ddp --num_processes {request.num_processes} ... on CPUs, "
        "--config ddp on GPUs."
    )


def _count_phrase(count: int) -> str:
    """Return a number of processes as the start of a sentence."""
    return "1 process was" if count == 1 else f"{count} processes were"


def _explain_other_count(request: LaunchRequest, running: int) -> str:
    """Return why accelerate started another number of processes, as the end of a sentence."""
    share = request.set_by.get("distributed", "")
    # From the most special reason to the most general, which fits in any case.
    if "WORLD_SIZE" in request.set_by["num_processes"]:
        return "without LOCAL_RANK in the environment, each process trains alone"
    if running > 1 and request.num_machines > 1:
        return f"they cannot be shared out evenly over {request.num_machines} machines"
    if running > 1:
        return f"the environment was left with WORLD_SIZE={running} by another launcher"
    if request.set_by.get("use_cpu") == "`--cpu`":
        return "`--cpu` starts one process, whatever else is asked"
    if "MULTI_CPU" in share:
        return f"accelerate starts the others of {share} only through mpirun"
    return (
        "accelerate starts more than one only for --multi_gpu and distributed types other than NO"
    )


def _started_processes(environ: Mapping[str, str]) -> int:
    """Return how many processes will train together, by accelerate's rules for joining them."""
    # accelerate joins processes by LOCAL_RANK; on CPUs alone also by the variables of MPI.
    if "LOCAL_RANK" in environ:
        return int(environ.get("WORLD_SIZE", "1"))
    if is_on(environ, "ACCELERATE_USE_CPU"):
        return next((int(environ[name]) for name in _MPI_SIZES if name in environ), 1)
    return 1


def _refuse_fsdp_without_gpu(
    request: LaunchRequest, state: "PartialState | AcceleratorState"
) -> None:
    """Stop where FSDP was asked for on a device for which accelerate does not choose it."""
    if request.distributed == "fsdp" and state.device.type in ("cpu", "mps"):
        raise UserError(
            f"FSDP was asked for ({request.set_by['distributed']}), but there is no GPU here for "
            "it, and accelerate would train without sharding.\nInstead: the same command on "
            "a machine with GPUs, or luthier launch --config cpu or --config cpu_ddp on this one."
        )


def _refuse_zero_without_gpu(
    request: LaunchRequest, state: "PartialState | AcceleratorState"
) -> None:
    """Stop where DeepSpeed was asked for on a device for which accelerate does not choose it."""
    from accelerate.utils import DistributedType

    runs = getattr(state, "distributed_type", None) == DistributedType.DEEPSPEED
    if request.distributed == "deepspeed" and state.device.type in ("cpu", "mps") and not runs:
        raise UserError(
            f"DeepSpeed was asked for ({request.set_by['distributed']}), but there is no GPU here "
            "for it, and accelerate would train without it.\nInstead: the same command on "
            "a machine with GPUs, or luthier launch --config cpu or --config cpu_ddp on this one."
        )


def _refuse_training_alone(
    state: "PartialState | AcceleratorState", environ: Mapping[str, str]
) -> None:
    """Stop where processes were started together but accelerate did not join them."""
    started = _started_processes(environ)
    if started <= state.num_processes:
        return
    raise UserError(
        f"{_count_phrase(started)} started together, but each would train alone: accelerate joins "
        "processes on a machine without GPU only where the CPU is asked for.\nInstead: luthier "
        f"launch --config cpu_ddp --num_processes {started} ..., or put ACCELERATE_USE_CPU=true "
        "before the command."
    )


def _refuse_shared_gpus(state: "PartialState | AcceleratorState") -> None:
    """Stop where more processes were started on this machine than it has GPUs."""
    if state.device.type != "cuda":
        return
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise UserError(
            f"{_count_phrase(here)} started on this machine, which shows {gpus} GPU(s): accelerate "
            f"would put several on one.\nInstead: --num_processes {gpus} (times the machines), or "
            "more GPUs in CUDA_VISIBLE_DEVICES."
        )


def _refuse_data_parallel(training_args: "TrainingArguments") -> None:
    """Stop where transformers would split each batch of one process over several GPUs."""
    if training_args.n_gpu > 1:
        raise UserError(
            "One process runs, and transformers would split each batch over the "
            f"{training_args.n_gpu} GPUs that it sees (DataParallel), with as many times the batch."
            "\nInstead: luthier launch --config single_gpu (CUDA_VISIBLE_DEVICES=0) for one GPU, "
            "--config ddp for all of them."
        )


def _read_launch_facts(accelerator: "Accelerator") -> LaunchFacts:
    """Read what runs from the accelerator."""
    from accelerate.utils import DistributedType

    distributed_type = accelerator.distributed_type
    if distributed_type == DistributedType.NO:
        sharding = "none"
    elif distributed_type == DistributedType.FSDP:
        sharding = f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    elif distributed_type == DistributedType.DEEPSPEED:
        sharding = f"zero{accelerator.deepspeed_plugin.zero_stage}"
    else:
        name = distributed_type.value
        sharding = "ddp" if name.startswith("MULTI_") else name.lower()
    return LaunchFacts(
        processes=accelerator.num_processes,
        sharding=sharding,
        precision=accelerator.mixed_precision,
        device=accelerator.device.type,
    )


def _refuse_other_sharding(request: LaunchRequest, facts: LaunchFacts) -> None:
    """Stop where FSDP or DeepSpeed was asked for and something else, or another stage, runs."""
    sharding = {"fsdp": "fsdp", "deepspeed": "zero"}.get(request.distributed or "")
    if sharding is None:
        return
    origin = request.set_by["distributed"]
    if sharding == "zero" and request.zero_stage is not None:
        sharding, origin = f"zero{request.zero_stage}", request.set_by["zero_stage"]
    if not facts["sharding"].startswith(sharding):
        raise UserError(
            f"{sharding} was asked for ({origin}), but {facts['sharding']} runs.\n"
            "Instead: luthier launch --config fsdp2, zero2 or zero3, without other settings of the "
            "launcher."
        )


def _refuse_other_precision(request: LaunchRequest, facts: LaunchFacts) -> None:
    """Stop where another mixed precision runs than was asked for, or one that the CPU ignores."""
    if facts["precision"] == "fp16" and facts["device"] == "cpu":
        raise UserError(
            "fp16 mixed precision was asked for, but on a CPU accelerate would train in float32 "
            "and say fp16.\nInstead: bf16 (trainer.args.bf16=true), or no mixed precision."
        )
    # Launchers write `no` wherever nothing was chosen: then the recipe decides.
    if request.mixed_precision in (None, "no", facts["precision"]):
        return
    raise UserError(
        f"Mixed precision {request.mixed_precision} was asked for "
        f"({request.set_by['mixed_precision']}), but {facts['precision']} runs: the recipe's "
        "trainer.args.bf16 and fp16 win, and a GPU without fp8 gets fp16.\n"
        "Instead: ask for the same in both, or in the recipe alone."
    )
