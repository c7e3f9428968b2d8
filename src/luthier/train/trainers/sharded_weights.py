"""Weights that FSDP2 holds in slices on all ranks: saved whole, read back, compared and loaded.

transformers 5.23 and accelerate 1.15 gather the frozen base with each adapter, write the weights of
a full checkpoint a second time as a pickle, write no model at all where shards are saved, and read
nothing of it back. `luthier.train.trainers.base.TrainerMixin` calls these functions in their place.
All ranks call each of them together.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import UserError
from luthier.model.adapter_keys import open_adapter
from luthier.model.model_files import ADAPTER_WEIGHTS_FILE, list_indexed_files
from luthier.train.trainers.checkpoints import read_named_weights

SHARDS_FOLDER = "pytorch_model_fsdp_0"
"""The folder of a checkpoint with whole weights in torch's distributed format."""
_OPTIMIZER_FILE = "optimizer.bin"
_CHUNK = 2**16
"""Words of eight bytes that are summed at once."""
_GROUP_BYTES = 2**28
"""Bytes of shards that each rank reads back at once."""


@dataclass(frozen=True)
class _SliceSums:
    """What is compared of one rank's slice of a tensor; equal sums of unlike slices are chance."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """The shape of the whole tensor."""
    dtype: str
    total: int
    """The sum of its entries as integers of the same bits, in whatever order."""
    weighted: int
    """The sum of its words of eight bytes, each times its place."""


def choose_layers(trainer: Any) -> None:
    """Let each layer of the model be sharded by itself, unless the launch names the layers.

    accelerate 1.15 takes all classes that transformers names for the model, and ends in a traceback
    where one is not in it (a wrapper of images names layers of both of its towers).
    """
    plugin, model = trainer.accelerator.state.fsdp_plugin, trainer.model
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        named = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(present & set(named))


def saves_shards(trainer: Any) -> bool:
    """Return whether the launch asks for checkpoints in shards (`SHARDED_STATE_DICT`)."""
    return "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def save_weights(trainer: Any, folder: Path, is_checkpoint: bool) -> None:
    """Write a model or adapter as one process would, read it back, and compare it with the slices.

    Only what is written is gathered, tensor by tensor, into the memory of the first process. In a
    checkpoint in shards a whole model has its configuration and tokenizer alone:
    `save_training_state` writes its weights. Raises UserError where the file does not hold what the
    ranks hold.
    """
    state = _read_state(trainer.model)
    if is_checkpoint and saves_shards(trainer) and not _has_adapter(trainer.model):
        if trainer.args.should_save:
            _save_descriptions(trainer, folder)
        return
    files = _list_saved(trainer.model, state)
    needed = {id(value) for expected in files.values() for value in expected.values()}
    if not needed <= {id(value) for value in state.values()}:
        # A method that saves other tensors than it trains: then everything is gathered.
        needed = {id(value) for value in state.values()}
    ties = _find_ties(trainer.model)
    saved = {name for name, value in state.items() if id(value) in needed}
    unsaved = find_unsaved(trainer.model, saved, ties)
    if unsaved:
        raise UserError(_damage_message(folder, f"{unsaved[0]} trains, and would not be saved"))
    gathered: dict[str, Tensor] = {}
    written: dict[Any, Any] = {}
    for name, value in state.items():
        if name not in saved:
            continue
        # Tied weights stay one tensor, by which transformers knows to write it once.
        if ties.get(name, name) not in written:
            whole = _gather(value)
            written[ties.get(name, name)] = whole.cpu() if trainer.args.should_save else None
        if trainer.args.should_save:
            gathered[name] = written[ties.get(name, name)]
    trainer._save(str(folder), state_dict=gathered)
    ignored = getattr(trainer.model, "_keys_to_ignore_on_save", None) or ()
    for subfolder, expected in files.items():
        compared = {name: value for name, value in expected.items() if name not in ignored}
        compare_saved(folder / subfolder, compared, ties)


def save_training_state(trainer: Any, folder: Path) -> None:
    """Write the states of optimizer and scheduler, and the weights of a checkpoint in shards.

    These are read back; UserError is raised where they are not what the ranks hold.
    """
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    accelerator, model = trainer.accelerator, trainer.model
    name = "SHARDED_STATE_DICT" if saves_shards(trainer) else "FULL_STATE_DICT"
    with _state_dict_type(trainer, name) as plugin, _raise_first_failure():
        if saves_shards(trainer) and not _has_adapter(model):
            save_fsdp_model(plugin, accelerator, model, str(folder))
            _compare_shards(folder / SHARDS_FOLDER, _read_state(model))
        save_fsdp_optimizer(plugin, accelerator, trainer.optimizer, model, str(folder))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")


def load_weights(trainer: Any, folder: Path) -> None:
    """Load the weights of a checkpoint, in shards or whole, into the slices of each rank.

    Raises UserError where a weight is missing.
    """
    model = trainer.model
    if (folder / SHARDS_FOLDER).is_dir():
        from accelerate.utils import load_fsdp_model

        with _state_dict_type(trainer, "SHARDED_STATE_DICT") as plugin, _raise_first_failure():
            load_fsdp_model(plugin, trainer.accelerator, model, str(folder))
        return
    state = _read_state(model)
    if not _has_adapter(model):
        names = {name for file in _list_files(folder) for name in _read_names(file)}
        ties = _find_ties(model)
        if not names <= set(state) or not all(_has_weight(name, names, ties) for name in state):
            _load_by_name(model, folder)
            return
    for subfolder, expected in _list_saved(model, state).items():
        if _has_adapter(model):
            with open_adapter(folder / subfolder, model.get_base_model()) as renamed:
                _load_slices(renamed, expected, _find_ties(model))
        else:
            _load_slices(folder, expected, _find_ties(model))


def optimizer_format(trainer: Any, checkpoint: str) -> AbstractContextManager[Any]:
    """Let accelerate read an optimizer's state in the format that it has in a checkpoint."""
    is_whole = (Path(checkpoint) / _OPTIMIZER_FILE).is_file()
    return _state_dict_type(trainer, "FULL_STATE_DICT" if is_whole else "SHARDED_STATE_DICT")


