"""The memory of each process when several train one model, as copies (DDP) or slices (FSDP2, ZeRO).

The settings are read from config files of accelerate.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import UserError
from luthier.memory.meta_model import Weight
from luthier.storage.typed_files import parse_yaml

SHARDING_KINDS = ("none", "ddp", "fsdp2", "zero2", "zero3")
ZERO_BUCKET = 500_000_000
"""DeepSpeed: numbers of gradients that are reduced at once (`reduce_bucket_size`), whose buffer is
allocated in full. https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training"""
ZERO_LIVE, ZERO_PREFETCH = 1_000_000_000, 50_000_000
"""DeepSpeed: gathered weights that stay (`stage3_max_live_parameters`), and those fetched ahead."""
_BYTES_16BIT, _BYTES_32BIT = 2, 4
_DDP_TYPES = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")
"""Values of accelerate's `distributed_type` that train copies."""


@dataclass(frozen=True)
class Sharding:
    """How processes share the training of one model."""

    kind: str = "none"
    """none, ddp, fsdp2, zero2 or zero3."""
    processes: int = 1
    copies: int = 1
    """FSDP2: how many groups of processes have all slices (`dp_replicate_size`)."""
    reshard: bool = True
    """FSDP2: whether gathered layers are freed between forward and backward."""
    offload_weights: bool = False
    """Whether slices of the weights, with gradients and optimizer, wait in main memory."""
    offload_optimizer: bool = False
    """Whether the optimizer's states are in main memory."""

    def gradient_share(self, full: bool, half: bool, accumulates: bool = False) -> float:
        """Return the bytes of gradients that stay on a process per byte that its backward makes.

        Gathered weights that train whole (`full`) have 16-bit gradients under mixed precision
        (`half`); FSDP2 keeps slices of them in float32, ZeRO in 16 bits. Where micro-batches are
        accumulated (`accumulates`), transformers trains all but the last under `no_sync`, in which
        FSDP2 keeps whole gradients; DeepSpeed allows no `no_sync`.
        """
        if not self.slices:
            return 1.0
        bytes_made = _BYTES_16BIT if full and half else _BYTES_32BIT
        bytes_kept = _BYTES_16BIT if half and self.kind != "fsdp2" else _BYTES_32BIT
        if accumulates and self.kind == "fsdp2":
            return bytes_kept / bytes_made
        return bytes_kept / bytes_made * self.copies / self.processes

    @property
    def slices(self) -> bool:
        """Whether weights are in slices, so that autocast makes no copies of them."""
        return self.kind in ("fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class ProcessMemory:
    """The memory that a process holds through a step because of the weights."""

    weights: dict[str, int]
    """Bytes by number format, of weights that do not train."""
    trained: dict[str, int]
    """Bytes by number format, of weights that train."""
    optimizer_share: float
    """The share of the optimizer's states that is on the device."""
    master: int = 0
    """Bytes of the float32 copy of 16-bit weights that the optimizer changes."""
    buckets: int = 0
    """Bytes of buffers in which gradients are sent."""
    gathered: int = 0
    """Bytes of weights that are gathered from slices for a while."""
    gradients_on_device: bool = True


def process_memory(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Return the memory of one process; `half`: mixed precision computes in 16 bits."""
    if sharding.kind == "fsdp2":
        return _memory_fsdp2(sharding, weights, half)
    if sharding.slices:
        return _memory_zero(sharding, weights, half)
    # A full copy on each process; DDP sends gradients from buckets of their own.
    trained = _bytes_by_format(weights, True)
    buckets = sum(trained.values()) if sharding.kind == "ddp" else 0
    return ProcessMemory(_bytes_by_format(weights, False), trained, 1.0, buckets=buckets)


def _memory_fsdp2(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Return the memory of slices, and of two gathered layers: one computed and one fetched.

    Slices of trained weights are float32. accelerate's `fsdp2_prepare_model` gathers input and
    output embeddings by themselves; the output side stays gathered, and bitsandbytes' 4- and 8-bit
    weights are left whole on each process.
    """
    share = 0.0 if sharding.offload_weights else sharding.copies / sharding.processes
    size = _BYTES_16BIT if half else _BYTES_32BIT
    layers: Counter[str] = Counter()
    for weight in weights:
        if weight.layer and not weight.is_quantized:
            layers[weight.layer] += weight.elements * size
    # accelerate gathers layers one at a time, and fetches the next while one computes.
    outside = sum(w.elements * size for w in _always_gathered(weights))
    largest = max(layers.values(), default=0)
    gathered = outside + (2 * largest if sharding.reshard else layers.total())
    trained = [w for w in weights if w.trains]
    return ProcessMemory(
        _bytes_by_format(weights, False, share),
        {"float32": int(sum(w.elements for w in trained) * _BYTES_32BIT * share)},
        share,
        # luthier has FSDP2 add the gradients of the ranks in float32.
        buckets=2 * max(_bytes_by_layer(trained, _BYTES_32BIT).values(), default=0),
        gathered=gathered,
        gradients_on_device=not sharding.offload_weights,
    )


def _memory_zero(sharding: Sharding, weights: Sequence[Weight], is_half: bool) -> ProcessMemory:
    """Return the memory under DeepSpeed, whose optimizer holds slices of a float32 copy.

    ZeRO-2 keeps all weights on each process. ZeRO-3 keeps slices of those that are not quantized,
    and gathered ones stay for a while.
    """
    size = _BYTES_16BIT if is_half else _BYTES_32BIT
    slices, gathered = 1.0, 0
    if sharding.kind == "zero3":
        slices = 0.0 if sharding.offload_weights else 1 / sharding.processes
        floating = sum(w.elements for w in weights if not w.is_quantized)
        gathered = min(floating, ZERO_LIVE + ZERO_PREFETCH) * size
    share = 0.0 if sharding.offload_optimizer else 1 / sharding.processes
    trained = sum(w.elements for w in weights if w.trains)
    dtype = "16 bits" if size == _BYTES_16BIT else "float32"
    # DeepSpeed casts all weights that are not quantized.
    frozen: Counter[str] = Counter()
    for weight in weights:
        if not weight.trains and weight.is_quantized:
            frozen[weight.format] += weight.stored
        elif not weight.trains:
            frozen[dtype] += int(weight.elements * size * slices)
    return ProcessMemory(
        dict(frozen),
        {dtype: int(trained * size * slices)},
        share,
        master=int(trained * _BYTES_32BIT * share) if is_half else 0,
        buckets=ZERO_BUCKET * size,
        gathered=gathered,
    )


def _bytes_by_format(
    weights: Sequence[Weight], trained: bool, share: float = 1.0
) -> dict[str, int]:
    """Return bytes by number format, of trained weights or of the others, in slices of `share`."""
    # Quantized weights are never in slices.
    sizes: Counter[str] = Counter()
    for weight in weights:
        if weight.trains == trained:
            sizes[weight.format] += int(weight.stored * (1.0 if weight.is_quantized else share))
    return dict(sizes)


def _always_gathered(weights: Sequence[Weight]) -> list[Weight]:
    """Return the weights outside of layers, but for an input embedding that is no output layer."""
    outside = [w for w in weights if not w.layer and not w.is_quantized]
    others = {w.shape for w in outside if not w.embeds}
    return [w for w in outside if not (w.embeds and w.shape in others)]


def _bytes_by_layer(weights: Sequence[Weight], size: int) -> Counter[str]:
    """Return the bytes that are gathered at once: of a layer, an embedding, or all others."""
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.layer or ("embedding" if weight.embeds else "")] += weight.elements * size
    return sizes


def read_sharding(file: str, processes: int | None = None) -> Sharding:
    """Return the sharding of a config file of accelerate, such as `launch/fsdp2.yaml`.

    `processes` wins over the file's own number, as `--num_processes` does. Raises UserError for a
    file that cannot be read or a sharding that the plan does not count.
    """
    try:
        config = parse_yaml(Path(file).expanduser().read_text(encoding="utf-8"), file)
    except OSError as error:
        raise UserError(f"--launch {file}: cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--launch {file}: this is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--launch {file}: this is no config file of accelerate.")
    count = processes or int(config.get("num_processes") or 1)
    distributed_type = str(config.get("distributed_type") or "NO").upper()
    problem = f"distributed_type: {distributed_type}"
    if distributed_type in ("NO", "FALSE"):
        return Sharding()
    if distributed_type in _DDP_TYPES:
        return Sharding("ddp", count)
    if distributed_type == "FSDP":
        settings = config.get("fsdp_config") or {}
        sizes = config.get("parallelism_config") or {}
        keys = [f"parallelism_config_{name}_size" for name in ("tp", "cp", "sp")]
        split = next((key for key in keys if int(sizes.get(key) or 1) > 1), None)
        if split is not None:
            problem = f"{split}: {sizes[split]} (a run refuses it)"
        elif int(settings.get("fsdp_version") or 1) != 2:
            problem = "fsdp_version: 1 (luthier's own file is fsdp2)"
        else:
            return Sharding(
                "fsdp2",
                count,
                copies=int(sizes.get("parallelism_config_dp_replicate_size") or 1),
                reshard=bool(settings.get("fsdp_reshard_after_forward", True)),
                offload_weights=bool(settings.get("fsdp_offload_params", False)),
            )
    if distributed_type == "DEEPSPEED":
        settings = config.get("deepspeed_config") or {}
        stage = int(settings.get("zero_stage") or 0)
        if stage in (2, 3):
            return Sharding(
                f"zero{stage}",
                count,
                offload_weights=stage == 3 and _is_offloaded(settings, "offload_param_device"),
                offload_optimizer=_is_offloaded(settings, "offload_optimizer_device"),
            )
        problem = f"zero_stage: {stage}"
    raise UserError(
        f"--launch {file}: {problem} is not counted. The plan knows one process, DDP, FSDP2, and "
        "DeepSpeed ZeRO of stage 2 and 3."
    )


def _is_offloaded(settings: dict[str, Any], name: str) -> bool:
    """Tell whether a setting of DeepSpeed names a device; YAML reads a bare `no` as false."""
    return str(settings.get(name) or "none").lower() not in ("none", "no", "false")
