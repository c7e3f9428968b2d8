"""How a model's weights are packed while it answers."""

from collections.abc import Mapping
from typing import Any, Literal

from luthier.errors import UserError

Packing = Literal["trained", "none", "nf4", "int8"] | Mapping[str, Any]
"""How weights are packed: as the run had them, not at all, in 4 or 8 bits, or as
`BitsAndBytesConfig` has it."""

_PACKED: dict[str, dict[str, Any] | None] = {
    "trained": None,
    "none": {},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def packing_of(given: Packing) -> dict[str, Any] | None:
    """Fields of `BitsAndBytesConfig`; None for the run's own. UserError for an unknown name."""
    if isinstance(given, Mapping):
        return dict(given)
    if given not in _PACKED:
        raise UserError(f"quantization={given}: there are {', '.join(_PACKED)}.")
    return _PACKED[given]
