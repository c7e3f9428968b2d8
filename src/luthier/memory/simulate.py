"""A training step with tensors that have shapes and no content: what would be kept, and when."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.errors import UserError
from luthier.gc_pause import pause_gc
from luthier.memory import kernels, meta_model
from luthier.memory.meta_model import Weight
from luthier.memory.workload import Workload

# Bytes of tensors as a program makes and drops them, without asking an allocator.

WEIGHTS, GRADIENTS = "weights", "gradients"
Scratch = Callable[[Any, tuple[Any, ...], Any], int]
"""From an operator, its arguments and what it returns to the bytes that it needs meanwhile."""


@dataclass(frozen=True)
class Peak:
    """The moment with the most bytes, weights left out: how many, and of which kind."""

    bytes: int
    kinds: Mapping[str, int]
    """Bytes by the phase in which the tensors were made, and those of gradients in full."""


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that are alive while it is entered.

    Views and tensors changed in place share a storage, which counts once, for as long as anything
    holds it: autograd, a module, autocast's cache. Peaks are kept for several shares of the
    gradients at once, because sharding keeps a part of them on each process.
    """

    def __init__(self, block: int, shares: Iterable[float], scratch: Scratch) -> None:
        """Count in blocks of so many bytes; `scratch` tells what operators need inside."""
        super().__init__()
        self.phase = WEIGHTS
        self.kinds: Counter[str] = Counter()
        self.peaks = {share: Peak(0, {}) for share in shares}
        self._block, self._scratch = block, scratch
        self._alive: dict[int, list[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count tensors that were made elsewhere, or that turn out to be of another kind."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._alive:
                self._begin(tensor.untyped_storage(), kind)
                continue
            entry = self._alive[key]
            self.kinds[entry[1]] -= entry[0]
            self.kinds[kind] += entry[0]
            entry[1] = kind

    def bytes(self, kind: str) -> int:
        """Bytes of a kind that are alive now."""
        return self.kinds[kind]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it returns."""
        made = func(*args, **(kwargs or {}))
        grown = False
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._alive:
                    self._begin(storage, self.phase)
                    grown = True
        inside = self._scratch(func, args, made)
        if grown or inside:
            self._look(inside)
        return made

    def _begin(self, storage: Any, kind: str) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self._block) * self._block
        entry = [size, kind, None]

        def end(_: Any) -> None:
            del self._alive[key]
            self.kinds[entry[1]] -= size

        entry[2] = weakref.ref(storage, end)
        self._alive[key] = entry
        self.kinds[kind] += size

    def _look(self, inside: int) -> None:
        gradients = self.kinds[GRADIENTS]
        rest = self.kinds.total() - self.kinds[WEIGHTS] - gradients + inside
        for share, peak in self.peaks.items():
            now = rest + int(share * gradients)
            if now > peak.bytes:
                kinds = dict(self.kinds)
                kinds[self.phase] = kinds.get(self.phase, 0) + inside
                self.peaks[share] = Peak(now, kinds)


INPUTS, ACTIVATIONS, LOGITS, BACKWARD = "inputs", "activations", "logits", "backward"
"""Phases of a step, which name the tensors that are made in them."""
_SMALLEST_OFFLOADED = 1024
OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks of TRL's fused output layer."""


@dataclass(frozen=True)
class SimulatedStep:
    """What one micro-batch takes, besides the weights."""

    weights: tuple[Weight, ...]
    held: int
    """Bytes of weights, scales and buffers, in the allocator's blocks."""
    peaks: dict[float, Peak]
    """The highest moment, for each share of the gradients that stays on a process."""


def simulate_step(
    model: Any, workload: Workload, kind: str, shares: Iterable[float] = (1.0,)
) -> SimulatedStep:
    """Run forward and backward of one micro-batch on a model of shapes (`skeleton.build`).

    `kind` is the device that it would run on: cuda, cpu or mps. The model cannot be used again.
    Raises UserError for a model whose step depends on values and not on shapes alone.
    """
    try:
        with ExitStack() as stack:
            # Checkpoints put the generator back to where it was before a layer.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(pause_gc())
            stack.enter_context(kernels.device_kernels(kind, workload.flash))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            meta_model.fill_fake_weights(model)
            return _run(model, workload, kind, shares)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"plan: a step of {type(model).__name__} cannot be tried without its weights: "
            f"{str(error).splitlines()[0]}\nIts memory can only be measured in a run."
        ) from error


def _run(model: Any, workload: Workload, kind: str, shares: Iterable[float]) -> SimulatedStep:
    found = meta_model.list_weights(model)
    ledger = MemoryTracker(kernels.BLOCK_BYTES[kind], shares, kernels.scratch_counter(kind))
    ledger.add(meta_model.iterate_tensors(model), WEIGHTS)
    held = ledger.bytes(WEIGHTS)
    _prepare(model, workload)
    with ledger:
        _watch_gradients(model, ledger, kept=workload.accumulation > 1)
        _step(model, workload, ledger)
    return SimulatedStep(found, held, dict(ledger.peaks))


def _prepare(model: Any, workload: Workload) -> None:
    """Do what the trainer does to the model before its first step."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if workload.task == "CAUSAL_LM":
        add_fused_lm_head(base, outputs=OUTPUTS)
    checkpointing = workload.checkpointing
    if checkpointing is not None:
        base.activation_checkpointing_enable(every_n_layers=checkpointing.every_n_layers)
    model.train()
    if not workload.dropout:
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0


def _watch_gradients(model: Any, ledger: MemoryTracker, kept: bool) -> None:
    """Tell the ledger which tensors are gradients; `kept`: those of a batch before are there."""

    def tell(parameter: Any) -> None:
        ledger.add([parameter.grad], GRADIENTS)

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        parameter.register_post_accumulate_grad_hook(tell)
        if kept:
            ledger.phase = GRADIENTS
            parameter.grad = torch.empty_like(parameter)


def _step(model: Any, workload: Workload, ledger: MemoryTracker) -> None:
    """Forward and loss as luthier's trainers have them, and backward."""
    ledger.phase = INPUTS
    batch = _batch(model, workload)
    ledger.phase = ACTIVATIONS
    with _head_phase(ledger):
        loss = _loss(model, batch, workload, ledger)
        loss.backward()


def _loss(
    model: Any, batch: dict[str, torch.Tensor], workload: Workload, ledger: MemoryTracker
) -> torch.Tensor:
    """The loss of a language model in tiles, of all others from their logits."""
    labels = batch.pop("labels")
    with _forward_settings(model, workload):
        if workload.task == "CAUSAL_LM":
            outputs = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
            return -outputs.log_probs.sum()
        logits = model(**batch).logits
    ledger.phase = LOGITS
    logits = logits.float()
    if workload.task == "SEQ_CLS":
        return logits.sum()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    ledger.phase = BACKWARD
    return loss


@contextmanager
def _forward_settings(model: Any, workload: Workload) -> Iterator[None]:
    """What the trainer puts around the forward alone."""
    with ExitStack() as stack:
        if workload.autocast:
            dtype = getattr(torch, workload.autocast)
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        if _is_offloaded(workload):
            stack.enter_context(_elsewhere(model))
        yield


def _batch(model: Any, workload: Workload) -> dict[str, torch.Tensor]:
    """Rows of the full length, all of whose tokens train."""
    rows, length = workload.rows, workload.length
    batch = {name: torch.zeros(rows, length, dtype=torch.int64) for name in ("input_ids", "labels")}
    if workload.masked:
        eager = model.config._attn_implementation == "eager"
        dtype = model.get_input_embeddings().weight.dtype if eager else torch.bool
        batch["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=dtype)
    if workload.task == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = torch.zeros(rows, length, dtype=torch.int64)
    return batch


@contextmanager
def _head_phase(ledger: MemoryTracker) -> Iterator[None]:
    """Name the phases around the output layer, which works between forward and backward."""
    from trl.kernels import ChunkedLogProbFunction as Head

    forward, backward = Head.forward, Head.backward

    def within(work: Callable[..., Any], after: str) -> Any:
        def run(*args: Any) -> Any:
            ledger.phase = LOGITS
            made = work(*args)
            ledger.phase = after
            return made

        return staticmethod(run)

    Head.forward, Head.backward = within(forward, LOGITS), within(backward, BACKWARD)
    try:
        yield
    finally:
        Head.forward, Head.backward = staticmethod(forward), staticmethod(backward)


def _is_offloaded(workload: Workload) -> bool:
    checkpointing = workload.checkpointing
    return workload.offload or (checkpointing is not None and checkpointing.offload)


@contextmanager
def _elsewhere(model: Any) -> Iterator[None]:
    """Let activations wait in main memory: what is saved is dropped, and made anew when used."""
    stays = {tensor.untyped_storage()._cdata for tensor in meta_model.iterate_tensors(model)}

    def pack(tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.itemsize
        if size < _SMALLEST_OFFLOADED or tensor.untyped_storage()._cdata in stays:
            return tensor
        return tensor.shape, tensor.dtype

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return torch.empty(kept[0], dtype=kept[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
