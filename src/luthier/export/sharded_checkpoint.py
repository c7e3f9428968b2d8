"""Checkpoints that FSDP or ZeRO left in shards, put together to one model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export import merge_streaming, model_facts, weight_files, write_card
from luthier.export.model_layout import ModelLayout, base_folder, layout_of
from luthier.export.weight_conversion import (
    WeightGroup,
    group_tensors,
    is_reversible,
    revert_name,
)
from luthier.export.weight_files import TensorEntry, write_weights
from luthier.model.artifact import Artifact
from luthier.model.model_files import find_fsdp_shards, list_indexed_files, sharding_of
from luthier.model.processor import copy_processor_files, find_processor_files
from luthier.storage.atomic import write_json
from luthier.storage.output_folder import check_free_space

if TYPE_CHECKING:
    from torch import Tensor

_MODEL = "model."
"""What accelerate puts before the names of a model's weights in such a checkpoint."""


def consolidate(
    folder: Path, artifact: Artifact, target: Path, dtype: str | None, say: Callable[[str], None]
) -> None:
    """Write the model of a sharded checkpoint into `target`, with configuration and tokenizer.

    `artifact` is the model that was trained, with the chat settings of its run. The tensors have
    the names of that model's own files. Raises UserError for weights that are not its.
    """
    base = base_folder(artifact)
    layout = layout_of(artifact, base)
    if sharding_of(folder) == "fsdp":
        written = _consolidate_fsdp(folder, layout, base, target, dtype)
    else:
        written = _consolidate_zero(folder, layout, base, target, dtype)
    say(f"merged    {len(written)} weights out of the shards of {folder.name}")
    main = merge_streaming.main_format(written)
    name = weight_files.DTYPES[main]
    write_card.model_config(layout.config, layout.architecture, name, None, bool(layout.tied))
    layout.config.save_pretrained(target)
    chat_format = write_card.chat_format_of(artifact)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else base
    write_card.copy_tokenizer_files(tokenizer_folder, target)
    copy_processor_files(find_processor_files(artifact.base), target)
    if artifact.chat is not None:
        write_json(target / "chat.json", artifact.chat)
    if chat_format.template is not None:
        # What was trained, also where the run's config replaced the tokenizer's own.
        (target / "chat_template.jinja").write_text(chat_format.template, encoding="utf-8")
    write_card.copy_generation_config(base, None, target, chat_format)
    write_card.write_descriptions(target, model_facts.collect_facts(artifact), chat_format)


def _consolidate_fsdp(
    folder: Path, layout: ModelLayout, base: Path, target: Path, dtype: str | None
) -> list[TensorEntry]:
    """Read tensor by tensor, with torch's own reader of distributed checkpoints."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    shards = find_fsdp_shards(folder)
    assert shards is not None
    # The metadata names every tensor with shape and format, so nothing is loaded to plan the files.
    metadata = FileSystemReader(shards).read_metadata().state_dict_metadata
    tensors = {
        name: tensor
        for name, tensor in metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    if any(".lora_" in name for name in tensors):
        raise UserError(f"{folder}: these shards hold an adapter; merge the run's model/ instead.")
    prefix = _MODEL if all(name.startswith(_MODEL) for name in tensors) else ""
    if prefix and not any(name.removeprefix(prefix) in layout.shapes for name in tensors):
        # A headless model's own names begin so: then nothing was put before them.
        prefix = ""
    entries = {
        name.removeprefix(prefix): TensorEntry(
            name.removeprefix(prefix),
            merge_streaming.FORMATS[str(tensor.properties.dtype).removeprefix("torch.")],
            tuple(tensor.size),
        )
        for name, tensor in tensors.items()
    }
    reader = _make_shard_reader(shards, metadata, prefix)
    return _write_model(ShardedWeights(folder, entries, reader), layout, base, target, dtype)


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
    folder: Path, layout: ModelLayout, base: Path, target: Path, dtype: str | None
) -> list[TensorEntry]:
    """Let DeepSpeed gather the weights in float32, and write them in the format asked for."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    # DeepSpeed's function writes a folder of its own and knows no other format than float32.
    gathered = target / "gathered"
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(gathered), safe_serialization=True)
    weights = weight_files.WeightFiles(gathered)
    shards = ShardedWeights(folder, weights.entries, weights.read)
    written = _write_model(shards, layout, base, target, dtype)
    shutil.rmtree(gathered)
    return written


@dataclass(frozen=True)
class ShardedWeights:
    """The weights of a sharded checkpoint, under the names that the model itself has for them."""

    folder: Path
    entries: dict[str, TensorEntry]
    read: "Callable[[str], Tensor]"


def _write_model(
    shards: ShardedWeights, layout: ModelLayout, base: Path, target: Path, dtype: str | None
) -> list[TensorEntry]:
    """Write the weight files of a model, one group of tensors at a time, and return what they hold.

    Where transformers makes a weight of several tensors of the base's files (experts), these come
    out again.
    """
    # Tied weights are saved once, under either name.
    missing = [n for n in layout.shapes if n not in shards.entries and n not in layout.tied]
    if missing:
        raise UserError(
            f"{shards.folder}: the checkpoint has no {missing[0]}, which {base} has: it is of "
            "another model, or holds an adapter alone."
        )
    # A base of another format has no names to go by; the model's own ones are read as well.
    has_names = list_indexed_files(base) or (base / "model.safetensors").is_file()
    files = weight_files.WeightFiles(base).entries if has_names else {}
    shapes = {name: entry.shape for name, entry in files.items()}
    groups = [
        group
        for group in group_tensors(shapes, layout.model)
        if all(name in shards.entries for name in group.targets) and is_reversible(group, shapes)
    ]
    grouped = {target for group in groups for target in group.targets}
    planned: list[TensorEntry] = []
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {}

    def plan(name: str, weight: str, shape: tuple[int, ...]) -> None:
        stored = shards.entries[weight].dtype
        is_cast = dtype is not None and stored in weight_files.FLOATS
        planned.append(
            TensorEntry(name, merge_streaming.FORMATS[dtype or ""], shape)
            if is_cast
            else TensorEntry(name, stored, shape)
        )

    for group in groups:
        for name in group.names:
            is_same = group.conversion is None
            shape = shards.entries[group.targets[0]].shape if is_same else shapes[name]
            plan(name, group.targets[0], shape)
            makers[name] = partial(_restore, group, shards)
    for weight, entry in shards.entries.items():
        # Of tied weights one name is written.
        if weight not in grouped and layout.tied.get(weight) not in shards.entries:
            name = revert_name(weight, layout.model)
            plan(name, weight, entry.shape)
            makers[name] = partial(_read_one, shards, weight, name)
    check_free_space(sum(entry.size for entry in planned), target)
    ready: dict[str, Tensor] = {}

    def make(name: str) -> "Tensor":
        if name not in ready:
            ready.update(makers[name]())
        return ready.pop(name)

    return list(write_weights(target, planned, make))


def _restore(group: WeightGroup, shards: ShardedWeights) -> "dict[str, Tensor]":
    """Return the base's tensors that make a group of the model's weights, by name."""
    restored = group.restore({name: shards.read(name) for name in group.targets})
    return {
        name: value
        for pattern, names in group.sources.items()
        for name, value in zip(names, restored[pattern], strict=True)
    }


def _read_one(shards: ShardedWeights, weight: str, name: str) -> "dict[str, Tensor]":
    return {name: shards.read(weight)}
