"""The names in an adapter's settings: each must match something, where peft would pass over it."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luthier.errors import UserError

ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.(\d+)\.")


def check_adapter_names(model: Any, settings: dict[str, Any], task_type: str) -> None:
    """Raise UserError for a layer, a pattern or a number in `settings` that matches nothing.

    `settings` are fields of one of peft's configs, `task_type` is the model's task as peft calls
    it. Raises UserError, too, for an adapter on the output layer of a causal language model, which
    the losses read past.
    """
    targets = settings.get("target_modules")
    chosen = find_target_layers(model, targets) if targets else []
    _check_excluded(model, settings.get("exclude_modules"))
    _check_numbers(settings.get("layers_to_transform"), chosen)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(key, settings.get(key) or {}, chosen)
    _check_whole(model, settings.get("modules_to_save") or ())
    if task_type == "CAUSAL_LM" and targets != ALL_LINEAR:
        _refuse_output(model, chosen)


def find_target_layers(model: Any, targets: str | list[str]) -> list[str]:
    """Return the names of the layers that get an adapter; UserError for a target without any."""
    if targets == ALL_LINEAR:
        output = model.get_output_embeddings()
        return [name for name, layer in _linear(model) if layer is not output]
    names = [name for name, _ in model.named_modules()]
    is_pattern = isinstance(targets, str)
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(_matches(name, target, is_pattern) for name in names):
            raise UserError(_no_such_layer(model, targets, target))
    wanted = [targets] if isinstance(targets, str) else targets
    return [name for name in names if any(_matches(name, one, is_pattern) for one in wanted)]


def linear_layer_suffixes(model: Any) -> list[str]:
    """The last parts of the names of the linear layers that `all-linear` means."""
    return sorted({name.rpartition(".")[2] for name in find_target_layers(model, ALL_LINEAR)})


def layer_name(model: Any, layer: Any) -> str:
    """The name of a layer within a model."""
    return next(name for name, module in model.named_modules() if module is layer)


def _matches(name: str, target: str, is_pattern: bool) -> bool:
    """Match as peft does: one string is a regular expression, a list holds names' endings."""
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _no_such_layer(model: Any, targets: str | list[str], target: str) -> str:
    names = sorted({name.rpartition(".")[2] for name, _ in _linear(model)})
    near = difflib.get_close_matches(target, names, n=1)
    if isinstance(targets, str):
        text = f"lora.target_modules={target}: as a pattern for whole names this matches no layer."
        hint = f"\nFor layers by their last name write a list: [{near[0]}]." if near else ""
    else:
        text = f"lora.target_modules: no layer is named {target}."
        hint = f" Did you mean {near[0]}?" if near else ""
    return f"{text}{hint}\nThe model's linear layers: {', '.join(names)}; or take {ALL_LINEAR}."


def _check_excluded(model: Any, excluded: str | list[str] | None) -> None:
    names = [name for name, _ in model.named_modules()]
    for one in [excluded] if isinstance(excluded, str) else excluded or ():
        if not any(_matches(name, one, isinstance(excluded, str)) for name in names):
            raise UserError(_unknown("lora.exclude_modules", one, names))


def _check_whole(model: Any, whole: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for one in whole:
        if not any(name.endswith(one) for name in names):
            raise UserError(_unknown("lora.modules_to_save", one, names))


def _check_numbers(wanted: int | list[int] | None, chosen: Sequence[str]) -> None:
    """Raise UserError for the number of a layer that the model does not have."""
    numbers = {int(found) for name in chosen for found in _LAYER.findall(name)}
    for number in [wanted] if isinstance(wanted, int) else wanted or ():
        if number not in numbers:
            raise UserError(
                f"lora.layers_to_transform: there is no layer {number} with such modules; layers "
                f"are counted from {min(numbers, default=0)} to {max(numbers, default=0)}."
            )


def _check_patterns(key: str, patterns: Mapping[str, Any], chosen: Sequence[str]) -> None:
    """Match as peft does, which takes the default where a pattern matches nothing."""
    for pattern in patterns:
        try:
            hits = any(re.match(rf"(.*\.)?({pattern})$", name) for name in chosen)
        except re.error as error:
            text = f"lora.{key}: {pattern!r} is not a regular expression: {error}."
            raise UserError(text) from error
        if not hits:
            raise UserError(_unknown(f"lora.{key}", pattern, chosen))


def _refuse_output(model: Any, chosen: Sequence[str]) -> None:
    """Stop where an adapter would never train: losses multiply with the output's own weight."""
    output = model.get_output_embeddings()
    if output is not None and (name := layer_name(model, output)) in chosen:
        raise UserError(
            f"lora.target_modules: {name} is the output layer, and the losses are computed with "
            f"its weight alone, so an adapter on it would never train.\nTrain it whole: "
            f"lora.modules_to_save=[{name}]."
        )


def _unknown(key: str, wanted: str, names: Iterable[str]) -> str:
    known = sorted({part for name in names for part in (name, name.rpartition(".")[2]) if part})
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key}: nothing in the model is named {wanted}.{hint}"


def _linear(model: Any) -> list[tuple[str, Any]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
