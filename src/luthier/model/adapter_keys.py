"""The names in an adapter's file: the layer of each tensor, and names of the text part alone.

An adapter that was trained on a text class (`model.layers...` of `Qwen3_5ForCausalLM`) fits the
class that its checkpoint names (`model.language_model.layers...` of
`Qwen3_5ForConditionalGeneration`) under other names. peft passes over names that it does not know,
so they are renamed before it reads them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.model.experts import find_experts
from luthier.model.model_class import find_text_part
from luthier.model.model_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    read_adapter_config,
)
from luthier.storage.atomic import write_json
from luthier.storage.sizes import read_safetensors_header

PREFIX = "base_model.model."
"""What peft puts before the name of a layer."""
WRAPPED = ".base_layer"
"""What peft puts behind the name of a module, once for each further parameter that it adapts."""
EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.")
"""What is in the name of a weight of one expert, where a checkpoint's files have one for each."""
_ROWS = ".token_adapter"
_PATTERNS = ("rank_pattern", "alpha_pattern")


def layer_name(key: str) -> str:
    """Return the layer, or the whole weight's module, that a saved tensor belongs to.

    `base_model.model.lm_head.lora_A.weight` belongs to `lm_head`. The name keeps `.base_layer`.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    name = key.removeprefix(PREFIX)
    prefixes = "|".join(re.escape(prefix) for prefix in {*PEFT_TYPE_TO_PREFIX_MAPPING.values()})
    # The rows of single tokens have a prefix of their own, behind that of their layer.
    matrix = re.search(rf"(?:{re.escape(_ROWS)}|\.(?:{prefixes})[^.]*)(?:\.|$)", name)
    return name[: matrix.start()] if matrix is not None else name.rpartition(".")[0]


def find_renames(keys: Iterable[str], model: Any) -> dict[str, str]:
    """Return the new names of tensors that bear a text class's names, by their old ones.

    `model` is the base, without an adapter; it may be on the meta device. Names of layers that the
    model has stay, and so do those that it has not under either name.
    """
    prefix = find_text_part(model)
    if not prefix:
        return {}
    modules = {name for name, _ in model.named_modules()}
    renames = {}
    for key in keys:
        layer = layer_name(key)
        if not key.startswith(PREFIX) or layer.replace(WRAPPED, "") in modules:
            continue
        for candidate in _names_in_wrapper(layer, prefix):
            if candidate.replace(WRAPPED, "") in modules:
                renames[key] = PREFIX + candidate + key.removeprefix(PREFIX + layer)
                break
    return renames


@contextmanager
def open_adapter(folder: Path, model: Any) -> Iterator[Path]:
    """Give the folder of an adapter under the names of `model`: itself, or a copy for the block.

    `model` is the base, without an adapter.
    """
    weights = folder / ADAPTER_WEIGHTS_FILE
    keys = read_safetensors_header(weights).tensors if weights.is_file() else {}
    renames = find_renames(keys, model)
    if not renames:
        yield folder
        return
    with TemporaryDirectory(prefix="luthier-adapter-") as temporary:
        _write_renamed(folder, Path(temporary), renames, model)
        yield Path(temporary)


def _names_in_wrapper(name: str, prefix: str) -> list[str]:
    """Return what a module of a text class may be called where the text decoder is at `prefix`.

    The decoder may be the text class itself (Llama 4) or what that class calls `model`; the head
    stands within it or beside it.
    """
    outer = prefix.rpartition(".")[0]
    inner = [f"{prefix}.{name.removeprefix('model.')}"] if name.startswith("model.") else []
    return [f"{prefix}.{name}", *inner, f"{outer}.{name}" if outer else name]


def _write_renamed(folder: Path, target: Path, renames: Mapping[str, str], model: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    renamed = {renames.get(key, key): tensor for key, tensor in tensors.items()}
    save_file(renamed, target / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    pairs = [(layer_name(old), layer_name(new)) for old, new in renames.items()]
    # What becomes of `model.`, with which the names of all layers but the head begin.
    decoder = next(
        (
            new.removesuffix(old.removeprefix("model."))
            for old, new in pairs
            if old != new and old.startswith("model.")
        ),
        f"{find_text_part(model)}.",
    )
    config = _rename_config(read_adapter_config(folder) or {}, renamed, model, decoder)
    write_json(target / ADAPTER_CONFIG_FILE, config)


def _rename_config(
    config: dict[str, Any], keys: Iterable[str], model: Any, decoder: str
) -> dict[str, Any]:
    """Return an adapter_config.json whose names and patterns are those of the wrapper.

    `decoder` is what stands there in place of a text class's `model.`.
    """

    def rename(name: str) -> str:
        bare = name.removeprefix("^")
        return decoder + bare.removeprefix("model.") if bare.startswith("model.") else name

    changed = dict(config)
    for field in _PATTERNS:
        if config.get(field):
            changed[field] = {rename(name): value for name, value in config[field].items()}
    for field in ("modules_to_save", "target_parameters"):
        if config.get(field):
            changed[field] = [rename(name) for name in config[field]]
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict):
        changed["trainable_token_indices"] = {rename(name): ids for name, ids in rows.items()}
    if config.get("feedforward_modules") is None:
        # Names of the text class may be those of the vision tower's layers too: so each layer is
        # named whole.
        changed["target_modules"] = _adapted_modules(keys, changed, model)
        changed |= dict.fromkeys(
            name
            for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
            if name in config
        )
    return changed


def _adapted_modules(keys: Iterable[str], config: Mapping[str, Any], model: Any) -> list[str]:
    """Return the modules that an adapter's tensors belong to, less those that it saves whole."""
    parameters = config.get("target_parameters") or ()
    modules = dict(model.named_modules())
    adapted = set()
    for key in keys:
        layer = layer_name(key).replace(WRAPPED, "")
        if _ROWS in key or layer not in modules or key.startswith(f"{PREFIX}{layer}.weight"):
            continue
        names = [f"{layer}.{name}" for name, _ in modules[layer].named_parameters(recurse=False)]
        if not any(f".{name}".endswith(f".{target}") for name in names for target in parameters):
            adapted.add(layer)
    return sorted(adapted)


def read_base_names(model: Any) -> "set[str]":
    """Return every name that a weight of a model has, within it or in the files of a checkpoint.

    The model may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    names = set(state)
    # transformers 5.23 cannot turn back each of its conversions; the model's own names stand.
    with suppress(NotImplementedError, ValueError, RuntimeError, KeyError, IndexError):
        names |= set(revert_weight_conversion(model, dict(state)))
    return names


def find_unknown_layers(keys: Iterable[str], model: Any) -> list[str]:
    """Return the tensors of an adapter whose layer `model` has under no name.

    A server passes over them without a word.
    """
    names = read_base_names(model)
    # A module that is adapted through its parameters is known by them.
    known = {name.rpartition(".")[0] for name in names} | names
    layers = {key: layer_name(key).replace(WRAPPED, "") for key in keys if key.startswith(PREFIX)}
    return [key for key, layer in layers.items() if layer not in known]


def find_joined_adapters(keys: Iterable[str], model: Any) -> list[str]:
    """Return the tensors of an adapter that hold all experts where files have a tensor for each.

    vLLM reads such tensors of models alone whose files hold all experts of a layer in one tensor.
    `model` is the base, without an adapter; it may be on the meta device.
    """
    if not any(EXPERT_WEIGHT.search(name) for name in read_base_names(model)):
        return []
    experts = {group.name for group in find_experts(model)}
    return [key for key in keys if layer_name(key).replace(WRAPPED, "") in experts]
