"""FSDP2 on CPU processes over gloo, with the settings of `launch/fsdp2.yaml`.

torch's `fully_shard` works on CPUs. Only accelerate 1.15 does not choose it there: its
`AcceleratorState` makes FSDP of MULTI_GPU and its like where ACCELERATE_USE_FSDP is set, and leaves
MULTI_CPU as it is. luthier therefore refuses FSDP without a GPU in words. `choose_fsdp_on_cpu`
patches these two places, in the processes of a test alone:

- `launch.checks._refuse_fsdp_without_gpu` no longer refuses;
- `AcceleratorState.__init__` takes the branch of MULTI_GPU, so that what follows (the sharding, its
  checks, the mixed precision of the shards) is accelerate's own code on GPUs.

Everything else is what runs on GPUs: the launch file, accelerate's reading of it, `fully_shard`,
luthier. There are two ways to start it:

- `launch_fsdp` runs `accelerate launch --config_file launch/fsdp2.yaml`, with torchrun above the
  ranks: for kills, signals and exit codes. It takes 20 s or more, as each rank imports everything.
- `fork_fsdp` forks the ranks from the `forks` fixture, in the environment that accelerate makes of
  the same file: a second or two. For everything else.

Flags win over the file, as in accelerate: `flags=("--fsdp_state_dict_type", "SHARDED_STATE_DICT")`.
Both give the file two processes, and by default no mixed precision, so that weights can be compared
with those of one process in float32 (about 1e-6); `precision=None` leaves what the file says, bf16.
All ranks write into `out.txt` of the folder. Every checkpoint and the end of a run also leave the
weights as they are on the ranks, gathered by torch itself and not by what writes checkpoints: see
`gathered_weights`. `saved_weights` reads what luthier wrote.
"""

import functools
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH_FILE = ROOT / "launch" / "fsdp2.yaml"
SHARDED = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
GATHERED = "gathered"
"""The folder beside a run's `model` with the weights of all ranks."""


@dataclass(frozen=True)
class FsdpRun:
    """How the processes of a run ended."""

    code: int
    """The launcher's exit code, or the first one of a rank that is not 0."""
    text: str
    """What all ranks and the launcher wrote in this run."""
    folder: Path
    """The run's folder: `output_dir` of the command line."""

    def gathered_weights(self, name="final"):
        """The weights on the ranks at the end, or at `step-N` where a checkpoint was taken.

        By the names of the trained model (peft's, with `base_model.model.`).
        """
        from safetensors.torch import load_file

        return load_file(self.folder / GATHERED / f"{name}.safetensors")


def launch_fsdp(folder, *words, ranks=2, flags=(), precision="no", limit=150, **environment):
    """Run `train.py WORDS` under `accelerate launch` with the launch file, and wait for its end.

    `words` must name `output_dir=`. A run that takes longer than `limit` seconds is killed with
    all its ranks, and its code is -9. Use `start_fsdp` for what must happen while it runs.
    """
    began, process = _text_size(folder), start_fsdp(
        folder, *words, ranks=ranks, flags=flags, precision=precision, **environment
    )  # fmt: skip
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill_group(process)
    return FsdpRun(process.returncode, _text(folder, began), folder / _output_dir(words))


def start_fsdp(folder, *words, ranks=2, flags=(), precision="no", **environment):
    """Start the same without waiting; the `Popen` of the launcher, in its own process group."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        *_launcher_flags(ranks, flags, precision), __file__, *words,
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # A group of its own: a test that fails kills the ranks with the launcher.
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | variables | environment, stdin=subprocess.DEVNULL,
        stdout=(folder / "out.txt").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def fork_fsdp(
    forks, folder, *words, ranks=2, flags=(), precision="no", limit=120, signals=None, **environment
):
    """Run the ranks as forks of the `forks` fixture, in the environment of the launch file.

    `signals` are those that a rank gets, by its number: see `Forks.start`.
    """
    settings = launch_environment(ranks, flags, precision)
    port, began = settings.pop("MASTER_PORT"), _text_size(folder)
    pids = forks.together(
        folder, port, *words, ranks=ranks, signals=signals, **settings,
        ACCELERATE_USE_CPU="false", **environment,
    )  # fmt: skip
    deadline = time.monotonic() + limit
    codes = [forks.wait(pid, limit=max(1, deadline - time.monotonic())) for pid in pids]
    code = next((code for code in codes if code != 0), 0)
    return FsdpRun(code, _text(folder, began), folder / _output_dir(words))


def launch_environment(ranks=2, flags=(), precision="no"):
    """The variables that accelerate sets for the ranks by the launch file, with a free port."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args([*_launcher_flags(ranks, flags, precision), "x.py"])
    args, *_ = _validate_launch_command(args)
    environment = prepare_multi_gpu_env(args)
    changed = {name: text for name, text in environment.items() if os.environ.get(name) != text}
    return changed | {"MASTER_PORT": args.master_port}