def compare_saved(folder: Path, expected: Mapping[str, Tensor], ties: Mapping[str, int]) -> None:
    """Raise UserError in all processes where the files of a folder do not hold `expected`.

    `expected` has the tensors of the model (slices of DTensors on each rank) by their names in the
    files; where it has none, nothing would be saved. Tensors that transformers renames or splits
    when it saves are compared together, by sums.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    sums = {name: _sum_slice(value) for name, value in expected.items()}
    ranks: list[dict[str, _SliceSums]] = gather_object([sums])
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        problem = [_find_difference(_list_files(folder), ranks, ties)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(_damage_message(folder, problem[0]))


# What is saved, and under which names.


def _has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _read_state(model: Any) -> dict[str, Tensor]:
    """Return the weights as they lie on this rank, which share their memory with the model's.

    Their names are those without the wrappers of torch.compile and activation checkpointing.
    """
    from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names

    state: dict[str, Tensor] = fsdp2_canonicalize_names(model.state_dict())
    return state


def _list_saved(model: Any, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what the files of a saved model hold, by their folder within and their names."""
    if not _has_adapter(model):
        return {"": state}
    from peft import get_peft_model_state_dict

    # Embeddings whose rows for new tokens train stay with the base, as in `adapters.add_adapter`.
    return {
        "" if adapter == "default" else adapter: dict(
            get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
            )
        )
        for adapter in model.peft_config
    }


def _find_ties(model: Any) -> dict[str, int]:
    """Return a number for each parameter by name; the names of tied ones have the same."""
    from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names

    named = fsdp2_canonicalize_names(dict(model.named_parameters(remove_duplicate=False)))
    return {name: id(parameter) for name, parameter in named.items()}


def find_unsaved(model: Any, saved: Collection[str], ties: Mapping[str, int]) -> list[str]:
    """Return the trained parameters of a model that are not among those that are saved."""
    from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = fsdp2_canonicalize_names(trained)
    return [name for name in names if not _has_weight(name, saved, ties)]


def _has_weight(name: str, names: Collection[str], ties: Mapping[str, int]) -> bool:
    """Return whether a tensor is among `names`, itself or as one that it is tied to."""
    tied = ties.get(name)
    return name in names or any(tied and ties.get(other) == tied for other in names)


def _list_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's or adapter's folder."""
    adapter = folder / ADAPTER_WEIGHTS_FILE
    if adapter.is_file():
        return [adapter]
    return list_indexed_files(folder) or [folder / "model.safetensors"]


def _read_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _save_descriptions(trainer: Any, folder: Path) -> None:
    """Write what stands beside a whole model's weights: configuration, tokenizer and the like."""
    # As transformers does for ZeRO-3: it writes a file of no weights with them.
    trainer._save(str(folder), state_dict={})
    (folder / "model.safetensors").unlink(missing_ok=True)


