"""Who holds what when several processes train one model: copies (DDP) or slices (FSDP2, ZeRO)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import UserError
from luthier.memory.meta_model import Weight

SHARDING_KINDS = ("none", "ddp", "fsdp2", "zero2", "zero3")
ZERO_BUCKET = 500_000_000
"""DeepSpeed: numbers of gradients that are reduced at once (`reduce_bucket_size`), whose buffer is
made whole. https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training"""
ZERO_LIVE, ZERO_PREFETCH = 1_000_000_000, 50_000_000
"""DeepSpeed: gathered weights that stay (`stage3_max_live_parameters`), and those fetched ahead."""
_HALF, _FULL = 2, 4


@dataclass(frozen=True)
class Sharding:
    """How processes share the work."""

    kind: str = "none"
    """none, ddp, fsdp2, zero2 or zero3."""
    processes: int = 1
    reshard: bool = True
    """FSDP2: gathered layers are freed between forward and backward."""
    offload_weights: bool = False
    """Slices of the weights, with gradients and optimizer, wait in main memory."""
    offload_optimizer: bool = False
    """The optimizer lives in main memory."""

    def gradient_share(self, full: bool, half: bool) -> float:
        """Bytes of gradients that stay on a process, for each byte that its backward makes.

        Gathered weights that train whole (`full`) have 16-bit gradients under mixed precision
        (`half`); FSDP2 keeps slices of them in float32, ZeRO in 16 bits.
        """
        if not self.slices:
            return 1.0
        made = _HALF if full and half else _FULL
        kept = _HALF if half and self.kind != "fsdp2" else _FULL
        return kept / made / self.processes

    @property
    def slices(self) -> bool:
        """Whether weights are in slices, so that autocast makes no copies of them."""
        return self.kind in ("fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class ProcessMemory:
    """What a process holds through the whole step because of the weights."""

    weights: dict[str, int]
    """Bytes by format, of weights that do not train."""
    trained: dict[str, int]
    """Bytes by format, of weights that do."""
    optimizer_share: float
    """The share of the optimizer's states that is on the device."""
    master: int = 0
    """Bytes of the float32 copy of 16-bit weights that the optimizer changes."""
    buckets: int = 0
    """Bytes of buffers in which gradients are sent."""
    gathered: int = 0
    """Bytes of weights that are whole for a while."""
    gradients_on_device: bool = True


