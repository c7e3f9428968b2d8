"""DeepSpeed ZeRO on CPU processes over gloo, with the settings of `launch/zero2.yaml` and the like.

DeepSpeed itself trains on CPUs. Only accelerate 1.15 does not get there: its `PartialState` knows a
backend for processes without a GPU only where the CPU is asked for, and forgets DeepSpeed where it
is. luthier therefore refuses DeepSpeed without a GPU in words. `choose_zero_on_cpu` patches that
one place, in the processes of a test alone; then gloo is the backend, and everything else is what
runs on GPUs: the launch file, accelerate's reading of it, DeepSpeed's engine, luthier.

The package lies apart from the others (see the Makefile), because transformers imports it wherever
it finds it. `zero_forks` starts a fork server that has it, and `fork_zero` forks the ranks of a run
from that, in the environment that accelerate makes of the launch file: some seconds. `start_zero`
runs `accelerate launch` itself, with torchrun above the ranks: for what happens to a rank.

Flags win over the file, as in accelerate. Both give the file two processes, and by default no mixed
precision, so that weights can be compared in float32; `precision=None` leaves the file's, bf16.
"""

import functools
import importlib.util
import os
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from helpers.fork_server import Forks
from helpers.fsdp_cpu import FsdpRun, _output_dir, _text, _text_size

ROOT = Path(__file__).parents[2]
APART = Path(sys.prefix) / "deepspeed"
"""The folder of the virtual environment where `make test` puts DeepSpeed."""
IS_INSTALLED = (APART / "deepspeed").is_dir() or importlib.util.find_spec("deepspeed") is not None
_SEARCHED = (os.environ.get("PYTHONPATH"), str(ROOT / "tests"), str(APART))
VARIABLES = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, _SEARCHED))}


@contextmanager
def zero_forks():
    """Yield a fork server whose processes can import DeepSpeed."""
    forks = Forks(**VARIABLES)
    yield forks
    forks.close()


def fork_zero(
    forks, folder, *words, stage=2, ranks=2, flags=(), precision="no", limit=120, signals=None
):
    """Run the ranks as forks of `zero_forks`; `signals` as for `Forks.together`.

    A run that takes longer than `limit` seconds is killed.
    """
    settings = launch_environment(stage, ranks, flags, precision)
    port, began = settings.pop("MASTER_PORT"), _text_size(folder)
    pids = forks.together(
        folder, port, *words, ranks=ranks, signals=signals, **settings, ACCELERATE_USE_CPU="false"
    )
    deadline = time.monotonic() + limit
    codes = [forks.wait(pid, limit=max(1, deadline - time.monotonic())) for pid in pids]
    code = next((code for code in codes if code != 0), 0)
    return FsdpRun(code, _text(folder, began), folder / _output_dir(words))


def start_zero(folder, *words, stage=2, ranks=2, flags=(), precision="no"):
    """Start `accelerate launch` with the launch file; the `Popen` of a process group of its own."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        *_launcher_flags(stage, ranks, flags, precision), __file__, *words,
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | variables | VARIABLES, stdin=subprocess.DEVNULL,
        stdout=(folder / "out.txt").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def launch_environment(stage, ranks=2, flags=(), precision="no"):
    """The variables that accelerate sets for the ranks by the launch file, with a free port."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    line = [*_launcher_flags(stage, ranks, flags, precision), "x.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    # As `launch_command` does it for DeepSpeed.
    fields = [*defaults.deepspeed_config, "mixed_precision"]
    args.deepspeed_fields_from_accelerate_config = ",".join(fields)
    _, environment = prepare_deepspeed_cmd_env(args)
    changed = {name: text for name, text in environment.items() if os.environ.get(name) != text}
    changed.pop("PYTHONPATH", None)
    return changed | {"MASTER_PORT": args.master_port}


def choose_zero_on_cpu():
    """Patch this process as the head of this file says."""
    from accelerate.state import PartialState

    real = PartialState.__init__
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def init(self, cpu=False, **kwargs):
        real(self, cpu=False, **(kwargs | {"backend": "gloo"}))

    PartialState.__init__ = init
    import deepspeed.ops

    # Its collectives in shared memory, which GPUs do not have; compiling them takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _launcher_flags(stage, ranks, flags, precision):
    chosen = [] if precision is None else ["--mixed_precision", precision]
    file = ROOT / "launch" / f"zero{stage}.yaml"
    return ["--config_file", str(file), "--num_processes", str(ranks), *chosen, *flags]


if __name__ == "__main__":
    # The first folder is that of this file, whose modules are not meant to be found by their names.
    sys.path[0] = str(ROOT / "src")
    choose_zero_on_cpu()
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
