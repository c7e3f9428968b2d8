"""Weights that are split over ranks, whole on each of them while replies are generated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gathered(trainer: Any) -> Iterator[Any]:
    """The trainer's model with all its weights on every rank within the block.

    Under ZeRO-3 and FSDP2 they are gathered once, at its start, and not once a token. All ranks
    enter it together; within it each may generate as much as it likes. A rank needs memory for the
    whole weights. Elsewhere the model is as it was.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3:
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model:
            yield model
        return
    model = accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        with unsharded(model, accelerator.state.fsdp_plugin.reshard_after_forward):
            yield model
        return
    yield model


@contextmanager
def unsharded(model: Any, reshards: bool) -> Iterator[None]:
    """Keep what the first forward of an FSDP2 model gathers until the end of the block.

    `reshards`: what its `fully_shard` was told as `reshard_after_forward`.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    was_training = model.training
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            # One token: a rank without a question takes part in the gathering, too.
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            decoder = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
            model.eval()(input_ids=token, **decoder)
        yield
    finally:
        model.train(was_training)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshards, recurse=False)
