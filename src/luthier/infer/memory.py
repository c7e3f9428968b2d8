"""How many prompts are answered side by side: as many as the free memory holds."""

from typing import Any

_MOST = {"cuda": 256, "mps": 64, "cpu": 64}
"""Prompts beyond which a larger batch is hardly faster, by kind of device."""
_SHARE = 0.6
"""Of the free memory, what a batch may take: what is left is for torch's own needs."""
_WIDTHS = 24
"""Numbers of the hidden size that a layer holds for each token of a prompt while it is read."""


def batch_size(model: Any, longest: int, max_new_tokens: int) -> int:
    """The largest batch of prompts of `longest` tokens that should fit into the free memory.

    An estimate: keys and values of prompt and reply, the activations of one layer while the prompt
    is read, and the scores of one token over the vocabulary in float32 and twice more for sorting.
    """
    free, kind = free_memory(model)
    return max(1, min(_MOST[kind], int(_SHARE * free) // row_bytes(model, longest, max_new_tokens)))


def row_bytes(model: Any, longest: int, max_new_tokens: int) -> int:
    """The bytes that one prompt and its reply take, beside the model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    number = model.get_input_embeddings().weight.element_size()
    cached = 2 * config.num_hidden_layers * kv_heads * head * number
    reading = _WIDTHS * config.hidden_size * number
    scores = 3 * 4 * model.get_input_embeddings().weight.shape[0]
    return int(cached * (longest + max_new_tokens) + reading * longest + scores)


def free_memory(model: Any) -> tuple[int, str]:
    """The free bytes where the model computes (of several GPUs the fullest), and its kind."""
    import torch

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
    """What the device has left, and what torch holds there without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)


def release() -> None:
    """Give back the memory of what nobody holds any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
