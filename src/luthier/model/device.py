"""Device, number format and attention for this machine, or as configured."""

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
    """Where the model runs and how it computes there."""

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
    kind: Device = _best_device() if config.device == "auto" else config.device
    _check_device(kind)
    dtype: Dtype = _best_dtype(kind) if config.dtype == "auto" else config.dtype
    attention = config.attention
    if attention == "auto":
        attention = _best_attention(kind, dtype)
    return Machine(_numbered(kind), dtype, attention)


def _best_device() -> Device:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(kind: Device) -> None:
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device=cuda: torch sees no CUDA device here (nvidia-smi shows whether there is "
            "one; torch may be the CPU build).\nUse model.device=auto for the best there is."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "model.device=mps: torch sees no Apple GPU here.\n"
            "Use model.device=auto for the best there is."
        )


def _best_dtype(kind: Device) -> Dtype:
    """bfloat16 where the hardware multiplies it; docs/model.md has the measurements for CPUs."""
    import torch

    if kind == "cuda":
        in_hardware = torch.cuda.get_device_capability()[0] >= AMPERE
    else:
        in_hardware = kind == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return "bfloat16" if in_hardware else "float32"


def _best_attention(kind: Device, dtype: Dtype) -> str:
    """The flash-attention that is installed and made for this GPU, else torch's own."""
    import torch

    if kind != "cuda" or dtype == "float32":
        return "sdpa"
    generation = torch.cuda.get_device_capability()[0]
    if generation == HOPPER and importlib.util.find_spec("flash_attn_interface"):
        return "flash_attention_3"
    if generation >= AMPERE and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa"


def _numbered(kind: Device) -> str:
    """Give each process of a launch its own GPU."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if kind == "cuda" else kind


# The random state of a process: kept where something that is no part of the training draws.


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back behind the block.

    So that a training draws the same numbers however often it was evaluated before, and whether a
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
