"""Device, number format and attention of a run on this machine; its random state."""

import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from luthier.config.schema import ModelConfig
from luthier.errors import UserError

Device = Literal["cuda", "mps", "cpu"]
Dtype = Literal["float32", "bfloat16", "float16"]

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
        raise UserError(
            "model.device=cuda: torch sees no CUDA device here (nvidia-smi shows whether there is "
            "one; torch may be the CPU build).\nUse model.device=auto for the best there is."
        )
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
    """Return the flash-attention that is installed and made for this GPU, else torch's own."""
    import torch

    # flash-attention computes in 16 bits alone.
    if device_type != "cuda" or dtype == "float32":
        return "sdpa"
    generation = torch.cuda.get_device_capability()[0]
    if generation == HOPPER and importlib.util.find_spec("flash_attn_interface"):
        return "flash_attention_3"
    if generation >= AMPERE and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa"


def _device_of_process(device_type: Device) -> str:
    """Return the device of this process: each process of a launch has its own GPU."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if device_type == "cuda" else device_type


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back after the block.

    With it a training draws the same numbers however often it was evaluated before, and whether a
    model was converted just now or found in the cache.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
