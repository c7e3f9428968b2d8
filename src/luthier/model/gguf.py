"""A GGUF file as a Hugging Face folder, converted once into the cache.

GGUF is the format of llama.cpp: one file with metadata, vocabulary and (mostly quantized) weights.
Training needs plain weights, so they are unpacked to bfloat16: half of float32's size, and finer
than what the 4- to 8-bit blocks of such a file keep.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.storage import cache
from luthier.storage.manifest import digest

VERSION = 1
"""Raise it when the conversion's result changes: folders of an older version are not used."""

INSTALL = "pip install 'luthier[gguf]'"


def convert(file: Path) -> Path:
    """Return the folder with the file's weights, configuration and (where known) tokenizer.

    The first call takes some 12 s for 135M parameters; later ones check the folder's hashes.
    Raises UserError for a file that cannot be read or an architecture that is not supported.
    """
    folder = folder_of(file)
    return cache.make_once(folder, lambda new: _write_model(file, new))


def convert_tokenizer(file: Path) -> Path:
    """Return a folder with the file's tokenizer alone: a few seconds, without torch.

    Raises UserError for a file that cannot be read or a tokenizer that is not converted exactly.
    """
    from luthier.model import gguf_tokenizer

    folder = _folder(file, "tokenizer")
    return cache.make_once(folder, lambda new: gguf_tokenizer.save(read_metadata(file), new))


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the file's metadata, by llama.cpp's key names; raises UserError if it is no GGUF."""
    reader = _open(file)
    return {name: field.contents() for name, field in reader.fields.items()}


def folder_of(file: Path) -> Path:
    """The folder that a file is converted into, there or not yet; its name has the file's hash."""
    return _folder(file, "model")


def _folder(file: Path, part: str) -> Path:
    name = f"{file.stem}-{digest(file)[:16]}-v{VERSION}"
    return cache.cache_root() / "gguf" / name / part


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"Reading {file.name} needs the package gguf: {INSTALL}") from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{file} is damaged or no GGUF file: {error}.\nDownload or install it again."
        ) from error


def _write_model(file: Path, folder: Path) -> None:
    from luthier.model import gguf_tokenizer

    reader = _open(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_stretched_rope(file, metadata, {tensor.name for tensor in reader.tensors})
    _unpack(file).save_pretrained(folder)
    if gguf_tokenizer.is_known(metadata):
        gguf_tokenizer.save(metadata, folder)


def _refuse_stretched_rope(file: Path, metadata: Mapping[str, Any], tensors: set[str]) -> None:
    """Stop where the file stretches its positions: transformers drops that without a word."""
    key = f"{metadata['general.architecture']}.rope.scaling.type"
    if "rope_freqs.weight" in tensors or metadata.get(key, "none") != "none":
        raise UserError(
            f"{file.name} scales its rotary positions (as Llama 3.1 does), which is lost in the "
            "conversion from GGUF.\nUse the model's own repository: model.path=ORGANISATION/MODEL."
        )


def _unpack(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"transformers cannot read the model in {file.name}: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:5])
        raise UserError(
            f"{file.name} lacks weights that its architecture has ({some}): it cannot be used."
        )
    return model
