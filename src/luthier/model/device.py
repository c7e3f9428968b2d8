"""Device, number format and attention of a run on this machine; its random state."""

import importlib.util
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.config.library_settings import TrainerArgs
from luthier.config.schema import ModelConfig
from luthier.errors import UserError

Device = Literal["cuda", "mps", "cpu"]
Dtype = Literal["float32", "bfloat16", "float16"]

VARLEN_ATTENTION = "varlen"
"""luthier's own attention for packed rows, by the name that transformers knows it by."""
AMPERE, HOPPER = 8, 9
"""CUDA compute capabilities: the first with bfloat16, and the one that flash-attention 3 is for."""


@dataclass(frozen=True)
class Machine:
    """The device that a model runs on, and how it computes there."""

    device: str
    """`cpu`, `mps`, or `cuda:N`, N being the process's local rank."""
    dtype: Dtype
    """The number format of the activations (and of frozen weights that are not quantized)."""
    attention: str
    """An attention implementation of transformers."""

    @property
    def device_type(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]


_GPU_FILES = (
    *("/dev/nvidia*", "/proc/driver/nvidia", "/dev/dxg", "/usr/lib/wsl/lib/libcuda.so*"),
    *("/dev/kfd", "/dev/nvmap", "/dev/nvhost-gpu"),
)
"""What Linux has where a driver for torch's CUDA or ROCm builds is loaded, WSL and Jetson too."""
_ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
"""Attention implementation -> the module that it needs, or `kernels` in its place."""


def check_requirements(config: ModelConfig, args: TrainerArgs) -> None:
    """Raise UserError for what this machine surely lacks: a GPU or a package; imports no torch.

    `choose_machine` asks torch itself, later.
    """
    _check_attention(config.attention)
    is_without_gpu = config.device == "cpu" or (config.device == "auto" and has_surely_no_gpu())
    if config.device == "cuda" and has_surely_no_gpu():
        raise UserError(_NO_CUDA)
    settings = {
        "model.dtype=float16": config.dtype == "float16" and args.fp16 is not False,
        "trainer.args.fp16=true": bool(args.fp16),
    }
    if is_without_gpu and (float16 := [name for name, is_set in settings.items() if is_set]):
        raise UserError(
            f"{float16[0]}: training in float16 needs a GPU, and this run is on the CPU. Remove "
            "it; model.dtype=auto chooses what the CPU computes well."
        )
    check_gpu_settings(args, "cpu" if is_without_gpu else "cuda")


def check_gpu_settings(args: TrainerArgs, device_type: str) -> None:
    """Raise UserError for settings of `trainer.args` that need a CUDA GPU or a missing package."""
    checkpointing = args.activation_checkpointing_kwargs
    needs_gpu = {
        "activation_offloading": args.activation_offloading,
        "activation_checkpointing_kwargs.offload": checkpointing.get("offload"),
        "use_liger_kernel": args.use_liger_kernel,
    }
    gpu_settings = [name for name, value in needs_gpu.items() if value]
    if gpu_settings and device_type != "cuda":
        raise UserError(
            f"trainer.args.{gpu_settings[0]} is for a CUDA GPU, and this run is on {device_type}. "
            "Remove it."
        )
    # transformers would raise an ImportError for it only when the trainer is built, behind the
    # loading of the model.
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("trainer.args.use_liger_kernel needs: pip install liger-kernel")


def _check_attention(attention: str) -> None:
    """Raise UserError for an attention implementation whose package is not installed."""
    # transformers 5 takes a kernel of the hub where flash-attention itself is not installed.
    package = "kernels" if "/" in attention else _ATTENTION_PACKAGES.get(attention)
    if package is None or any(map(importlib.util.find_spec, (package, "kernels"))):
        return
    name = "kernels" if package == "kernels" else "flash-attn --no-build-isolation"
    raise UserError(
        f"model.attention={attention} needs a package that is not installed. Install it (pip "
        f"install {name}), or set model.attention=auto for the fastest that is."
    )


