"""Adapters that do not start at nothing: LoftQ's correction, and parts of the base's weights."""

import json
from pathlib import Path
from typing import Any

from luthier.errors import UserError

_PREFIX = "base_model.model."
_ITERATIONS, _MORE = 4, 8
"""Power iterations and extra columns of the randomized decomposition."""


def make_up(model: Any, original: Any, seed: int) -> None:
    """Start each LoRA pair at the best correction of its 4-bit layer's error.

    `original` is the model before quantization, by the same names. One round of LoftQ (Li et al.,
    https://arxiv.org/abs/2310.08659), with the scale of the adapter taken out. Raises UserError
    where a layer is missing in `original`.
    """
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    weights = dict(original.named_parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda(model)):
        torch.manual_seed(seed)
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                key = f"{name.removeprefix(_PREFIX)}.weight"
                if key not in weights:
                    raise UserError(
                        f"lora.init_lora_weights=loftq: the model before quantization has no {key}."
                    )
                _correct(layer, weights[key].data)


def remember(model: Any) -> None:
    """Keep the adapter as it starts, for `make_plain`: peft has taken it out of the base."""
    from peft import get_peft_model_state_dict

    start = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.start_of_adapter = {
        name: weight.detach().float().cpu().clone()
        for name, weight in start.items()
        if _is_pair(name)
    }


def make_plain(model: Any, folder: Path) -> None:
    """Turn a saved adapter that started as a part of the base into one for the base as it was.

    What was taken out of the base at the start (A0, B0) goes into the adapter with its sign
    turned: twice the rank, no scale, and it fits wherever LoRA does. Other adapters stay as they
    are.
    """
    from safetensors.torch import load_file, save_file

    start = vars(model).get("start_of_adapter")
    if start is None:
        return
    weights = load_file(folder / "adapter_model.safetensors")
    scales = {f"{name}.": layer.scaling["default"] for name, layer in _layers(model)}
    for name, first in start.items():
        layer = name.partition("lora_")[0]
        weights[name] = _joined(name, weights[name], first, scales[layer])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_config(folder / "adapter_config.json")


def _correct(layer: Any, wanted: Any) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    packed, rank = layer.base_layer.weight, layer.r["default"]
    got = dequantize_4bit(packed.data, packed.quant_state).float()
    error = wanted.to(got.device).float() - got
    columns = min(rank + _MORE, *error.shape)
    left, size, right = torch.svd_lowrank(error, q=columns, niter=_ITERATIONS)
    root = size[:rank].sqrt()
    layer.lora_A["default"].weight.data = (right[:, :rank] * root).T.contiguous()
    layer.lora_B["default"].weight.data = left[:, :rank] * root / layer.scaling["default"]


def _cuda(model: Any) -> set[int]:
    return {p.device.index for p in model.parameters() if p.device.type == "cuda"}


def _layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def _is_pair(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _joined(name: str, weight: Any, first: Any, scale: float) -> Any:
    import torch

    if ".lora_A." in name:
        return torch.cat([weight, first.to(weight.dtype)], dim=0)
    return torch.cat([weight, -first.to(weight.dtype)], dim=1) * scale


def _write_config(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    ranks = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config |= {
        "init_lora_weights": True,
        "use_rslora": False,
        "r": 2 * config["r"],
        "lora_alpha": 2 * config["r"],
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
