"""The ways of training that a machine may have, and how far each may be from float32.

Every path takes the same four steps on the same rows, all of them in each step, so that batches,
packed rows and processes make no difference to what is computed. The reference is plain
transformers and torch in float32 on the CPU: each row by itself, eager attention, no trainer.
"""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.config.schema import ModelConfig
from luthier.doctor.tiny_model import MAX_LENGTH, ROWS
from luthier.errors import UserError, nearest_option
from luthier.model.device import AMPERE, VARLEN_ATTENTION, Machine, choose_machine

STEPS = 4
Reference = Literal["full", "lora"]

_COMMON = (
    *("model=hub", "dataset=jsonl", "dataset.eval.share=null", f"chat.max_length={MAX_LENGTH}"),
    *("dry_run=true", f"trainer.args.max_steps={STEPS}", "trainer.args.learning_rate=1e-3"),
    *("trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_steps=0"),
    *("trainer.args.logging_steps=1", "trainer.args.disable_tqdm=true"),
    # No gradient is cut, but its norm is watched as in every run.
    *("trainer.args.max_grad_norm=1e9", "trainer.args.activation_checkpointing=false"),
)
_LORA = ("lora=default", "lora.r=8", "lora.lora_dropout=0")
_PACKED = ("trainer.args.packing=true",)
_FLOAT32 = ("model.dtype=float32",)


@dataclass(frozen=True)
class Tolerance:
    """How far a path may be from the reference, as a share of it."""

    loss: float
    """Of the loss of each step."""
    gradient: float
    """Of the gradient of the first step, all trained weights as one vector."""


EXACT = Tolerance(loss=1e-4, gradient=1e-4)
"""For float32 on any device: the same sums in another order.

24 bits round by 6e-8; 3e-7 was measured on a CPU (docs/doctor.md). A path that leaves anything out
is off by a percent and more.
"""
BFLOAT16 = Tolerance(loss=5e-3, gradient=5e-2)
"""For products in bfloat16.

8 bits round by 4e-3, at each of some twenty products in a row: they add up like a random walk in
the gradient, to some 2e-2, and cancel in the mean that the loss is. Measured on a CPU: 2e-4, 5e-3.
"""
TF32 = Tolerance(loss=1e-3, gradient=1e-2)
"""For float32 where torch may multiply it in TF32, such as in NVIDIA's containers: 11 bits round by
5e-4, and what they add up to is a tenth of bfloat16's."""
INT8 = Tolerance(loss=2e-2, gradient=1e-1)
"""For weights in 8 bits.

Each is rounded by up to 4e-3 of the largest of its row, and on a GPU each activation is, too.
Measured on a CPU, which rounds the weights alone: 8e-5 and 1.1e-2.
"""


@dataclass(frozen=True)
class TrainingPath:
    """One way of training: the settings of luthier that choose it, and what it is held against."""

    name: str
    settings: tuple[str, ...]
    tolerance: Tolerance
    advice: str
    """What to do in a run where this path is wrong."""
    reference: Reference = "full"
    processes: int = 1
    launch: dict[str, Any] = field(default_factory=dict)
    """The content of accelerate's config file, for several processes."""
    missing: str | None = None
    """Why this machine does not have the path; None where it has."""

    def overrides(self, folder: str, cache: str) -> list[str]:
        """Return what is typed for a run on this path; `folder` holds the model and the rows."""
        # As many rows in one step, over all processes.
        rows = ROWS // self.processes
        adapter = _LORA if self.reference == "lora" else ()
        files = (f"model.path={folder}/model", f"dataset.path={folder}/rows.jsonl")
        size = f"trainer.args.per_device_train_batch_size={rows}"
        return [*_COMMON, *files, f"dataset.cache={cache}", size, *adapter, *self.settings]


def list_training_paths() -> list[TrainingPath]:
    """Return every path with what this machine lacks for it. Imports torch."""
    device_type = _best_device_type()
    return [*_precisions(device_type), *_attentions(device_type), *_options(), *_launches()]


def select_training_paths(paths: list[TrainingPath], typed: str | None) -> list[TrainingPath]:
    """Return the paths of these names, separated by commas; all where there are none.

    Raises UserError for a name that no path has.
    """
    if typed is None:
        return paths
    names = [path.name for path in paths]
    chosen = [name.strip() for name in typed.split(",") if name.strip()]
    for name in chosen:
        if name not in names:
            near = nearest_option(name, names)
            hint = f" Did you mean {near}?" if near else ""
            raise UserError(
                f"--only {name}: there is no such path.{hint} Paths: {', '.join(names)}."
            )
    return [path for path in paths if path.name in chosen]


def _best_device_type() -> str:
    """Return the device that runs choose: cuda, mps or cpu."""
    return _machine().device_type


def _float32() -> Tolerance:
    """Return the tolerance of float32 here."""
    import torch

    is_tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    return TF32 if is_tf32 else EXACT


def _machine() -> Machine:
    """Return what a run without settings chooses here."""
    return choose_machine(ModelConfig(path=""))


