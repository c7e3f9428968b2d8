"""One training step on tensors without content, and the bytes that it would hold.

The step runs under torch's FakeTensorMode; `MemoryTracker` counts the storages that are alive.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.errors import UserError
from luthier.gc_pause import pause_gc
from luthier.memory import kernels, meta_model
from luthier.memory.index_values import IndexValues, make_tensor
from luthier.memory.meta_model import Weight
from luthier.memory.workload import Workload

WEIGHTS, GRADIENTS = "weights", "gradients"
INPUTS, ACTIVATIONS, LOGITS, BACKWARD = "inputs", "activations", "logits", "backward"
"""Phases of a step: a tensor is counted under the phase in which it was made."""
OUTPUTS = ("log_probs", "entropy", "is_top1")
"""The results that SFTTrainer asks of the fused output layer."""
_WITH_FLAT_MASKS = ("bloom", "mpt", "mamba", "falcon_mamba")
"""Model types whose mask is of (rows, length) alone: they make positions (ALiBi) of it, or have no
attention."""
_SMALLEST_OFFLOADED = 1024
"""Bytes: smaller tensors stay where they are when activations are offloaded."""


@dataclass(frozen=True)
class Peak:
    """The moment with the most bytes alive, weights left out."""

    bytes: int
    bytes_by_phase: Mapping[str, int]
    """The bytes by the phase in which tensors were made; those of gradients are not shared."""


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that are alive while it is entered.

    Views and tensors changed in place share a storage, which counts once, for as long as anything
    holds it: autograd, a module, autocast's cache. Peaks are kept for several shares of the
    gradients at once, because sharding keeps a part of them on each process.
    """

    def __init__(self, device_type: str, shares: Iterable[float]) -> None:
        """Count in the blocks of a device's allocator, and peaks for each of these shares."""
        super().__init__()
        self.phase = WEIGHTS
        self.bytes_by_phase: Counter[str] = Counter()
        self.peaks = {share: Peak(0, {}) for share in shares}
        self._device_type = device_type
        self._alive: dict[int, list[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors under `category`, also those that were counted under a phase before."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._alive:
                self._count(tensor.untyped_storage(), category)
                continue
            entry = self._alive[key]
            self.bytes_by_phase[entry[1]] -= entry[0]
            self.bytes_by_phase[category] += entry[0]
            entry[1] = category

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count the tensors that it returns."""
        output = func(*args, **(kwargs or {}))
        grown = False
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._alive:
                    self._count(storage, self.phase)
                    grown = True
        scratch = kernels.scratch_bytes(self._device_type, func, args)
        if grown or scratch:
            self._update_peaks(scratch)
        return output

    def _count(self, storage: Any, phase: str) -> None:
        """Count a new storage until nothing holds it any more."""
        key, block = storage._cdata, kernels.BLOCK_BYTES[self._device_type]
        size = -(-storage.nbytes() // block) * block
        entry = [size, phase, None]

        def forget(_: Any) -> None:
            del self._alive[key]
            self.bytes_by_phase[entry[1]] -= size

        entry[2] = weakref.ref(storage, forget)
        self._alive[key] = entry
        self.bytes_by_phase[phase] += size

    def _update_peaks(self, scratch: int) -> None:
        """Raise the peaks that the bytes alive now exceed, with those that an operator needs."""
        gradients = self.bytes_by_phase[GRADIENTS]
        others = self.bytes_by_phase.total() - self.bytes_by_phase[WEIGHTS] - gradients + scratch
        for share, peak in self.peaks.items():
            now = others + int(share * gradients)
            if now > peak.bytes:
                by_phase = dict(self.bytes_by_phase)
                by_phase[self.phase] = by_phase.get(self.phase, 0) + scratch
                self.peaks[share] = Peak(now, by_phase)


@dataclass(frozen=True)
class SimulatedStep:
    """The memory of one micro-batch."""

    weights: tuple[Weight, ...]
    held: int
    """Bytes of weights, scales and buffers, in the allocator's blocks."""
    peaks: dict[float, Peak]
    """The highest moment, for each share of the gradients that stays on a process."""
    packing: str | None = None
    """What is quantized and what is not, as `describe_packing` says it."""


def simulate_step(
    model: Any,
    workload: Workload,
    device_type: str,
    shares: Iterable[float] = (1.0,),
    processor: Any = None,
) -> SimulatedStep:
    """Run forward and backward of one micro-batch on a model from `build_meta_model`.

    `device_type` is where it would run: cuda, cpu or mps. `shares` are those of the gradients that
    a process keeps, each of which gets a peak. `processor` is the model's `VisionProcessor`, where
    the workload has images. The model cannot be used again. Raises UserError for a model whose step
    depends on values and not on shapes alone.
    """
    images = make_image_inputs(processor, workload) if workload.images else {}
    try:
        with ExitStack() as stack:
            # Checkpoints put the generator back to where it was before a layer.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(pause_gc())
            stack.enter_context(kernels.device_kernels(device_type, workload.flash))
            fake_mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            meta_model.fill_fake_weights(model)
            if images:
                stack.enter_context(patch.object(torch, "tensor", make_tensor))
                values = stack.enter_context(IndexValues(fake_mode))
                images = {name: values.make_input(value) for name, value in images.items()}
            return _run_step(model, workload, device_type, shares, images)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"plan: a step of {type(model).__name__} cannot be tried without its weights: "
            f"{str(error).splitlines()[0]}\nIts memory can only be measured in a run."
        ) from error


def make_image_inputs(processor: Any, workload: Workload) -> dict[str, torch.Tensor]:
    """Return the inputs of a workload's micro-batch with images, which are blank.

    `processor` is the model's `VisionProcessor`. Rows are longer than the workload's where the
    tokens of the images are more. The last row has padding, as one of them mostly does.
    """
    from PIL import Image

    sizes = workload.images
    refs = [{"height": height, "width": width} for height, width in sizes]
    # Text stands between images: Qwen's positions take neighbours for one.
    ids = [index for ref in refs for index in (*processor.encode_image(ref), 0)]
    ids += [0] * (workload.length - len(ids))
    input_ids = torch.tensor([ids] * workload.rows)
    pictures = [Image.new("RGB", (width, height), "white") for height, width in sizes]
    mask = torch.ones_like(input_ids)
    mask[-1, -1] = 0 if workload.masked else 1
    pixels = processor.pixel_inputs([pictures] * workload.rows)
    types = processor.token_type_inputs(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, **pixels, **types}


def _run_step(
    model: Any,
    workload: Workload,
    device_type: str,
    shares: Iterable[float],
    images: Mapping[str, torch.Tensor] | None = None,
) -> SimulatedStep:
    """Run a step on a filled model, with kernels and fake tensors in place.

    `images` are what `make_image_inputs` gives, for a workload with images.
    """
    weights = meta_model.list_weights(model)
    tracker = MemoryTracker(device_type, shares)
    tracker.add(meta_model.iterate_tensors(model), WEIGHTS)
    weight_bytes = tracker.bytes_by_phase[WEIGHTS]
    _prepare(model, workload, device_type)
    with tracker:
        _track_gradients(model, tracker, has_earlier_batch=workload.accumulation > 1)
        _forward_backward(model, workload, tracker, images)
    return SimulatedStep(weights, weight_bytes, dict(tracker.peaks))


def _prepare(model: Any, workload: Workload, device_type: str) -> None:
    """Do what the trainer does to the model before its first step."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    from luthier.model.fused_head import use_head_log_probs

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # TRL 1.16 replaces the forward of the output layer so in its SFTTrainer.
    if workload.task == "CAUSAL_LM":
        add_fused_lm_head(base, outputs=OUTPUTS)
        if device_type != "cuda":
            use_head_log_probs(model, compact=False)
    checkpointing = workload.checkpointing
    if checkpointing is not None:
        base.activation_checkpointing_enable(every_n_layers=checkpointing.every_n_layers)
    model.train()
    if not workload.dropout:
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0


def _track_gradients(model: Any, tracker: MemoryTracker, has_earlier_batch: bool) -> None:
    """Have gradients counted as such; `has_earlier_batch`: those of a batch before are there."""

    def count_gradient(parameter: Any) -> None:
        tracker.add([parameter.grad], GRADIENTS)

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        parameter.register_post_accumulate_grad_hook(count_gradient)
        if has_earlier_batch:
            tracker.phase = GRADIENTS
            parameter.grad = torch.empty_like(parameter)


def _forward_backward(
    model: Any,
    workload: Workload,
    tracker: MemoryTracker,
    images: Mapping[str, torch.Tensor] | None,
) -> None:
    """Forward and loss as luthier's trainers have them, and backward."""
    tracker.phase = INPUTS
    if images:
        # They were made before the step was watched.
        tracker.add(images.values(), INPUTS)
        batch = {**images, "labels": torch.zeros_like(images["input_ids"])}
    else:
        batch = _full_batch(model, workload)
    tracker.phase = ACTIVATIONS
    with _output_layer_phases(tracker):
        loss = _compute_loss(model, batch, workload, tracker)
        loss.backward()


def _compute_loss(
    model: Any, batch: dict[str, torch.Tensor], workload: Workload, tracker: MemoryTracker
) -> torch.Tensor:
    """Return the loss, of a language model in tiles and of all others from their logits."""
    labels = batch.pop("labels")
    with _forward_context(model, workload):
        # TRL's output layer works on tiles of tokens, and never holds all logits.
        if workload.task == "CAUSAL_LM":
            outputs = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
            return -outputs.log_probs.sum()
        logits = model(**batch).logits
    tracker.phase = LOGITS
    logits = logits.float()
    if workload.task == "SEQ_CLS":
        return logits.sum()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    tracker.phase = BACKWARD
    return loss


@contextmanager
def _forward_context(model: Any, workload: Workload) -> Iterator[None]:
    """Enter what the trainer puts around the forward alone: autocast and offloading."""
    with ExitStack() as stack:
        if workload.autocast:
            dtype = getattr(torch, workload.autocast)
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        checkpointing = workload.checkpointing
        if workload.offload or (checkpointing is not None and checkpointing.offload):
            stack.enter_context(_drop_saved_tensors(model))
        yield


def _full_batch(model: Any, workload: Workload) -> dict[str, torch.Tensor]:
    """Return rows of the full length, all of whose tokens train."""
    rows, length = workload.rows, workload.length
    batch = {name: torch.zeros(rows, length, dtype=torch.int64) for name in ("input_ids", "labels")}
    # Eager attention adds a mask of numbers, the other kernels take one of truth values.
    if workload.masked and _takes_flat_mask(model.config):
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
    elif workload.masked:
        eager = model.config._attn_implementation == "eager"
        dtype = model.get_input_embeddings().weight.dtype if eager else torch.bool
        batch["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=dtype)
    if workload.task == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = torch.zeros(rows, length, dtype=torch.int64)
    return batch


def _takes_flat_mask(config: Any) -> bool:
    """Return whether the model takes no mask of its own shape for each row of queries."""
    return config.model_type in _WITH_FLAT_MASKS or getattr(config, "alibi", False) is True


@contextmanager
def _output_layer_phases(tracker: MemoryTracker) -> Iterator[None]:
    """Name the phases around the output layer, which works between forward and backward."""
    from trl.kernels import ChunkedLogProbFunction

    from luthier.model.fused_head import HeadLogProbs

    def within(work: Callable[..., Any], after: str) -> Any:
        def run(*args: Any) -> Any:
            tracker.phase = LOGITS
            output = work(*args)
            tracker.phase = after
            return output

        return staticmethod(run)

    with ExitStack() as stack:
        for head in (ChunkedLogProbFunction, HeadLogProbs):
            stack.enter_context(patch.object(head, "forward", within(head.forward, LOGITS)))
            stack.enter_context(patch.object(head, "backward", within(head.backward, BACKWARD)))
        yield


@contextmanager
def _drop_saved_tensors(model: Any) -> Iterator[None]:
    """Let activations wait in main memory: what is saved is dropped, and made anew when used."""
    stays = {tensor.untyped_storage()._cdata for tensor in meta_model.iterate_tensors(model)}

    def pack(tensor: torch.Tensor) -> Any:
        size = tensor.numel() * tensor.itemsize
        if size < _SMALLEST_OFFLOADED or tensor.untyped_storage()._cdata in stays:
            return tensor
        return tensor.shape, tensor.dtype

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return torch.empty(saved[0], dtype=saved[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