def saved_weights(folder):
    """The tensors of all weight files of a model or checkpoint folder, by their names there."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def largest_difference(weights, reference):
    """The largest difference of two sets of weights; they must have the same names and shapes."""
    assert weights.keys() == reference.keys(), weights.keys() ^ reference.keys()
    assert weights, "there are no weights"
    return max(
        float((weights[name].double() - reference[name].double()).abs().max()) for name in weights
    )


def gather_weights(model):
    """All parameters of a sharded model, whole, by the names they have without wrappers.

    Every rank has to call it.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        # What stays gathered behind a forward is rounded by mixed precision; the slices are not.
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): (
            parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        ).detach().clone().contiguous()
        for name, parameter in model.named_parameters()
    }  # fmt: skip


# In the ranks.


def choose_fsdp_on_cpu():
    """Patch this process as the head of this file says; before luthier looks at its launch."""
    from luthier.train.launch import checks

    # Called when torch is imported anyway, so mistakes in a config are told as fast as always.
    def choose(request, state):
        if request.distributed == "fsdp" and state.device.type == "cpu":
            _patch_accelerate()
            _keep_gathered_weights()
            _break_as_told()

    checks._refuse_fsdp_without_gpu = choose


def _patch_accelerate():
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def init(self, *args, **kwargs):
        shared = PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        real(self, *args, **kwargs)
        assert self.distributed_type == DistributedType.FSDP, self.distributed_type

    AcceleratorState.__init__ = init


def _keep_gathered_weights():
    """Write the weights of all ranks before each checkpoint and before the model is saved."""
    from luthier.train import loop
    from luthier.train.trainers.base import TrainerMixin

    save_model, save_checkpoint = loop.save_model, TrainerMixin._save_checkpoint
    if hasattr(save_model, "__wrapped__"):
        return

    @functools.wraps(save_model)
    def save_model_too(session):
        _write_weights(session.trainer, session.folder, "final")
        return save_model(session)

    def save_checkpoint_too(self, *args):
        _write_weights(self, Path(self.args.output_dir).parent, f"step-{self.state.global_step}")
        return save_checkpoint(self, *args)

    loop.save_model, TrainerMixin._save_checkpoint = save_model_too, save_checkpoint_too


def _write_weights(trainer, folder, name):
    from safetensors.torch import save_file

    weights = gather_weights(trainer.model)
    if trainer.accelerator.is_main_process:
        (folder / GATHERED).mkdir(exist_ok=True)
        save_file(weights, folder / GATHERED / f"{name}.safetensors")


def _break_as_told():
    """Break what the environment names, as `NAME:STEP`, at this step.

    - FSDP_DAMAGE: half of a weight file, or of a rank's shards, is zeros when it has been written.
    - FSDP_RAISE: the last rank raises an error of its own.
    """
    from luthier.train.trainers import sharded_weights
    from luthier.train.trainers.base import TrainerMixin

    damage, failing = (os.environ.get(name) for name in ("FSDP_DAMAGE", "FSDP_RAISE"))
    if damage:
        name = "_compare_shards" if damage.startswith("shards:") else "compare_saved"
        real = getattr(sharded_weights, name)

        def damaged(folder, *args):
            if folder.name == f"checkpoint-{damage.partition(':')[2]}" or folder.parent.name == (
                f"checkpoint-{damage.partition(':')[2]}"
            ):
                import torch

                if int(os.environ["RANK"]) == 0:
                    _zero_half(max(folder.iterdir(), key=lambda file: file.stat().st_size))
                torch.distributed.barrier()
            return real(folder, *args)

        setattr(sharded_weights, name, damaged)
    if failing:
        real_step = TrainerMixin._get_grad_norm

        def fail(self, *args, **kwargs):
            is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
            if is_last and self.state.global_step == int(failing):
                from luthier.errors import UserError

                raise UserError("rank 1 alone found what is wrong")
            return real_step(self, *args, **kwargs)

        TrainerMixin._get_grad_norm = fail


def _zero_half(file):
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)
    file.write_bytes(content)


# Small things.


def _launcher_flags(ranks, flags, precision):
    chosen = [] if precision is None else ["--mixed_precision", precision]
    return ["--config_file", str(LAUNCH_FILE), "--num_processes", str(ranks), *chosen, *flags]


def _output_dir(words):
    (name,) = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    return name


def _text_size(folder):
    file = folder / "out.txt"
    return file.stat().st_size if file.is_file() else 0


def _text(folder, began):
    return (folder / "out.txt").read_bytes()[began:].decode(errors="replace")


def _kill_group(process):
    import signal

    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    # The first folder is that of this file, whose modules are not meant to be found by their names.
    sys.path[0] = str(ROOT / "src")
    choose_fsdp_on_cpu()
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