def process_memory(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Return what one process holds; `half`: mixed precision computes in 16 bits."""
    ways = {"fsdp2": _fsdp2, "zero2": _zero2, "zero3": _zero3}
    way = ways.get(sharding.kind, _copies)
    return way(sharding, weights, half)


def _copies(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Everything on each process; DDP sends gradients from buckets of their own."""
    trained = _sum(weights, True)
    buckets = sum(trained.values()) if sharding.kind == "ddp" else 0
    return ProcessMemory(_sum(weights, False), trained, 1.0, buckets=buckets)


def _fsdp2(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Slices of all but quantized weights, and two gathered layers, one computed and one fetched.

    Slices of what trains are float32.

    accelerate's `fsdp2_prepare_model` gathers input and output embeddings by themselves; the output
    side stays gathered, and bitsandbytes' 4- and 8-bit weights are left whole on each process.
    """
    share = 0.0 if sharding.offload_weights else 1 / sharding.processes
    size = _HALF if half else _FULL
    layers: Counter[str] = Counter()
    for weight in weights:
        if weight.layer and not weight.is_quantized:
            layers[weight.layer] += weight.elements * size
    outside = sum(w.elements * size for w in _stay_gathered(weights))
    largest = max(layers.values(), default=0)
    gathered = outside + (2 * largest if sharding.reshard else layers.total())
    trained = [w for w in weights if w.trains]
    return ProcessMemory(
        _sum(weights, False, share),
        {"float32": int(sum(w.elements for w in trained) * _FULL * share)},
        share,
        buckets=2 * max(_by_layer(trained, size).values(), default=0),
        gathered=gathered,
        gradients_on_device=not sharding.offload_weights,
    )


def _zero2(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """All weights in 16 bits on each process; the optimizer's float32 copy and states in slices."""
    return _zero(sharding, weights, half, slices=1.0, gathered=0)


def _zero3(sharding: Sharding, weights: Sequence[Weight], half: bool) -> ProcessMemory:
    """Everything in slices but for quantized weights; gathered ones stay for a while."""
    slices = 0.0 if sharding.offload_weights else 1 / sharding.processes
    floating = sum(w.elements for w in weights if not w.is_quantized)
    live = min(floating, ZERO_LIVE + ZERO_PREFETCH) * (_HALF if half else _FULL)
    return _zero(sharding, weights, half, slices, live)


def _zero(
    sharding: Sharding, weights: Sequence[Weight], half: bool, slices: float, gathered: int
) -> ProcessMemory:
    size, share = (_HALF if half else _FULL), 1 / sharding.processes
    share = 0.0 if sharding.offload_optimizer else share
    trained = sum(w.elements for w in weights if w.trains)
    return ProcessMemory(
        _cast(weights, size, slices),
        {_format(size): int(trained * size * slices)},
        share,
        master=int(trained * _FULL * share) if half else 0,
        buckets=ZERO_BUCKET * size,
        gathered=gathered,
    )


def _sum(weights: Sequence[Weight], trained: bool, share: float = 1.0) -> dict[str, int]:
    """Bytes by format; quantized weights are never in slices."""
    found: Counter[str] = Counter()
    for weight in weights:
        if weight.trains == trained:
            found[weight.format] += int(weight.stored * (1.0 if weight.is_quantized else share))
    return dict(found)


def _cast(weights: Sequence[Weight], size: int, share: float = 1.0) -> dict[str, int]:
    """Bytes of frozen weights by format after DeepSpeed has cast those that can be."""
    found: Counter[str] = Counter()
    for weight in weights:
        if weight.trains:
            continue
        if weight.is_quantized:
            found[weight.format] += weight.stored
        else:
            found[_format(size)] += int(weight.elements * size * share)
    return dict(found)


def _stay_gathered(weights: Sequence[Weight]) -> list[Weight]:
    """Weights outside of the layers, less an input embedding that is not the output layer too."""
    outside = [w for w in weights if not w.layer and not w.is_quantized]
    others = {w.shape for w in outside if not w.embeds}
    return [w for w in outside if not (w.embeds and w.shape in others)]


def _by_layer(weights: Sequence[Weight], size: int) -> Counter[str]:
    """Bytes of what is gathered at once: a layer, an embedding, or all that is left."""
    found: Counter[str] = Counter()
    for weight in weights:
        found[weight.layer or ("embedding" if weight.embeds else "")] += weight.elements * size
    return found


def _format(size: int) -> str:
    return "16 bits" if size == _HALF else "float32"


# How a config file of accelerate shares the work, as the plan counts it.

_COPIES = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")


def read_sharding(file: str, processes: int | None = None) -> Sharding:
    """Return the sharding of an accelerate config such as `launch/fsdp2.yaml`.

    `processes` wins over the file's own number, as `--num_processes` does. Raises UserError for a
    file that cannot be read or a kind that the plan does not know.
    """
    config = _load(file)
    number = processes or int(config.get("num_processes") or 1)
    kind = str(config.get("distributed_type") or "NO").upper()
    if kind in ("NO", "FALSE"):
        return Sharding()
    if kind == "FSDP":
        return _fsdp(config.get("fsdp_config") or {}, number, file)
    if kind == "DEEPSPEED":
        return _deepspeed(config.get("deepspeed_config") or {}, number, file)
    if kind in _COPIES:
        return Sharding("ddp", number)
    raise _unknown(file, f"distributed_type: {kind}")


def _load(file: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--launch {file}: cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--launch {file}: this is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--launch {file}: this is no config file of accelerate.")
    return found


def _fsdp(config: dict[str, Any], number: int, file: str) -> Sharding:
    if int(config.get("fsdp_version") or 1) != 2:
        raise _unknown(file, "fsdp_version: 1 (luthier's own file is launch/fsdp2.yaml)")
    return Sharding(
        "fsdp2",
        number,
        reshard=bool(config.get("fsdp_reshard_after_forward", True)),
        offload_weights=bool(config.get("fsdp_offload_params", False)),
    )


def _deepspeed(config: dict[str, Any], number: int, file: str) -> Sharding:
    stage = int(config.get("zero_stage") or 0)
    if stage not in (2, 3):
        raise _unknown(file, f"zero_stage: {stage}")

    def is_away(name: str) -> bool:
        return str(config.get(name) or "none").lower() not in ("none", "no", "false")

    return Sharding(
        f"zero{stage}",
        number,
        offload_weights=stage == 3 and is_away("offload_param_device"),
        offload_optimizer=is_away("offload_optimizer_device"),
    )


def _unknown(file: str, what: str) -> UserError:
    return UserError(
        f"--launch {file}: {what} is not counted. The plan knows one process, DDP, FSDP2, and "
        "DeepSpeed ZeRO of stage 2 and 3."
    )
