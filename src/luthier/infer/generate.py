"""Answer prompts in batches: token ids in, reply ids out, in the same order."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from luthier.errors import UserError
from luthier.infer.dequantize import dequantized_layers
from luthier.infer.generation_config import (
    depends_on_prompt,
    make_generation_config,
    needs_single_rows,
)

# The size of a batch is estimated from the free memory; an estimate that is too high costs one
# failed batch, because `generate_in_batches` halves it.

_MOST = {"cuda": 256, "mps": 64, "cpu": 64}
"""Prompts beyond which a larger batch is hardly faster, by kind of device."""
_SHARE = 0.6
"""Of the free memory, what a batch may take: what is left is for torch's own needs."""
_WIDTHS = 24
"""Numbers of the hidden size that a layer holds for each token of a prompt while it is read."""


def choose_batch_size(model: Any, longest: int, max_new_tokens: int) -> int:
    """Return the largest batch of prompts of `longest` tokens that should fit into free memory.

    It is an estimate: keys and values of prompt and reply, the activations of one layer while the
    prompt is read, and the scores of one token over the vocabulary in float32 and twice more for
    sorting.
    """
    free, device_type = free_memory(model)
    return max(
        1,
        min(
            _MOST[device_type], int(_SHARE * free) // bytes_per_row(model, longest, max_new_tokens)
        ),
    )


def bytes_per_row(model: Any, longest: int, max_new_tokens: int) -> int:
    """Return the bytes that one prompt and its reply take, beside the model."""
    config = model.config.get_text_config()
    number = model.get_input_embeddings().weight.element_size()
    cached = _cached_numbers(config) * number
    reading = _WIDTHS * config.hidden_size * number
    # Float32 scores, and sorting for top-k and top-p makes two more of their size.
    scores = 3 * 4 * model.get_input_embeddings().weight.shape[0]
    return int(cached * (longest + max_new_tokens) + reading * longest + scores)


def _cached_numbers(config: Any) -> int:
    """Return how many numbers the cache of a model keeps for each token: keys and values."""
    # Gemma 4's layers differ in the width of their heads; transformers 5.23 raises for the model's.
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    return 2 * sum(map(_head_numbers, layers))


def _head_numbers(layer: Any) -> int:
    """Return the width of a layer's keys; 0 for models without attention, such as Mamba."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    # With grouped-query attention the cache holds fewer heads than the queries have.
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    # Some models (Gemma, Qwen3) have heads that are not hidden_size / heads wide.
    return int(kv_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads))


def free_memory(model: Any) -> tuple[int, str]:
    """Return the free bytes where the model computes (of the fullest GPU), and the device type."""
    import torch

    # Parameters on `meta` are those that accelerate holds on disk or in CPU memory.
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        return min(map(_free_on_gpu, gpus)), "cuda"
    if any(device.type == "mps" for device in devices):
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return int(free), "mps"
    import psutil

    return int(psutil.virtual_memory().available), "cpu"


def _free_on_gpu(device: Any) -> int:
    """Return what the device has left, and what torch holds there without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # torch keeps freed memory for itself, which the driver counts as used.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)


def release_memory() -> None:
    """Give back the memory of what nobody holds any more."""
    import gc

    import torch

    # Cycles such as an error's traceback hold tensors until the collector runs.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


ImagePromptInputs = Callable[[Sequence[int], Any], dict[str, Any]]
"""Takes the numbers of some prompts and their ids of shape (prompts, longest); returns what the
model takes besides for their images: pixels and types of tokens."""


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
    image_inputs: ImagePromptInputs | None = None,
) -> list[list[int]]:
    """Answer each prompt greedily and return the new ids, without the stop token.

    Prompts are padded to the longest of their batch, on the side away from the reply, and sorted
    by length, so that little is computed on padding. `on_batch` is told how many prompts each batch
    answered. `image_inputs` makes what belongs to the images of prompts.
    """
    import torch

    config = make_generation_config({"max_new_tokens": max_new_tokens}, list(stop_ids), pad_id)
    replies: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        # Not inference mode: what a module caches here must still serve a later training step.
        with torch.no_grad(), dequantized_layers(model), patched_output_layer(model):
            batches = generate_in_batches(
                model, prompts, config, batch_size, image_inputs=image_inputs
            )
            for rows, answers in batches:
                for row, ids in zip(rows, answers, strict=True):
                    replies[row] = until_stop(ids, stop_ids)
                if on_batch:
                    on_batch(len(rows))
    finally:
        model.train(was_training)
    return replies


