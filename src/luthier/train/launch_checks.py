"""What was asked for is what runs: where accelerate gives way in silence, luthier stops in words.

`check_launch_request` needs neither torch nor accelerate, `check_devices` runs before a model is
loaded and `check_running_launch` before the first step. docs/launch.md lists what each of them
catches.
"""

import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from luthier.errors import UserError
from luthier.train.launch_request import (
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
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")


class LaunchFacts(TypedDict):
    """What really runs, for the record of a run."""

    processes: int
    sharding: str
    """none, ddp, fsdp1, fsdp2, zero0 to zero3, or accelerate's own name for another kind."""
    precision: str
    """Mixed precision: no, fp16, bf16 or fp8."""
    device: str
    """cpu, cuda, mps, ..."""


def check_launch_request() -> None:
    """Stop, before torch is imported, where fewer processes or other sharding run than were asked.

    `use_cpu: true` of a config file, which accelerate forgets when it starts several processes, is
    passed on. Raises UserError with what was asked, by what, what runs, and what to type instead.
    """
    wish = read_launch_request()
    if wish is None:
        return
    _refuse_unknown_keys(wish)
    _refuse_sharding_on_cpu(wish)
    if wish.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _refuse_other_count(wish, os.environ)


def check_devices(state: "PartialState | AcceleratorState") -> None:
    """Stop, before a model is loaded, where the processes do not have the devices they need.

    `state` is `training_args.distributed_state` or `accelerator.state`. Raises UserError.
    """
    wish = read_launch_request() or LaunchRequest()
    if wish.distributed == "fsdp" and state.device.type in ("cpu", "mps"):
        raise UserError(
            f"FSDP was asked for ({wish.said_by['distributed']}), but there is no GPU here for it, "
            "and accelerate would train without sharding.\nInstead: the same command on a machine "
            "with GPUs, or --config_file launch/cpu.yaml or launch/cpu_ddp.yaml on this one."
        )
    if wish.use_cpu and state.device.type != "cpu":
        raise UserError(
            f"The CPU was asked for ({wish.said_by['use_cpu']}), but {state.device} is used.\n"
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
    wish = read_launch_request() or LaunchRequest()
    check_devices(accelerator.state)
    facts = _read_launch_facts(accelerator)
    _refuse_other_sharding(wish, facts)
    _refuse_other_precision(wish, facts)
    if training_args is not None:
        _refuse_data_parallel(training_args)
    return facts


def _refuse_unknown_keys(wish: LaunchRequest) -> None:
    """Stop at keys within `fsdp_config` and its like that accelerate would ignore."""
    unknown = find_unknown_keys(wish.config_file) if wish.config_file is not None else []
    if not unknown:
        return
    lines = [f"{wish.config_file}: accelerate does not know, and would ignore:"]
    for group, key, known in unknown:
        near = difflib.get_close_matches(key, known, n=1)
        lines.append(f"  {group}.{key}" + (f" (did you mean {near[0]}?)" if near else ""))
    raise UserError("\n".join(lines))


def _refuse_sharding_on_cpu(wish: LaunchRequest) -> None:
    """Stop where the CPU and a sharding that needs GPUs are asked for together."""
    if not wish.use_cpu or wish.distributed not in _SHARDING_NAMES:
        return
    name = _SHARDING_NAMES[wish.distributed]
    raise UserError(
        f"{name} ({wish.said_by['distributed']}) and the CPU ({wish.said_by['use_cpu']}) were both "
        f"asked for: on the CPU, accelerate would train without {name}.\nInstead: leave the CPU "
        "setting out, or use --config_file launch/cpu.yaml or launch/cpu_ddp.yaml."
    )


def _refuse_other_count(wish: LaunchRequest, environ: Mapping[str, str]) -> None:
    """Stop where another number of processes was started than was asked for."""
    running = _started_processes(environ)
    if wish.num_processes is None or wish.num_processes == running:
        return
    raise UserError(
        f"{_count_phrase(wish.num_processes)} asked for ({wish.said_by['num_processes']}), "
        f"but {running} would train together: {_explain_other_count(wish, running)}.\nInstead: "
        f"accelerate launch --config_file launch/cpu_ddp.yaml --num_processes "
        f"{wish.num_processes} ... on CPUs, launch/ddp.yaml on GPUs."
    )


def _count_phrase(count: int) -> str:
    """Return a number of processes as the start of a sentence."""
    return "1 process was" if count == 1 else f"{count} processes were"


def _explain_other_count(wish: LaunchRequest, running: int) -> str:
    """Return why accelerate started another number of processes, as the end of a sentence."""
    share = wish.said_by.get("distributed", "")
    if "WORLD_SIZE" in wish.said_by["num_processes"]:
        return "without LOCAL_RANK in the environment, each process trains alone"
    if running > 1 and wish.num_machines > 1:
        return f"they cannot be shared out evenly over {wish.num_machines} machines"
    if running > 1:
        return f"the environment was left with WORLD_SIZE={running} by another launcher"
    if wish.said_by.get("use_cpu") == "`--cpu`":
        return "`--cpu` starts one process, whatever else is asked"
    if "MULTI_CPU" in share:
        return f"accelerate starts the others of {share} only through mpirun"
    return (
        "accelerate starts more than one only for --multi_gpu and distributed types other than NO"
    )


def _started_processes(environ: Mapping[str, str]) -> int:
    """Return how many processes will train together, by accelerate's rules for joining them."""
    if "LOCAL_RANK" in environ:
        return int(environ.get("WORLD_SIZE", "1"))
    if is_on(environ, "ACCELERATE_USE_CPU"):
        return next((int(environ[name]) for name in _MPI_SIZES if name in environ), 1)
    return 1


def _refuse_training_alone(
    state: "PartialState | AcceleratorState", environ: Mapping[str, str]
) -> None:
    """Stop where processes were started together but accelerate did not join them."""
    started = _started_processes(environ)
    if started <= state.num_processes:
        return
    raise UserError(
        f"{_count_phrase(started)} started together, but each would train alone: accelerate joins "
        "processes on a machine without GPU only where the CPU is asked for.\nInstead: accelerate "
        f"launch --config_file launch/cpu_ddp.yaml --num_processes {started} ..., or put "
        "ACCELERATE_USE_CPU=true before the command."
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
            "\nInstead: CUDA_VISIBLE_DEVICES=0 or --config_file launch/single_gpu.yaml for one "
            "GPU, --config_file launch/ddp.yaml for all of them."
        )


def _read_launch_facts(accelerator: "Accelerator") -> LaunchFacts:
    """Read what runs from the accelerator."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        sharding = "none"
    elif kind == DistributedType.FSDP:
        sharding = f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    elif kind == DistributedType.DEEPSPEED:
        sharding = f"zero{accelerator.deepspeed_plugin.zero_stage}"
    else:
        sharding = "ddp" if kind.value.startswith("MULTI_") else kind.value.lower()
    return LaunchFacts(
        processes=accelerator.num_processes,
        sharding=sharding,
        precision=accelerator.mixed_precision,
        device=accelerator.device.type,
    )


def _refuse_other_sharding(wish: LaunchRequest, facts: LaunchFacts) -> None:
    """Stop where FSDP or DeepSpeed was asked for and something else, or another stage, runs."""
    wanted = {"fsdp": "fsdp", "deepspeed": "zero"}.get(wish.distributed or "")
    if wanted is None:
        return
    said = wish.said_by["distributed"]
    if wanted == "zero" and wish.zero_stage is not None:
        wanted, said = f"zero{wish.zero_stage}", wish.said_by["zero_stage"]
    if not facts["sharding"].startswith(wanted):
        raise UserError(
            f"{wanted} was asked for ({said}), but {facts['sharding']} runs.\n"
            "Instead: --config_file launch/fsdp2.yaml, launch/zero2.yaml or launch/zero3.yaml, "
            "without other settings of the launcher."
        )


def _refuse_other_precision(wish: LaunchRequest, facts: LaunchFacts) -> None:
    """Stop where another mixed precision runs than was asked for, or one that the CPU ignores."""
    if facts["precision"] == "fp16" and facts["device"] == "cpu":
        raise UserError(
            "fp16 mixed precision was asked for, but on a CPU accelerate would train in float32 "
            "and say fp16.\nInstead: bf16 (trainer.args.bf16=true), or no mixed precision."
        )
    # Launchers write `no` wherever nothing was chosen: then the recipe decides.
    if wish.mixed_precision in (None, "no", facts["precision"]):
        return
    raise UserError(
        f"Mixed precision {wish.mixed_precision} was asked for "
        f"({wish.said_by['mixed_precision']}), but {facts['precision']} runs: the recipe's "
        "trainer.args.bf16 and fp16 win, and a GPU without fp8 gets fp16.\n"
        "Instead: ask for the same in both, or in the recipe alone."
    )