# Slices of this rank.


def _slice(value: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's part of a tensor, and at which entry of each axis it begins."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(value, DTensor):
        return value, (0,) * value.dim()
    mesh, placements = value.device_mesh, value.placements
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    return value.to_local(), tuple(offset)


def _gather(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    # Slices that wait in main memory (fsdp_offload_params) travel between the devices.
    gathered: Tensor = value.to(value.device_mesh.device_type).full_tensor()
    return gathered


def _sum_slice(value: Tensor) -> _SliceSums:
    local, offset = _slice(value)
    sums = _sum_bits(local)
    return _SliceSums(offset, tuple(local.shape), tuple(value.shape), str(local.dtype), *sums)


def _sum_bits(values: Tensor) -> tuple[int, int]:
    """Return the two sums of `_SliceSums`, modulo 2^64.

    Eight bytes are read at once: entry by entry it would take ten times as long.
    """
    size = values.element_size()
    raw = _raw_bytes(values)
    padding = -raw.numel() % 8
    if padding or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(padding)])
    words = raw.view(torch.int64)
    # Small enough for a processor's cache; a GPU is rather kept busy.
    step = _CHUNK if words.device.type == "cpu" else 256 * _CHUNK
    places = torch.arange(1, min(step, words.numel()) + 1, device=words.device)
    total, weighted = words.new_zeros(()), words.new_zeros(())
    for start in range(0, words.numel(), step):
        chunk = words[start : start + step]
        weighted += (chunk * places[: chunk.numel()]).sum() + start * chunk.sum()
        for shift in range(0, 64, 8 * size):
            total += ((chunk >> shift) & (2 ** (8 * size) - 1)).sum() if size < 8 else chunk.sum()
    return int(total) % 2**64, int(weighted) % 2**64


def _raw_bytes(values: Tensor) -> Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def _find_difference(
    files: list[Path], ranks: list[dict[str, _SliceSums]], ties: Mapping[str, int]
) -> str | None:
    """Return what of the files is not what the ranks hold; None where all is the same."""
    from safetensors import safe_open

    # An adapter whose weights have other names than peft looks for: an empty file would be the same
    # as what was expected.
    if not ranks[0]:
        return "there are no weights to save in it"
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                return f"{file.name} is missing"
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors |= dict.fromkeys(opened.keys(), opened)
        sums: dict[str, list[int]] = {}
        converted = []
        for name in ranks[0]:
            if name in tensors:
                problem = _compare_slices(name, tensors.pop(name), [rank[name] for rank in ranks])
                if problem is not None:
                    return problem
            else:
                converted.append(name)
        # Of tied weights one is written, under whichever name.
        saved = ranks[0].keys() - set(converted)
        converted = [name for name in converted if not _has_weight(name, saved, ties)]
        converted = list({ties.get(name, name): name for name in reversed(converted)}.values())
        if converted and not tensors:
            return f"{converted[0]} is missing"
        for name in converted:
            for part in {rank[name].offset: rank[name] for rank in ranks}.values():
                _add_sums(sums, part.dtype, part.total, torch.Size(part.shape).numel())
        for name, opened in tensors.items():
            value = opened.get_tensor(name)
            _add_sums(sums, str(value.dtype), -_sum_bits(value)[0], -value.numel())
    wrong = [dtype for dtype, (total, count) in sums.items() if total % 2**64 or count]
    if not wrong:
        return None
    names = ", ".join([*converted[:3], *(["..."] if len(converted) > 3 else [])])
    return f"what was made of {names or 'nothing'} ({wrong[0]}) has other values"


def _add_sums(sums: dict[str, list[int]], dtype: str, total: int, count: int) -> None:
    old = sums.setdefault(dtype, [0, 0])
    sums[dtype] = [old[0] + total, old[1] + count]


