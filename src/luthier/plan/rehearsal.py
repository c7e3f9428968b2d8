"""A training step with tensors that have shapes and no content: what would be kept, and when."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.errors import UserError
from luthier.gc_pause import no_collection
from luthier.plan import kernels, weights
from luthier.plan.ledger import GRADIENTS, WEIGHTS, Ledger, Peak
from luthier.plan.weights import Weight
from luthier.plan.workload import Workload

INPUTS, ACTIVATIONS, LOGITS, BACKWARD = "inputs", "activations", "logits", "backward"
"""Phases of a step, which name the tensors that are made in them."""
_SMALLEST_OFFLOADED = 1024
OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks of TRL's fused output layer."""


@dataclass(frozen=True)
class Rehearsal:
    """What one micro-batch takes, besides the weights."""

    weights: tuple[Weight, ...]
    held: int
    """Bytes of weights, scales and buffers, in the allocator's blocks."""
    peaks: dict[float, Peak]
    """The highest moment, for each share of the gradients that stays on a process."""


def rehearse(
    model: Any, workload: Workload, kind: str, shares: Iterable[float] = (1.0,)
) -> Rehearsal:
    """Run forward and backward of one micro-batch on a model of shapes (`skeleton.build`).

    `kind` is the device that it would run on: cuda, cpu or mps. The model cannot be used again.
    Raises UserError for a model whose step depends on values and not on shapes alone.
    """
    try:
        with ExitStack() as stack:
            # Checkpoints put the generator back to where it was before a layer.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(no_collection())
            stack.enter_context(kernels.of(kind, workload.flash))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            weights.fill(model)
            return _run(model, workload, kind, shares)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"plan: a step of {type(model).__name__} cannot be tried without its weights: "
            f"{str(error).splitlines()[0]}\nIts memory can only be measured in a run."
        ) from error


def _run(model: Any, workload: Workload, kind: str, shares: Iterable[float]) -> Rehearsal:
    found = weights.listed(model)
    ledger = Ledger(kernels.BLOCKS[kind], shares, kernels.scratch(kind))
    ledger.add(weights.tensors(model), WEIGHTS)
    held = ledger.bytes(WEIGHTS)
    _prepare(model, workload)
    with ledger:
        _watch_gradients(model, ledger, kept=workload.accumulation > 1)
        _step(model, workload, ledger)
    return Rehearsal(found, held, dict(ledger.peaks))


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


def _watch_gradients(model: Any, ledger: Ledger, kept: bool) -> None:
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


def _step(model: Any, workload: Workload, ledger: Ledger) -> None:
    """Forward and loss as luthier's trainers have them, and backward."""
    ledger.phase = INPUTS
    batch = _batch(model, workload)
    ledger.phase = ACTIVATIONS
    with _head_phase(ledger):
        loss = _loss(model, batch, workload, ledger)
        loss.backward()


def _loss(
    model: Any, batch: dict[str, torch.Tensor], workload: Workload, ledger: Ledger
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
def _head_phase(ledger: Ledger) -> Iterator[None]:
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
    stays = {tensor.untyped_storage()._cdata for tensor in weights.tensors(model)}

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
