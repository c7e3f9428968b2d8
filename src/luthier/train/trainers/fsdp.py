"""What accelerate 1.15 gets wrong of a training under FSDP2, set right before it shards a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from luthier.errors import UserError


def set_number_formats(plugin: Any) -> None:
    """Let mixed precision round the weights that are gathered, and nothing that comes out of them.

    `plugin` is accelerate's for FSDP2, which would also round what the model returns, so each log
    probability to bfloat16: a loss of 5.690 is logged as 5.697, and the differences that DPO trains
    on vanish. It would add the gradients of all ranks in bfloat16, too; they are added in float32
    here, as one process does that accumulates them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )


@contextmanager
def gather_head_with_norm() -> Iterator[None]:
    """Have accelerate gather the output layer together with the norm before it, in the block.

    The losses read the weight of the output layer and never call it, so only another module of its
    group can have it gathered. accelerate looks for a norm among the children of the outermost
    model: it finds none where the text model lies deeper (a model of images, an adapter), and
    each rank would then train its slice of the layer on its own rows alone.
    """
    from accelerate.utils import fsdp_utils

    private: Any = fsdp_utils
    original = private._find_final_norm
    private._find_final_norm = _find_final_norm
    try:
        yield
    finally:
        private._find_final_norm = original


@contextmanager
def share_buffers(model: Any, device: torch.device) -> Iterator[None]:
    """Give all ranks the first one's buffers, and keep them out of accelerate's way in the block.

    Where the first rank alone reads the weights (`fsdp_cpu_ram_efficient_loading`), accelerate
    hands out all entries of the state dict as slices, and fails at buffers among them, such as the
    balance of DeepSeek-V3's router or VeRA's matrices. Those that are in no state dict it keeps as
    each rank has them, which is right for what is computed and not for what is read.
    """
    import torch.distributed as dist

    saved = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            content = buffer.detach().to(device).contiguous()
            dist.broadcast(content, src=0)
            buffer.copy_(content)
            module._non_persistent_buffers_set.add(name)
            saved.append((module, name))
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)


def _find_final_norm(model: Any) -> torch.nn.Module | None:
    """Return the last norm beside the layers of a model's text part; None where there is none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = base.get_input_embeddings()
    for parent in base.modules():
        children = list(parent.children())
        if any(child is embedding for child in children):
            norms = [child for child in children if "Norm" in type(child).__name__]
            return norms[-1] if norms else None
    return None


def check_head_is_gathered(model: Any) -> None:
    """Raise UserError where an output layer that trains would not be gathered for the loss.

    `model` is sharded already, and no step was taken.
    """
    from torch.distributed.fsdp import FSDPModule

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, FSDPModule) or not any(p.requires_grad for p in head.parameters()):
        return
    state: Any = head
    if state._get_fsdp_state()._modules == (head,):
        raise UserError(
            f"FSDP2: the output layer of {type(model).__name__} cannot be trained in slices: no "
            "norm was found with which it is gathered for the loss.\nTrain an adapter that leaves "
            "it as it is, or use luthier launch --config ddp."
        )
