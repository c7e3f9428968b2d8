"""What of a model may train: adapters, quantized weights and frozen parts against each other."""

import re
from collections.abc import Iterator
from typing import Any

from luthier.config import adapters
from luthier.config.passthrough import settings
from luthier.errors import Mistake, value

_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}


def check_trained_parts(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What contradicts itself in the groups `quantization` and `lora`, and in the model's parts."""
    yield from _quantization(resolved)
    yield from _adapter(resolved)
    yield from _patterns(resolved)


def _quantization(resolved: dict[str, Any]) -> Iterator[Mistake]:
    given, lora = settings(resolved, "quantization"), settings(resolved, "lora")
    bits = [name for name in _BITS if given.get(name) is True]
    if len(bits) > 1:
        yield Mistake(
            "quantization", "load_in_4bit and load_in_8bit are both true. Keep one, set one false."
        )
    if given.get("dequantize") is True:
        if others := [name for name in given if name != "dequantize"]:
            text = f"whole weights take no {others[0]}. Keep one of the two."
            yield Mistake("quantization.dequantize", text)
    elif given and not bits:
        yield Mistake(
            "quantization",
            "neither load_in_4bit nor load_in_8bit is true. Choose quantization=nf4, int8 or none.",
        )
    if bits and not lora:
        yield Mistake(
            "quantization",
            f"{bits[0]} with full fine-tuning: quantized weights cannot be trained. "
            "Add lora=default (QLoRA), or quantization=none to train the weights themselves.",
        )


def _adapter(resolved: dict[str, Any]) -> Iterator[Mistake]:
    lora, given = settings(resolved, "lora"), settings(resolved, "quantization")
    if not lora:
        return
    bits = [width for name, width in _BITS.items() if given.get(name) is True]
    yield from adapters.problems(lora, bits[0] if len(bits) == 1 else None)
    ratio = lora.get("plus_ratio")
    if isinstance(ratio, int | float) and ratio <= 0:
        yield Mistake("lora.plus_ratio", f"{value(ratio)} is too small; 16 is usual.")
    # OFT's rank may be 0: then the size of its blocks is given.
    ranks = ("lora_alpha",) if adapters.method_of(lora) == "oft" else ("r", "lora_alpha")
    for name in ranks:
        number = lora.get(name)
        if isinstance(number, int | float) and number < 1:
            yield Mistake(f"lora.{name}", f"{value(number)} is too small; the least is 1.")
    dropout = lora.get("lora_dropout")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        yield Mistake("lora.lora_dropout", f"{value(dropout)} must be at least 0 and less than 1.")


def _patterns(resolved: dict[str, Any]) -> Iterator[Mistake]:
    model, lora = settings(resolved, "model"), settings(resolved, "lora")
    for name in ("train", "freeze"):
        given = model.get(name)
        patterns = given if isinstance(given, list) else []
        if patterns and lora:
            text = "is for full fine-tuning (lora=none); beside an adapter all weights are frozen. "
            yield Mistake(f"model.{name}", f"{text}Whole layers train with lora.modules_to_save.")
        for pattern in patterns:
            try:
                re.compile(str(pattern))
            except re.error as error:
                text = f"{value(pattern)} is not a regular expression: {error}."
                yield Mistake(f"model.{name}", text)