def _precisions(device_type: str) -> Iterator[TrainingPath]:
    """Yield float32, bfloat16 and the quantized paths."""
    import torch

    advice = "trust nothing that is trained here, and reinstall torch for this machine"
    yield TrainingPath("float32", _FLOAT32, _float32(), advice)
    is_older = device_type == "cuda" and torch.cuda.get_device_capability()[0] < AMPERE
    yield TrainingPath(
        "bf16",
        ("model.dtype=bfloat16",),
        BFLOAT16,
        "train with model.dtype=float32",
        missing="this GPU has no bfloat16 (compute capability below 8.0)" if is_older else None,
    )
    yield TrainingPath("lora", _FLOAT32, _float32(), "train without an adapter", "lora")
    lacks = None if device_type != "mps" else "bitsandbytes has no kernels for Apple GPUs"
    repair = "reinstall bitsandbytes for this machine, and train without quantization until then"
    # In the format that a run would choose: each has kernels of its own.
    exact = _float32() if _machine().dtype == "float32" else BFLOAT16
    yield TrainingPath("nf4", ("quantization=nf4",), exact, repair, "lora", missing=lacks)
    yield TrainingPath("int8", ("quantization=int8",), INT8, repair, "lora", missing=lacks)


def _attentions(device_type: str) -> Iterator[TrainingPath]:
    """Yield packed rows with each attention that luthier trains them with."""
    import torch

    capability = torch.cuda.get_device_capability()[0] if device_type == "cuda" else 0
    has_flash = capability >= AMPERE
    no_gpu = "needs a CUDA GPU of compute capability 8.0 or newer"
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    for attention in ("eager", "sdpa", VARLEN_ATTENTION, *packages):
        package, missing = packages.get(attention), None
        if package is not None and not has_flash:
            missing = no_gpu
        elif package is not None and not _has_attention(attention, package):
            missing = f"the package {package} is not installed"
        # flash-attention computes in 16 bits alone.
        is_half = package is not None or (attention == VARLEN_ATTENTION and has_flash)
        dtype = ("model.dtype=bfloat16",) if is_half else _FLOAT32
        yield TrainingPath(
            f"packed-{attention}",
            (*_PACKED, *dtype, f"model.attention={attention}"),
            BFLOAT16 if is_half else _float32(),
            "choose another model.attention, or leave trainer.args.packing out",
            missing=missing,
        )


def _has_attention(attention: str, package: str) -> bool:
    """Return whether a flash-attention is installed, or is what runs choose without it."""
    if importlib.util.find_spec(package) is not None:
        return True
    # The package kernels may bring it from the hub.
    config = ModelConfig(path="", dtype="bfloat16")
    return choose_machine(config).attention == attention


def _options() -> Iterator[TrainingPath]:
    """Yield what changes how a step is computed and not what it computes."""
    yield TrainingPath(
        "checkpointing",
        (*_FLOAT32, "trainer.args.activation_checkpointing=true"),
        _float32(),
        "set trainer.args.activation_checkpointing=false",
    )
    yield TrainingPath(
        "compile",
        (*_FLOAT32, "trainer.args.torch_compile=true"),
        _float32(),
        "leave trainer.args.torch_compile out",
        missing=_find_missing_compiler(),
    )


def _find_missing_compiler() -> str | None:
    """Return what torch.compile lacks here: Triton on a GPU, a C++ compiler elsewhere."""
    if _best_device_type() == "cuda":
        has_triton = importlib.util.find_spec("triton") is not None
        return None if has_triton else "the package triton is not installed"
    if any(map(shutil.which, ("g++", "clang++", "c++"))):
        return None
    return "there is no C++ compiler (g++ or clang++)"


def _launches() -> Iterator[TrainingPath]:
    """Yield two processes under DDP and under FSDP2."""
    import torch

    gpus = torch.cuda.device_count()
    shared = {
        "compute_environment": "LOCAL_MACHINE",
        "num_processes": 2,
        "num_machines": 1,
        "main_process_port": 0,
        "mixed_precision": "no",
    }
    on_cpu = {"distributed_type": "MULTI_GPU", "use_cpu": True, "gpu_ids": "-1,-1"}
    # All of those that CUDA_VISIBLE_DEVICES shows; numbers here would take its place.
    on_gpus = {"distributed_type": "MULTI_GPU", "gpu_ids": "all"}
    missing = None
    if gpus == 1:
        missing = "there is one GPU"
    elif sys.platform == "win32":
        missing = "luthier starts several processes on Linux and macOS alone"
    yield TrainingPath(
        "ddp",
        _FLOAT32,
        _float32(),
        "train on one device; NCCL_DEBUG=INFO before the command says what the devices say",
        processes=2,
        launch=shared | (on_gpus if gpus else on_cpu),
        missing=missing,
    )
    # The settings of launch/fsdp2.yaml, in float32.
    fsdp = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": False,
    }
    if gpus == 0:
        missing = "there is no GPU, and accelerate shards only over GPUs"
    yield TrainingPath(
        "fsdp2",
        _FLOAT32,
        _float32(),
        "train with `luthier launch --config ddp`, or on one device",
        processes=2,
        launch=shared | {"distributed_type": "FSDP", "gpu_ids": "all", "fsdp_config": fsdp},
        missing=missing,
    )