def _compare_slices(name: str, tensors: Any, ranks: list[_SliceSums]) -> str | None:
    """Compare a tensor of an open file with each rank's slice of it."""
    saved = tensors.get_slice(name)
    shape = tuple(saved.get_shape())
    ends = zip(
        *([o + s for o, s in zip(p.offset, p.shape, strict=True)] for p in ranks), strict=True
    )
    expected = tuple(max(end) for end in ends)
    if shape != expected:
        return f"{name} has the shape {shape} instead of {expected}"
    read: dict[tuple[int, ...], tuple[str, int, int]] = {}
    for rank, part in enumerate(ranks):
        if 0 in part.shape:
            continue
        key = (*part.offset, *part.shape)
        if key not in read:
            axes = tuple(slice(o, o + s) for o, s in zip(part.offset, part.shape, strict=True))
            values = saved[axes] if axes else tensors.get_tensor(name)
            read[key] = (str(values.dtype), *_sum_bits(values))
        if read[key] != (part.dtype, part.total, part.weighted):
            return f"the part of {name} that rank {rank} holds is not what was written"
    return None


def _compare_shards(folder: Path, state: dict[str, Tensor]) -> None:
    """Read this rank's shards back and compare them, bit by bit, some tensors at a time."""
    from accelerate.utils import gather_object
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    problems: list[str] = []
    group: dict[str, Tensor] = {}
    names = list(state)
    for name in names:
        group[name] = state[name]
        size = sum(_slice(value)[0].nbytes for value in group.values())
        if size < _GROUP_BYTES and name != names[-1]:
            continue
        read = {name: torch.empty_like(value) for name, value in group.items()}
        try:
            reader = checkpoint.FileSystemReader(folder)
            checkpoint.load({"model": read}, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException) as error:
            reason = str(error).strip().partition("\n")[0]
            problems.append(f"rank {torch.distributed.get_rank()} cannot read it: {reason}")
            break
        problems += [
            f"the part of {name} that rank {torch.distributed.get_rank()} holds is not what was "
            "written"
            for name, value in group.items()
            if not torch.equal(_raw_bytes(_slice(read[name])[0]), _raw_bytes(_slice(value)[0]))
        ]
        group = {}
    found = gather_object(problems[:1])
    if found:
        raise UserError(_damage_message(folder, found[0]))


def _damage_message(folder: Path, problem: str) -> str:
    return (
        f"{folder}: what was saved is not what the processes trained: {problem}.\nThe run stops, "
        "and its earlier checkpoints are untouched. Look at the disk, and start the same command "
        "again."
    )


# Loading.


def _load_slices(folder: Path, expected: Mapping[str, Tensor], ties: Mapping[str, int]) -> None:
    """Copy this rank's slice of each tensor out of the files of a folder."""
    from safetensors import safe_open

    missing = set(expected)
    with torch.no_grad():
        for file in _list_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for name in missing & set(tensors.keys()):
                    local, offset = _slice(expected[name])
                    if tuple(tensors.get_slice(name).get_shape()) != tuple(expected[name].shape):
                        raise UserError(f"{file}: {name} has another shape than in this run.")
                    axes = tuple(slice(o, o + s) for o, s in zip(offset, local.shape, strict=True))
                    if local.numel():
                        values = tensors.get_slice(name)[axes] if axes else tensors.get_tensor(name)
                        local.copy_(values)
                missing -= set(tensors.keys())
    absent = [name for name in missing if not _has_weight(name, expected.keys() - missing, ties)]
    if absent:
        raise UserError(f"{folder}: its weights are of another model: there is no {min(absent)}.")


def _load_by_name(model: Any, folder: Path) -> None:
    """Load a whole model whose files have the names of the hub, and hand out its slices.

    The first process loads it as transformers does, which turns the names back, and has it whole in
    its memory.
    """
    from accelerate.utils import broadcast_object_list
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    whole: dict[str, Any] = {}
    missing: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        # fully_shard makes a class of the model's own one and FSDPModule.
        kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        whole, name = read_named_weights(kind, model, folder)
        missing = [name]
    broadcast_object_list(missing)
    if missing[0] is not None:
        raise UserError(f"{folder}: its weights are of another model: there is no {missing[0]}.")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


@contextmanager
def _raise_first_failure() -> Iterator[None]:
    """Raise the first rank's own error in place of torch's report on all ranks.

    torch's (2.13) is no `Exception`, and so passes by what tells a full disk in words.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as report:
        _, (error, _) = min(report.failures.items())
        if isinstance(error, Exception):
            raise error from report
        raise


@contextmanager
def _state_dict_type(trainer: Any, name: str) -> Iterator[Any]:
    """Set accelerate's kind of state dict within the block, with its settings for CPU memory."""
    plugin = trainer.accelerator.state.fsdp_plugin
    fields = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {field: getattr(plugin, field) for field in fields}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(name)
    try:
        yield plugin
    finally:
        vars(plugin).update(before)
