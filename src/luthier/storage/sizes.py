"""Bytes of folders, and in words."""

import math
import stat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, NonNegativeInt

from luthier.errors import UserError
from luthier.storage.typed_files import check_value, parse_json


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def format_bytes(count: int) -> str:
    """A number of bytes with its unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# What is in a safetensors file, without its weights.


MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format allows."""
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of a number by the format's name of its type; there are types of less than a byte."""


class SafetensorsHeader(NamedTuple):
    """The beginning of a safetensors file."""

    tensors: dict[str, dict[str, Any]]
    """By name, in the order of their bytes: `dtype`, `shape` and `data_offsets`."""
    start: int
    """Where in the file the bytes begin that the offsets count from."""


class _TensorHeader(BaseModel):
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_DAMAGED_WEIGHTS = "Fetch or copy the file again."


def read_safetensors_header(file: Path) -> SafetensorsHeader:
    """Read the head of a file (https://github.com/huggingface/safetensors#format).

    Raises UserError for a damaged file, or another one: every byte behind the head must belong to
    a tensor, and each tensor must have the bytes of its shape.
    """
    try:
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):
            raise _damaged_weights(file, "it is no file")
        total = state.st_size
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > min(MAX_HEADER_BYTES, total - 8):
                raise _damaged_weights(file, "its first bytes are not those of the format")
            content = stream.read(size)
    except OSError as error:
        raise _damaged_weights(file, f"it cannot be read: {error.strerror or error}") from error
    head = parse_json(str(file), content, dict[str, dict[str, Any]], _DAMAGED_WEIGHTS)
    head.pop("__metadata__", None)
    check_value(str(file), head, dict[str, _TensorHeader], _DAMAGED_WEIGHTS)
    _check_offsets(file, head, total - 8 - size)
    return SafetensorsHeader(head, 8 + size)


def _check_offsets(file: Path, tensors: dict[str, dict[str, Any]], total: int) -> None:
    """Raise UserError unless the tensors fill the `total` bytes behind the head, one by one."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[1]["data_offsets"]):
        begin, after = tensor["data_offsets"]
        number = DTYPE_BYTES.get(tensor["dtype"])
        if begin != end or after < begin or after > total:
            raise _damaged_weights(file, f"the bytes of {name} are not where it says, or are cut")
        if number is not None and math.prod(tensor["shape"]) * number != after - begin:
            raise _damaged_weights(file, f"{name} does not have the bytes of its shape")
        end = after
    if end != total:
        raise _damaged_weights(file, f"it has {total - end:,} bytes that belong to no tensor")


def _damaged_weights(file: Path, problem: str) -> UserError:
    return UserError(f"{file}: damaged, or no safetensors file: {problem}.\n{_DAMAGED_WEIGHTS}")
