"""Weight files read and written tensor by tensor, so that memory holds one and not a model.

The format is safetensors': https://github.com/huggingface/safetensors#format. Its own library maps
whole files into memory and writes a file from all of its tensors at once.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.model.model_files import WEIGHT_INDEX_FILE, list_indexed_files
from luthier.storage.sizes import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""The largest weight file that is written; one tensor may be larger."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's names of number formats, and torch's."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Bytes of a number; one where it is not listed."""
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as its file describes it."""

    name: str
    dtype: str
    """The format's name, such as BF16."""
    shape: tuple[int, ...]
    file: Path | None = None
    start: int = 0
    """Where its bytes begin in the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * SIZES.get(self.dtype, 1)


class WeightFiles:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read the heads of the files; UserError where there is none or one is damaged."""
        self.folder = folder
        self.entries = {
            entry.name: entry
            for file in list_weight_files(folder)
            for entry in read_tensor_entries(file)
        }

    def read(self, name: str) -> "Tensor":
        """Return one tensor in the format of its file, in memory that nothing else uses."""
        import torch

        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{self.folder}: {name} is {entry.dtype}, which is read by no one here."
            )
        dtype = getattr(torch, DTYPES[entry.dtype])
        # torch.frombuffer refuses an empty buffer, and an empty tensor has no bytes to read.
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self.read_bytes(name), dtype=dtype).reshape(entry.shape)

    def read_bytes(self, name: str) -> bytearray:
        """Return the bytes of one tensor as they are in its file."""
        entry = self.entries[name]
        assert entry.file is not None
        # A bytearray and not bytes: torch.frombuffer warns of memory that cannot be written to.
        buffer = bytearray(entry.size)
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            if stream.readinto(buffer) != entry.size:
                raise UserError(f"{entry.file}: damaged: it ends within {name}. Fetch it again.")
        return buffer


def list_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder; UserError where there is no safetensors file."""
    # The index decides: a folder may still hold shards of an earlier save beside those it names.
    files = list_indexed_files(folder) or [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: there is no {missing[0]}; only safetensors files are read.")
    return files


def read_tensor_entries(file: Path) -> list[TensorEntry]:
    """Return the tensors of a safetensors file in the order of their bytes."""
    head = read_safetensors_header(file)
    entries = [
        TensorEntry(
            name,
            tensor["dtype"],
            tuple(tensor["shape"]),
            file,
            head.start + tensor["data_offsets"][0],
        )
        for name, tensor in head.tensors.items()
    ]
    # In the order of the bytes the disk is read from front to back, whatever order the header has.
    return sorted(entries, key=lambda entry: entry.start)


def write_weights(
    folder: Path,
    planned: list[TensorEntry],
    make: Callable[[str], "Tensor | bytearray"],
    most: int = SHARD_BYTES,
) -> Iterator[TensorEntry]:
    """Write a model's weight files into `folder`, one tensor at a time; gives each when it is done.

    `planned` says name, format and shape of each; `make` gives its values, which are cast, or its
    bytes.
    """
    shards = _split_into_shards(planned, most)
    for number, shard in enumerate(shards):
        yield from _write_file(folder / _shard_name(number, len(shards)), shard, make)
    if len(shards) > 1:
        _write_index(folder, shards)


def _split_into_shards(planned: list[TensorEntry], most: int) -> list[list[TensorEntry]]:
    """Divide the tensors among files of at most `most` bytes, in their order."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in planned:
        # A tensor is never split, so one that is larger than `most` gets a file to itself.
        if shards[-1] and filled + entry.size > most:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def _shard_name(number: int, shards: int) -> str:
    return (
        "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
    )


def _write_file(
    file: Path, entries: list[TensorEntry], make: Callable[[str], "Tensor | bytearray"]
) -> Iterator[TensorEntry]:
    # Wider numbers first, so that each lies at a multiple of its size.
    ranked = sorted(entries, key=lambda entry: -SIZES.get(entry.dtype, 1))
    with file.open("wb") as stream:
        stream.write(_encode_header(ranked))
        for entry in ranked:
            _write_tensor(stream, entry, make(entry.name))
            yield entry


def _encode_header(entries: list[TensorEntry]) -> bytes:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        ends = [offset, offset + entry.size]
        head[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": ends,
        }
        offset = ends[1]
    text = json.dumps(head, separators=(",", ":")).encode()
    # The format lets spaces end the header; with them the first tensor starts at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(stream: Any, entry: TensorEntry, tensor: "Tensor | bytearray") -> None:
    import torch

    if isinstance(tensor, bytearray):
        stream.write(tensor)
        return
    dtype = getattr(torch, DTYPES[entry.dtype])
    if tuple(tensor.shape) != entry.shape:
        # The header is on disk by now: other sizes would shift every tensor behind this one.
        raise ValueError(f"{entry.name} is {tuple(tensor.shape)} and was planned as {entry.shape}")
    # NumPy has no bfloat16, so the bytes are handed over as uint8.
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if cast.numel():
        stream.write(memoryview(cast.reshape(-1).view(torch.uint8).numpy()))


def _write_index(folder: Path, shards: list[list[TensorEntry]]) -> None:
    weight_map = {
        entry.name: _shard_name(number, len(shards))
        for number, shard in enumerate(shards)
        for entry in shard
    }
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / WEIGHT_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