def has_surely_no_gpu() -> bool:
    """Return whether torch is a build for CPUs alone, or Linux has no driver; imports no torch."""
    if sys.platform == "darwin":
        return False
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    with suppress(OSError):
        text = (folder / "version.py").read_text(encoding="utf-8") if folder else ""
        backends = re.findall(r"^(?:cuda|hip|rocm|xpu)\b.*= *(.+)$", text, flags=re.MULTILINE)
        if backends and all(version.strip() == "None" for version in backends):
            return True
    files = (file for pattern in _GPU_FILES for file in Path("/").glob(pattern[1:]))
    return sys.platform == "linux" and next(files, None) is None


_NO_CUDA = (
    "model.device=cuda: torch sees no CUDA device here (nvidia-smi shows whether there is one; "
    "torch may be the CPU build).\nUse model.device=auto for the best there is."
)


def choose_machine(config: ModelConfig) -> Machine:
    """Return the configured device, dtype and attention, with each `auto` decided.

    Raises UserError for a device that this machine does not have.
    """
    device_type: Device = _best_device() if config.device == "auto" else config.device
    _check_device(device_type)
    dtype: Dtype = _best_dtype(device_type) if config.dtype == "auto" else config.dtype
    attention = config.attention
    if attention == "auto":
        attention = _best_attention(device_type, dtype)
    return Machine(_device_of_process(device_type), dtype, attention)


def _best_device() -> Device:
    """Return the fastest type of device that torch sees."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device_type: Device) -> None:
    """Raise UserError where torch sees no such device."""
    import torch

    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(_NO_CUDA)
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "model.device=mps: torch sees no Apple GPU here.\n"
            "Use model.device=auto for the best there is."
        )


def _best_dtype(device_type: Device) -> Dtype:
    """Return bfloat16 where the hardware multiplies it; docs/model.md has measurements of CPUs."""
    import torch

    if device_type == "cuda":
        in_hardware = torch.cuda.get_device_capability()[0] >= AMPERE
    else:
        in_hardware = device_type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return "bfloat16" if in_hardware else "float32"


def _best_attention(device_type: Device, dtype: Dtype) -> str:
    """Return the flash-attention that is made for this GPU, else torch's own.

    One that is installed comes first, then the hub's where the package `kernels` is installed.
    """
    import torch

    # flash-attention computes in 16 bits alone.
    if device_type != "cuda" or dtype == "float32":
        return "sdpa"
    generation = torch.cuda.get_device_capability()[0]
    names = ["flash_attention_3"] if generation == HOPPER else []
    names += ["flash_attention_2"] if generation >= AMPERE else []
    for name in names:
        if importlib.util.find_spec(_ATTENTION_PACKAGES[name]):
            return name
    if importlib.util.find_spec("kernels"):
        return next(filter(_loads_hub_kernel, names), "sdpa")
    return "sdpa"


def _loads_hub_kernel(attention: str) -> bool:
    """Return whether transformers gets a flash-attention's kernel from the hub, or has it here."""
    from transformers import modeling_flash_attention_utils as flash

    # Without a network, or without a build for this torch, torch's own attention computes.
    try:
        flash.lazy_import_flash_attention(flash.FLASH_ATTN_KERNEL_FALLBACK[attention])
    except Exception:
        return False
    return True


def _device_of_process(device_type: Device) -> str:
    """Return the device of this process: each process of a launch has its own GPU."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if device_type == "cuda" else device_type


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back after the block.

    With it a training draws the same numbers however often it was evaluated before, and whether a
    model was converted just now or found in the cache.
    """
    restore = capture_random_state()
    try:
        yield
    finally:
        restore()


def capture_random_state() -> Callable[[], None]:
    """Return a function that puts the random state back to what it is now."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    cpu, gpus = torch.random.get_rng_state(), torch.cuda.get_rng_state_all()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus)

    return restore
