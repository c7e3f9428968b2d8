"""LoRA adapters in float32 on any base, drawn from a seed."""

import difflib
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"

DEFAULTS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}
"""What a LoRA config gets where it does not say otherwise."""


def add_adapter(model: "PreTrainedModel", lora: dict[str, Any], seed: int) -> "PeftModel":
    """Freeze `model` and wrap it with a fresh adapter: the same seed, the same weights.

    `lora` holds fields of `peft.LoraConfig`. Trained weights are float32; frozen ones keep their
    number formats. Gradients also reach the embeddings' output: gradient checkpointing needs it.
    Raises UserError for settings that peft refuses, and for a name that matches no layer.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    settings = DEFAULTS | {name: value for name, value in lora.items() if value is not None}
    _check_targets(model, settings["target_modules"])
    base: Any = model
    base.requires_grad_(False)
    try:
        # peft draws on the CPU, so the CPU's generator is the only one to put back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"lora: {error}") from error
    for parameter in _trained(wrapped):
        parameter.data = parameter.data.float()
    _let_copies_fit(wrapped)
    base.enable_input_require_grads()
    return wrapped


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _let_copies_fit(model: Any) -> None:
    """Let trained float32 copies of whole layers (`modules_to_save`) stand in a base of 16 bits.

    Under autocast they would fit by themselves, but replies are generated without it.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            outside = next(wrapper.original_module.parameters()).dtype
            for layer in wrapper.modules_to_save.values():
                layer.register_forward_pre_hook(_to_float32)
                layer.register_forward_hook(partial(_to_dtype, outside))


def _to_float32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _to_dtype(dtype: Any, _layer: Any, _inputs: Any, output: Any) -> Any:
    return output.to(dtype)


def _check_targets(model: Any, targets: str | list[str]) -> None:
    """Raise UserError for a target that matches no layer: peft leaves one of several out."""
    if targets == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules()]
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(_matches(name, target, isinstance(targets, str)) for name in names):
            raise UserError(_no_such_layer(model, targets, target))


def _matches(name: str, target: str, is_pattern: bool) -> bool:
    """Match as peft does: one string is a regular expression, a list holds names' endings."""
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _no_such_layer(model: Any, targets: str | list[str], target: str) -> str:
    names = sorted({name.rpartition(".")[2] for name in _linear_names(model)})
    near = difflib.get_close_matches(target, names, n=1)
    if isinstance(targets, str):
        text = f"lora.target_modules={target}: as a pattern for whole names this matches no layer."
        hint = f"\nFor layers by their last name write a list: [{near[0]}]." if near else ""
    else:
        text = f"lora.target_modules: no layer is named {target}."
        hint = f" Did you mean {near[0]}?" if near else ""
    return f"{text}{hint}\nThe model's linear layers: {', '.join(names)}; or take {ALL_LINEAR}."


def _linear_names(model: Any) -> list[str]:
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