def generate_in_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: Any,
    batch_size: int,
    context: int | None = None,
    image_inputs: ImagePromptInputs | None = None,
    **more: Any,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield the numbers of a batch of prompts with the ids that follow each, the longest first.

    `config`: a `GenerationConfig`; with `num_return_sequences` each number comes as often. A reply
    is cut where prompt and reply fill `context` tokens. Where the memory runs out, the batch is
    halved, and stays so. `image_inputs` makes what belongs to the images of prompts, and `more`
    goes to `model.generate`. Raises UserError where not even one prompt fits.
    """
    import torch

    equal = depends_on_prompt(config, model.generation_config)
    size = 1 if needs_single_rows(config) else batch_size
    # The longest first: where the memory is too small, the first batch says so and not the last.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    samples = config.num_return_sequences or 1
    if image_inputs is not None and samples > 1:
        # transformers 5.23 repeats pixels image by image, and not prompt by prompt.
        order = [number for number in order for _ in range(samples)]
        config = copy.copy(config)
        config.num_return_sequences = 1
    while order:
        rows = _batch([len(prompts[i]) for i in order], size, config, context, equal)
        batch = [prompts[i] for i in order[:rows]]
        try:
            inputs = _pad_prompts(model, batch, config.pad_token_id)
            if image_inputs is not None:
                inputs |= image_inputs(order[:rows], inputs["input_ids"])
            replies = _answer(model, inputs, _within(config, len(batch[0]), context), more)
        # A full CPU memory is a plain RuntimeError, which only its text tells from others.
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = _half(rows, len(batch[0]))
        else:
            yield [i for i in order[:rows] for _ in range(len(replies) // rows)], replies
            order = order[rows:]
            continue
        # Outside of the handler: until that ends, the error's traceback keeps the batch alive.
        release_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or the machine's, is full."""
    import torch

    text = str(error).lower()
    mentions_memory = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, torch.OutOfMemoryError) or mentions_memory


@contextmanager
def patched_output_layer(model: Any) -> Iterator[None]:
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


def _batch(lengths: list[int], size: int, config: Any, context: int | None, equal: bool) -> int:
    """Return how many of the first prompts go together.

    These are those that may write equally much before the context is full, and where the settings
    look at the prompt (`equal`), those of one length: padding must not change a reply.
    """

    def kind(length: int) -> tuple[int, int]:
        return (length if equal else 0, _room(config.max_new_tokens, length, context))

    rows = 1
    while rows < min(size, len(lengths)) and kind(lengths[rows]) == kind(lengths[0]):
        rows += 1
    return rows


def _room(new_tokens: int, length: int, context: int | None) -> int:
    return new_tokens if context is None else min(new_tokens, context - length)


def _within(config: Any, length: int, context: int | None) -> Any:
    """Return the config for prompts of this length, whose replies must end with the context."""
    room = _room(config.max_new_tokens, length, context)
    if room == config.max_new_tokens:
        return config
    # A copy, because the config serves the other batches too.
    shorter = copy.copy(config)
    shorter.max_new_tokens = room
    return shorter


def _half(rows: int, length: int) -> int:
    if rows == 1:
        raise UserError(
            f"A prompt of {length} tokens and its reply do not fit into the memory by themselves.\n"
            "Use a smaller max_new_tokens, a smaller number format (bfloat16), or the model in 4 "
            "bits (nf4)."
        )
    return rows // 2


def _pad_prompts(model: Any, prompts: list[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """Return the padded ids of prompts and their mask, each of shape (prompts, longest)."""
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    # An encoder counts positions from the left; a decoder goes on at the right.
    is_encoded = model.config.is_encoder_decoder
    for row, prompt in enumerate(prompts):
        start = 0 if is_encoded else width - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(list(prompt))
        mask[row, start : start + len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _answer(
    model: Any, inputs: dict[str, Any], config: Any, more: dict[str, Any]
) -> list[list[int]]:
    """Return the ids behind each prompt, with the padding behind shorter replies."""
    is_encoded = model.config.is_encoder_decoder
    width = inputs["input_ids"].shape[1]
    out = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        generation_config=config,
        # Split weights are whole by now (luthier.train.evaluation), so ranks need not keep in step.
        synced_gpus=False,
        **more,
    )
    # A decoder of its own begins with its start token, which may also be the stop token (BART).
    replies: list[list[int]] = out[:, 1 if is_encoded else width :].tolist()
    return replies


def until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first stop token."""
    stops = set(stop_ids)
    return ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))]
