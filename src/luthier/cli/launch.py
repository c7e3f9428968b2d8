"""`luthier launch`: train in several processes, or in one that accelerate starts."""

import os
import shlex
from pathlib import Path

from luthier.cli.arguments import TRUST, CommandLine, Flag
from luthier.config.load import LoadedConfig, load_config
from luthier.config.recipes import bundled_folder, format_path
from luthier.errors import UserError
from luthier.train.launch.request import find_launch_file, parse_launch_command

_GPU_FILES = ("single_gpu", "ddp", "fsdp2", "zero2", "zero3")
"""Launch files of luthier that need GPUs."""
COMMAND_LINE = CommandLine(
    "launch",
    "luthier launch [--config NAME|FILE] [--num_processes N] recipe=NAME [key=value]\n\n"
    "Trains as `luthier train` does, under `accelerate launch` with a config file that fits: one\n"
    "process on a CPU, one on a single GPU, or one for each of several GPUs (DDP). The command is\n"
    "printed as it runs. One process speaks for all, an error is said once, the exit code is that\n"
    "of the training (75: stopped, run it again to resume), and signals reach all processes.\n\n"
    "Config files: cpu, cpu_ddp (several processes on CPUs), single_gpu, ddp (a copy of the model\n"
    "on each GPU), fsdp2 (a slice of it on each), zero2 and zero3 (DeepSpeed), or your own file.\n"
    "The last five were never run on a GPU.",
    (
        Flag("--config", "NAME|FILE", "luthier's own config file, or one of `accelerate config`"),
        Flag("--num_processes", "N", "processes on all machines together (default: one per GPU)"),
        Flag("--gpu_ids", "LIST", "the GPUs to use, such as 0,1"),
        Flag("--mixed_precision", "NAME", "no, fp16, bf16 or fp8, in place of the file's"),
        Flag("--num_machines", "N", "machines; start the same command on each of them"),
        Flag("--machine_rank", "RANK", "the number of this machine, from 0"),
        Flag("--main_process_ip", "ADDRESS", "the address of the first machine"),
        Flag("--main_process_port", "N", "the port on the first machine"),
        Flag("-m", None, "a sweep: each trial is launched so"),
        TRUST,
    ),
    "  luthier launch recipe=quickstart\n"
    "  luthier launch --config cpu_ddp recipe=tiny_pretrain\n"
    "  luthier launch --config fsdp2 --num_processes 4 recipe=lora_qwen\n"
    "  luthier launch --config my_accelerate.yaml recipe=lora_qwen lora.r=8\n",
)


def run(arguments: list[str]) -> int:
    """Launch the training; return its exit code. Raises UserError for a mistake of the user's."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if not parsed.overrides:
        raise UserError("luthier launch: name what to train, such as luthier launch recipe=NAME.")
    is_trusted, is_sweep = TRUST.name in parsed.switches, "-m" in parsed.switches
    name = parsed.texts.pop("--config", None)
    file = None if name is None else find_launch_file(name, "--config")
    # Whatever is wrong in the config is said before torch is imported and processes are started.
    loaded = None if is_sweep else load_config(parsed.overrides, is_trusted)
    if loaded is not None:
        from luthier.train.run import check_before_torch

        check_before_torch(loaded.config)
    processes = parsed.numbers.pop("--num_processes", None)
    machines = parsed.numbers.get("--num_machines", 1)
    gpus = _count_gpus(loaded)
    file = file or choose_launch_file(gpus, processes, machines)
    if processes is None and gpus and file.stem in ("ddp", "fsdp2", "zero2", "zero3"):
        processes = gpus * machines
    _refuse_impossible_count(file, gpus, processes, machines)
    flags = ["--config_file", format_path(file)]
    flags += [] if processes is None else ["--num_processes", str(processes)]
    for flag, value in {**parsed.numbers, **parsed.texts}.items():
        flags += [flag, str(value)]
    words = [*(["-m"] if is_sweep else []), *([TRUST.name] if is_trusted else [])]
    return _launch(flags, [*words, *parsed.overrides], loaded, arguments)


def _launch(
    flags: list[str], words: list[str], loaded: LoadedConfig | None, arguments: list[str]
) -> int:
    """Check the launch, print its command, and run it."""
    from luthier.train.launch.checks import check_planned_launch
    from luthier.train.launch.launcher import launch_training

    request = parse_launch_command(flags, Path.cwd(), os.environ)
    if loaded is not None:
        check_planned_launch(request, loaded.config.trainer.args)
    command = ["accelerate", "launch", *flags, "-m", "luthier", "train", *words]
    print(f"launch    {shlex.join(command)}", flush=True)
    overrides = [word for word in words if not word.startswith("-")]
    typed = ["luthier", "launch", *(word for word in arguments if word not in overrides)]
    local_processes = (request.num_processes or 1) // request.num_machines
    return launch_training(flags, words, typed, local_processes)


def choose_launch_file(gpus: int, processes: int | None, machines: int = 1) -> Path:
    """Return luthier's file for so many GPUs of this machine and processes of all machines."""
    is_several = machines > 1 or (processes or gpus) > 1
    one, several = ("single_gpu", "ddp") if gpus else ("cpu", "cpu_ddp")
    return bundled_folder("launch") / f"{several if is_several else one}.yaml"


def _count_gpus(loaded: LoadedConfig | None) -> int:
    """Return how many GPUs this machine shows; none where the config asks for the CPU."""
    if loaded is not None and loaded.config.model.device == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _refuse_impossible_count(file: Path, gpus: int, processes: int | None, machines: int) -> None:
    """Raise UserError where a file of luthier's cannot start so many processes here."""
    if file.parent != bundled_folder("launch"):
        return
    if file.stem in ("cpu", "single_gpu") and (processes or 1) * machines > 1:
        several = "cpu_ddp" if file.stem == "cpu" else "ddp"
        raise UserError(
            f"--config {file.stem}: this starts one process. For several, write --config {several}."
        )
    if file.stem not in _GPU_FILES:
        return
    if not gpus:
        raise UserError(
            f"--config {file.stem}: this is for GPUs, and there is none here.\nInstead: luthier "
            "launch without --config, or --config cpu_ddp for several processes on this CPU."
        )
    if processes is not None and processes > gpus * machines:
        several = f" on {machines} machines" if machines > 1 else ""
        raise UserError(
            f"--num_processes {processes}: this machine shows {gpus} "
            f"GPU{'' if gpus == 1 else 's'}, so at most {gpus * machines} can train{several}."
        )
