"""The model that an adapter goes on: found where the adapter says, or where it is now."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.storage import cache
from luthier.storage.sizes import head_of

_CONVERTED = re.compile(r"^(?P<name>.+)-(?P<hash>[0-9a-f]{16})-v\d+$")
"""The name of a folder that a GGUF file was converted into (`luthier.model.gguf`)."""
_PREFIX = "base_model.model."
_FLOATS = ("F16", "BF16", "F32", "F64")
"""Number formats whose weights have the layer's own shape; packed ones do not."""


@dataclass(frozen=True)
class Base:
    """Where an adapter's base is."""

    path: str
    """As in `model.path`."""
    revision: str | None = None


def find_adapter_base(
    word: str, adapter: Mapping[str, Any], config: RunConfig | None, given: str | None
) -> Base:
    """Return the base of the adapter that `word` names.

    `adapter` is its adapter_config.json, `config` its run's, `given` what the user says. Raises
    UserError where the base is not there, or is another than the one it was trained on.
    """
    named: str | None = adapter.get("base_model_name_or_path")
    if given is not None:
        source.check_path(ModelConfig(path=given), "--base")
        _refuse_other_file(word, named, given)
        return Base(given)
    if config is not None:
        _check(word, config.model.path)
        _refuse_other_file(word, named, config.model.path)
        return Base(config.model.path, config.model.revision)
    if not named:
        raise UserError(
            f"{word}: adapter_config.json does not say which model the adapter goes on.\n"
            "Name it: --base ORGANISATION/MODEL or --base /path/to/model."
        )
    found = _in_cache(named) or named
    _check(word, found)
    return Base(found, adapter.get("revision"))


def check_shapes(word: str, folder: Path, adapter: Mapping[str, Any], base: Base) -> None:
    """Raise UserError where a layer of the base has another shape than its LoRA matrices want.

    Reads the heads of the weight files and loads nothing; a base whose weights are not on this
    machine yet, or are packed, is looked at when it is loaded.
    """
    place = Path(base.path).expanduser()
    weights = folder / "adapter_model.safetensors"
    if not place.is_dir() or not weights.is_file():
        return
    layers = {
        name: entry["shape"]
        for file in sorted(place.glob("*.safetensors"))
        for name, entry in head_of(file).tensors.items()
        if entry.get("dtype") in _FLOATS
    }
    for name, entry in head_of(weights).tensors.items():
        layer, _, side = name.removeprefix(_PREFIX).partition(".lora_")
        shape = layers.get(f"{layer}.weight")
        if shape is None or len(shape) != 2 or side not in ("A.weight", "B.weight"):
            continue
        # The inputs of A and the outputs of B are the layer's; some keep their matrix transposed.
        if entry["shape"][1 if side == "A.weight" else 0] not in shape:
            raise UserError(other_base(word, adapter, base.path, f"{layer} is {shape} there"))


def other_base(word: str, adapter: Mapping[str, Any], given: str, why: str) -> str:
    """What to say where an adapter does not go on a model."""
    named = adapter.get("base_model_name_or_path")
    if named == given:
        return (
            f"{word}: its base {given} is no longer what it was trained on ({why}).\n"
            "If the right one is at another place, name it: --base /path/to/model."
        )
    return (
        f"{word}: this adapter is for another base than {given} ({why}): it was trained on "
        f"{named}.\nName that one, or where it is now: --base /path/to/model."
    )


def _check(word: str, path: str) -> None:
    """Raise UserError, naming the adapter, where its base is no longer at `path`."""
    try:
        source.check_path(ModelConfig(path=path), "its base")
    except UserError as error:
        moved = source.is_local(path) and not Path(path).expanduser().exists()
        why = "its base was moved or removed" if moved else "its base cannot be had"
        raise UserError(
            f"{word}: {why}: {path}\n{error}\nIf the base is at another place, name it: "
            "--base /path/to/model."
        ) from error


def _in_cache(named: str) -> str | None:
    """The folder that a GGUF file was converted into, where this machine has its own copy of it."""
    place = Path(named)
    if place.is_dir() or not _CONVERTED.match(place.parent.name):
        return None
    here = cache.cache_root() / "gguf" / place.parent.name / place.name
    return str(here) if here.is_dir() else None


def _refuse_other_file(word: str, named: str | None, path: str) -> None:
    """Raise UserError where the GGUF file behind `path` is not the one that was trained on."""
    before = _CONVERTED.match(Path(named or "").parent.name)
    file = source.gguf_file(path, "its base")
    if before is None or file is None:
        return
    now = _CONVERTED.match(gguf.folder_of(file).parent.name)
    if now is not None and now["hash"] != before["hash"]:
        raise UserError(
            f"{word}: {path} is another file than the one that the adapter was trained on: "
            f"{before['name']} with the hash {before['hash']}, and here is {now['name']} with "
            f"{now['hash']}.\nInstall the version that it was trained on, or name its folder with "
            "--base."
        )
