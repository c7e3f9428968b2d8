"""Heads of new tasks beside an adapter: they train whole and are saved with it."""

from collections.abc import Mapping
from typing import Any

HEADED = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose models have a head of their own, as peft calls them."""
HEADS = ("classifier", "score")
"""What peft takes for the head of such a model."""


def trained_whole(model: Any, settings: Mapping[str, Any], config: str) -> dict[str, Any]:
    """The fields of a config of peft's by which a head trains whole, is saved, and gets no adapter.

    That is peft's own head, and each layer that the checkpoint has no weights for (the model's
    `new_layers`, from `luthier.model.weights.load_model`): a pooler or a head of another name would
    stay random and be lost with the run.
    """
    if settings["task_type"] not in HEADED:
        return {}
    import peft

    asked = settings.get("modules_to_save") or ()
    whole = {*vars(model).get("new_layers", ()), *HEADS, *asked}
    names = [name for name, _ in model.named_modules() if _is_in(name, whole)]
    found = {one for one in whole if any(f".{name}".endswith(f".{one}") for name in names)}
    given: dict[str, Any] = {"modules_to_save": sorted({*found, *asked})}
    excluded = settings.get("exclude_modules") or []
    if not isinstance(excluded, str):
        given["exclude_modules"] = sorted({*excluded, *names})
    known = getattr(peft, config).__dataclass_fields__
    return {name: value for name, value in given.items() if name in known}


def _is_in(name: str, layers: set[str]) -> bool:
    """Whether a layer is one of these, or within one."""
    return any(f".{layer}." in f".{name}." for layer in layers)
