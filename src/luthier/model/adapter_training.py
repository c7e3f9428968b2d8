"""What some adapters ask of a trainer: LoRA+'s two learning rates, AdaLoRA's ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from luthier.config.methods import method_of
from luthier.model.adapter_ranks import RankAllocation


def attach(trainer: Any, lora: dict[str, Any]) -> None:
    """Give a `transformers.Trainer` what the configured adapter needs; call it before training."""
    ratio = lora.get("plus_ratio")
    if ratio is not None:
        trainer.create_optimizer = partial(_create, trainer, trainer.create_optimizer, ratio)
    if lora and method_of(lora) == "adalora":
        trainer.add_callback(RankAllocation())


def plus_groups(groups: Sequence[dict[str, Any]], model: Any, ratio: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups with LoRA's B matrices apart, at `ratio` times the rate.

    LoRA+ (Hayou et al., https://arxiv.org/abs/2402.12354). Each group keeps its weight decay and
    whatever else it has; those at the old rate come first.
    """
    faster = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    slow, fast = [], []
    for group in groups:
        parts: tuple[list[Any], list[Any]] = ([], [])
        for parameter in group["params"]:
            parts[id(parameter) in faster].append(parameter)
        slow.append(group | {"params": parts[0]})
        fast.append(group | {"params": parts[1], "lr": group["lr"] * ratio})
    return [group for group in slow + fast if group["params"]]


def _create(trainer: Any, create: Callable[..., Any], ratio: float, model: Any = None) -> Any:
    """Create the optimizer as the trainer does, then take its groups apart."""
    if trainer.optimizer is not None:
        return create(model)
    optimizer = create(model)
    whole = trainer.model if model is None else model
    optimizer.param_groups[:] = plus_groups(optimizer.param_groups, whole, ratio)
    return optimizer
