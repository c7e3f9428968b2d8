"""Checkpoints that FSDP or ZeRO left in shards, put together to one model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import UserError
from luthier.export import merge_streaming, model_facts, weight_files, write_card
from luthier.export.model_layout import base_folder, layout_of
from luthier.export.weight_files import TensorEntry, write_weights
from luthier.model.artifact import Artifact
from luthier.model.processor import copy_processor_files, find_processor_files
from luthier.storage.output_folder import check_free_space

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["fsdp", "zero"]
_MODEL = "model."
"""What accelerate puts before the names of a model's weights in such a checkpoint."""


def sharding_of(folder: Path) -> Kind | None:
    """Return which way of sharding left this checkpoint; None for one that is whole."""
    if not folder.is_dir():
        return None
    if fsdp_shards(folder) is not None:
        return "fsdp"
    return "zero" if (folder / "latest").is_file() and any(folder.glob("global_step*")) else None


def fsdp_shards(folder: Path) -> Path | None:
    """Return the folder with FSDP's shards: the checkpoint itself, or one in it."""
    # accelerate puts the shards into a folder of the checkpoint; torch alone writes them into it.
    folders = [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]
    return next((candidate for candidate in folders if (candidate / ".metadata").is_file()), None)


def consolidate(
    folder: Path, artifact: Artifact, target: Path, dtype: str | None, say: Callable[[str], None]
) -> None:
    """Write the model of a sharded checkpoint into `target`, with configuration and tokenizer.

    Raises UserError for weights that are not those of the run's model.
    """
    base = base_folder(artifact)
    layout = layout_of(artifact, base)
    if sharding_of(folder) == "fsdp":
        written = _consolidate_fsdp(folder, target, dtype, say)
    else:
        written = _consolidate_zero(folder, target, dtype, say)
    # Tied weights are saved once, under either name.
    missing = [n for n in layout.shapes if n not in written and n not in layout.tied]
    if missing:
        raise UserError(
            f"{folder}: the checkpoint has no {missing[0]}, which {artifact.base.path} has: it is "
            "of another model, or holds an adapter alone."
        )
    main = merge_streaming.main_format(written.values())
    name = weight_files.DTYPES[main]
    write_card.model_config(layout.config, layout.architecture, name, None, bool(layout.tied))
    layout.config.save_pretrained(target)
    chat_format = write_card.chat_format_of(artifact)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else base
    write_card.copy_tokenizer_files(tokenizer_folder, target)
    copy_processor_files(find_processor_files(artifact.base), target)
    write_card.copy_generation_config(base, None, target, chat_format)
    write_card.write_descriptions(target, model_facts.collect_facts(artifact), chat_format)


def _consolidate_fsdp(
    folder: Path, target: Path, dtype: str | None, say: Callable[[str], None]
) -> dict[str, TensorEntry]:
    """Read tensor by tensor, with torch's own reader of distributed checkpoints."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    shards = fsdp_shards(folder)
    assert shards is not None
    # The metadata names every tensor with shape and format, so nothing is loaded to plan the files.
    metadata = FileSystemReader(shards).read_metadata().state_dict_metadata
    tensors = {
        name: tensor
        for name, tensor in metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    prefix = _MODEL if all(name.startswith(_MODEL) for name in tensors) else ""
    if any(".lora_" in name for name in tensors):
        raise UserError(f"{folder}: these shards hold an adapter; merge the run's model/ instead.")
    planned = []
    for name, tensor in tensors.items():
        stored_format = merge_streaming.FORMATS[str(tensor.properties.dtype).removeprefix("torch.")]
        form = (
            merge_streaming.FORMATS[dtype]
            if dtype and stored_format in weight_files.FLOATS
            else stored_format
        )
        planned.append(TensorEntry(name.removeprefix(prefix), form, tuple(tensor.size)))
    if prefix and not any(entry.name.startswith("model.") for entry in planned):
        # A headless model's own names begin so: then nothing was put before them.
        planned = [TensorEntry(prefix + entry.name, entry.dtype, entry.shape) for entry in planned]
        prefix = ""
    check_free_space(sum(entry.size for entry in planned), target)
    done = {
        entry.name: entry
        for entry in write_weights(target, planned, _make_shard_reader(shards, metadata, prefix))
    }
    say(f"merged    {len(done)} weights out of {shards.name}")
    return done


def _make_shard_reader(
    shards: Path, metadata: dict[str, Any], prefix: str
) -> "Callable[[str], Tensor]":
    import torch
    import torch.distributed.checkpoint as dcp

    def read(name: str) -> "Tensor":
        tensor = metadata[prefix + name]
        state = {prefix + name: torch.empty(tensor.size, dtype=tensor.properties.dtype)}
        # no_dist: torch 2.13.0 warns otherwise that there is no process group, and one is not
        # needed.
        dcp.load(state, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
        return state[prefix + name]

    return read


def _consolidate_zero(
    folder: Path, target: Path, dtype: str | None, say: Callable[[str], None]
) -> dict[str, TensorEntry]:
    """Let DeepSpeed gather the weights in float32, and write them in the format asked for."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    # DeepSpeed's function writes a folder of its own and knows no other format than float32.
    gathered = target / "gathered"
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(gathered), safe_serialization=True)
    weights = weight_files.WeightFiles(gathered)
    form = merge_streaming.FORMATS[dtype or "float32"]
    planned = [
        TensorEntry(
            tensor_entry.name,
            form if tensor_entry.dtype in weight_files.FLOATS else tensor_entry.dtype,
            tensor_entry.shape,
        )
        for tensor_entry in weights.entries.values()
    ]
    done = {entry.name: entry for entry in write_weights(target, planned, weights.read)}
    shutil.rmtree(gathered)
    say(f"merged    {len(done)} weights out of ZeRO's shards")
    return done
