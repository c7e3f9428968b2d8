"""Batched greedy replies: prompts of token ids in, reply ids out, order kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from luthier.infer.unpacked import unpacked


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answer each prompt greedily and return the new ids, without the stop token.

    Prompts are padded to the longest of their batch, on the side away from the reply, and sorted
    by length, so that little is computed on padding. `on_batch` is told how many prompts each batch
    answered.
    """
    import torch

    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    was_training = model.training
    model.eval()
    try:
        # Not inference mode: what a module caches here must still serve a later training step.
        with torch.no_grad(), unpacked(model), dense_head(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                new = _answer(model, [prompts[i] for i in rows], stop_ids, pad_id, max_new_tokens)
                for row, ids in zip(rows, new, strict=True):
                    replies[row] = ids
                if on_batch:
                    on_batch(len(rows))
    finally:
        model.train(was_training)
    return replies


@contextmanager
def dense_head(model: Any) -> Iterator[None]:
    """Give the output layer dense inputs within the block.

    Of the prompt only the last position goes through it, as a view with gaps, and for that torch's
    matmul on a CPU copies the layer's weights once per row: 2.8 GB for 50 rows of a 135M model.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _answer(
    model: Any,
    prompts: list[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    # An encoder counts positions from the left; a decoder goes on at the right.
    is_encoded = model.config.is_encoder_decoder
    for row, prompt in enumerate(prompts):
        start = 0 if is_encoded else width - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(list(prompt))
        mask[row, start : start + len(prompt)] = 1
    # A config of our own: the model's would bring sampling settings that greedy decoding warns of.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=greedy,
        # Split weights are whole by now (luthier.train.gathered), so ranks need not keep in step.
        synced_gpus=False,
    )
    # A decoder of its own begins with its start token, which may also be the stop token (BART).
    replies = out[:, 1 if is_encoded else width :]
    return [until_stop(row, stop_ids) for row in replies.tolist()]


def until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    stops = set(stop_ids)
    return ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))]
