"""How many tokens a model reads at most, from its config.json, before anything is loaded."""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.quantized import read_config_json

_NAMES = ("max_position_embeddings", "n_positions")
"""The names of the bound. Models with ALiBi and recurrent ones have none, and need none."""
_SCALED = ("linear", "dynamic", "yarn", "longrope", "su", "llama3")
"""Kinds of rope scaling (`rope_type`) whose factor makes the context longer."""
_OTHER_BOUNDS = ("classify", "tag", "seq2seq")
"""Methods whose models count otherwise, or whose heads check the rows themselves."""


def check_max_length(config: RunConfig) -> None:
    """Raise UserError where `chat.max_length` is more than the model has positions."""
    length, positions = config.chat.max_length, _run_positions(config)
    if length is None or positions is None or length <= positions:
        return
    raise UserError(
        f"chat.max_length={length}: {config.model.path} has {positions:,} positions, and nothing "
        f"in it was trained for tokens beyond them. Set chat.max_length={positions} or less. If "
        "the model reads more than its config.json says, name that too: "
        f"model.kwargs.max_position_embeddings={length}"
    )


def bounded_length(config: RunConfig) -> int | None:
    """Return the longest sequence of a run: `chat.max_length`, or else the model's positions."""
    length = config.chat.max_length
    return _run_positions(config) if length is None else length


def read_max_positions(model: ModelConfig) -> int | None:
    """Return the positions that a model's files name, those of `model.kwargs` before others.

    None where none are named, and where the files cannot be had: what loads the model says so.
    """
    try:
        content = _read_config(model)
    except (OSError, ValueError, UserError):
        return None
    return find_positions({**content, **model.kwargs})


def find_positions(content: Mapping[str, Any]) -> int | None:
    """Return the positions that the content of a config.json allows, with rope scaling.

    The factor counts on the original positions where these are named (YaRN's and Llama 3's
    configs hold the longer ones already), else on those of the config.
    """
    bound = next((content[name] for name in _NAMES if _is_count(content.get(name))), None)
    if bound is None:
        return None
    longest = int(bound)
    for scaling in _rope_scalings(content):
        factor = scaling.get("factor")
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in _SCALED and isinstance(factor, int | float) and factor > 1:
            original = scaling.get("original_max_position_embeddings")
            base = original if isinstance(original, int) and original > 0 else int(bound)
            longest = max(longest, int(base * factor))
    return longest


def _run_positions(config: RunConfig) -> int | None:
    is_other = config.trainer.base_method in _OTHER_BOUNDS
    return None if is_other else read_max_positions(config.model)


def _read_config(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of a model's config.json; OSError or ValueError where it cannot be had."""
    file = source.find_gguf_file(model.path)
    if file is not None:
        return {_NAMES[0]: _read_context_length(file)}
    content = read_config_json(model)
    # Models of several parts, such as vision models, keep it with their language model.
    text_config = content.get("text_config")
    return {**content, **(text_config if isinstance(text_config, dict) else {})}


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number of each GGUF type (ggml's docs/gguf.md, "Enumerations")."""
_STRING, _ARRAY = 8, 9


def _read_context_length(file: Path) -> int | None:
    """Return the `context_length` of a GGUF file.

    It stands before the vocabulary, which takes the gguf library seconds to read.
    """
    try:
        with file.open("rb") as stream:
            _magic, _version, _tensors, fields = _read_numbers(stream, "<4sIQQ")
            for _ in range(fields):
                (length,) = _read_numbers(stream, "<Q")
                name = stream.read(length)
                (kind,) = _read_numbers(stream, "<I")
                if name.endswith(b".context_length") and _SIZES.get(kind, 0) >= 4:
                    return int.from_bytes(stream.read(_SIZES[kind]), "little")
                _skip_value(stream, kind)
    except (struct.error, KeyError, OverflowError) as error:
        raise ValueError("it is no GGUF file, or a damaged one") from error
    return None


def _read_numbers(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _skip_value(stream: BinaryIO, kind: int) -> None:
    """Move behind a value; an array of texts has a length before each."""
    inner, count = (kind, 1) if kind != _ARRAY else _read_numbers(stream, "<IQ")
    if inner != _STRING:
        stream.seek(_SIZES[inner] * count, 1)
        return
    for _ in range(count):
        (length,) = _read_numbers(stream, "<Q")
        stream.seek(length, 1)


def _rope_scalings(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a config says of rope scaling, once or for each kind of layers."""
    # transformers 5 writes `rope_parameters`, and before it was `rope_scaling`.
    for name in ("rope_parameters", "rope_scaling"):
        scaling = content.get(name)
        if isinstance(scaling, dict):
            yield scaling
            yield from (value for value in scaling.values() if isinstance(value, dict))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
