"""The files of a saved model or adapter, read with their types: a damaged one is named in words.

Nothing here imports torch or transformers. `check_model_folder` compares what config.json says with
what the weight files hold, before a library reserves memory for it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.config.schema import SavedChatSettings
from luthier.errors import UserError
from luthier.model.adapter_patterns import check_adapter_patterns
from luthier.storage.sizes import read_safetensors_header
from luthier.storage.typed_files import has_entry, load_json

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
CHAT_SETTINGS_FILE = "chat.json"
GENERATION_CONFIG_FILE = "generation_config.json"
LABELS_FILE = "labels.json"
"""The file beside a classifier's or tagger's adapter that names its labels."""
LOADER_FILE = "loader.json"
"""The file beside weights of a model that a function of the user's own loads."""
MODEL_CONFIG_FILE = "config.json"
WEIGHT_INDEX_FILE = "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.gguf", "*.bin")
"""Patterns of files with weights, of which the first that matches any counts."""
_ADVICE = "Copy or fetch the file again."
_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    *("decoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_SIZES = (
    *("vocab_size", "intermediate_size", "d_ff", "ffn_dim", "n_inner", "n_positions"),
    *("max_position_embeddings", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("head_dim", "num_experts", "num_local_experts", "n_routed_experts", "type_vocab_size"),
)
"""Fields of a config.json of which a model has a row, or a block of rows, for each number."""
_MAX_LABELS = 1_000_000
_LAYERS_PER_TENSOR = 4
"""Layers that may share a tensor, which few models do (ALBERT: 12 layers, 25 tensors)."""
_VALUES_PER_BYTE = 64
"""Values of a matrix that a byte of a weight file may stand for: an eighth of a bit each."""
_SMALL_MODEL_VALUES = 2**28
"""A matrix up to this size is no danger, whatever the files hold."""


class _AdapterConfig(BaseModel):
    """What luthier reads of an adapter_config.json; peft reads the rest."""

    model_config = ConfigDict(extra="allow")

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    peft_type: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class _ModelConfig(BaseModel):
    """What luthier reads of a config.json; transformers reads the rest."""

    model_config = ConfigDict(extra="allow")

    architectures: list[str] | None = None
    is_encoder_decoder: bool | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    problem_type: str | None = None


class _GenerationConfig(BaseModel):
    """What luthier reads of a generation_config.json."""

    model_config = ConfigDict(extra="allow")

    eos_token_id: int | list[int] | None = None


class _Labels(BaseModel):
    """The content of a labels.json."""

    model_config = ConfigDict(extra="allow")

    id2label: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], str]
    problem_type: str | None = None


class _Loader(BaseModel):
    """The content of a loader.json."""

    model_config = ConfigDict(extra="allow")

    loader: str | dict[str, dict[str, Any] | None]


class _WeightIndex(BaseModel):
    """The content of a model.safetensors.index.json."""

    model_config = ConfigDict(extra="allow")

    weight_map: dict[str, str]


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """Return the adapter_config.json of a folder; None where there is none."""
    file = folder / ADAPTER_CONFIG_FILE
    config: dict[str, Any] | None = load_json(file, _AdapterConfig, _ADVICE)
    # peft looks for its patterns before anything else happens, and nothing could stop it.
    check_adapter_patterns(f"{file}: ", config or {})
    return config


def read_config_file(file: Path) -> dict[str, Any] | None:
    """Return the content of a config.json; None where there is none."""
    config: dict[str, Any] | None = load_json(file, _ModelConfig, _ADVICE)
    return config


def read_generation_file(folder: Path) -> dict[str, Any] | None:
    """Return the generation_config.json of a folder; None where there is none."""
    file = folder / GENERATION_CONFIG_FILE
    config: dict[str, Any] | None = load_json(file, _GenerationConfig, _ADVICE)
    return config


def read_chat_settings(folder: Path) -> dict[str, Any] | None:
    """Return the chat settings saved with a model; None where there are none."""
    settings: dict[str, Any] | None = load_json(
        folder / CHAT_SETTINGS_FILE, SavedChatSettings | None, _ADVICE
    )
    return settings


def read_labels(folder: Path) -> dict[str, Any] | None:
    """Return the labels.json of a folder; None where there is none."""
    labels: dict[str, Any] | None = load_json(folder / LABELS_FILE, _Labels, _ADVICE)
    return labels


def read_loader(folder: Path) -> Any:
    """Return the `model.loader` that a folder's weights need; None where they need none."""
    content: dict[str, Any] | None = load_json(folder / LOADER_FILE, _Loader, _ADVICE)
    return None if content is None else content["loader"]


def list_indexed_files(folder: Path) -> list[Path] | None:
    """Return the weight files that a folder's index names; None where it has no index.

    Raises UserError for an index that is damaged, or names files outside of the folder.
    """
    index = folder / WEIGHT_INDEX_FILE
    content: dict[str, Any] | None = load_json(index, _WeightIndex, _ADVICE)
    if content is None:
        return None
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is no file of this folder.\n{_ADVICE}")
    return [folder / name for name in names]


def list_indexed_weights(folder: Path) -> list[str]:
    """Return the names of the weights that a folder's index names; empty where it has no index."""
    content = load_json(folder / WEIGHT_INDEX_FILE, _WeightIndex, _ADVICE)
    return [] if content is None else list(content["weight_map"])


def sharding_of(folder: Path) -> Literal["fsdp", "zero"] | None:
    """Return which way of sharding left the weights of a checkpoint; None for one that is whole."""
    if not folder.is_dir():
        return None
    if find_fsdp_shards(folder) is not None:
        return "fsdp"
    return "zero" if (folder / "latest").is_file() and any(folder.glob("global_step*")) else None


def find_fsdp_shards(folder: Path) -> Path | None:
    """Return the folder with FSDP's shards of the weights: the checkpoint itself, or one in it."""
    # accelerate puts the shards into a folder of the checkpoint; torch alone writes them into it.
    folders = [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]
    return next((candidate for candidate in folders if (candidate / ".metadata").is_file()), None)


def check_model_folder(folder: Path, is_complete: bool = True) -> None:
    """Raise UserError where the files of a whole model are damaged, or do not go together.

    These are config.json, the index and the heads of the weight files; sizes in config.json that
    the weights cannot have are refused, since a library would reserve memory for them first.
    `is_complete` says that no weight file is still to be fetched.
    """
    config = read_config_file(folder / MODEL_CONFIG_FILE)
    read_generation_file(folder)
    indexed = list_indexed_files(folder)
    files = [folder / "model.safetensors"] if indexed is None else indexed
    present = [file for file in files if has_entry(file)]
    if indexed and is_complete and len(present) < len(files):
        missing = next(file.name for file in files if file not in present)
        raise UserError(f"{folder}: {missing} is missing, which {WEIGHT_INDEX_FILE} names.")
    tensors = sum(len(read_safetensors_header(file).tensors) for file in present)
    if not present:
        present = next((f for p in WEIGHT_PATTERNS if (f := sorted(folder.glob(p)))), [])
    if config is None or not present or (indexed and len(present) < len(files)):
        return
    total = sum(file.stat().st_size for file in present)
    problem = _find_absurd_size(config, total, tensors)
    if problem is not None:
        raise UserError(
            f"{folder / MODEL_CONFIG_FILE}: {problem}, and the weight files beside it hold "
            f"{total:,} bytes: they do not belong together.\n{_ADVICE}"
        )


def _find_absurd_size(config: dict[str, Any], total: int, tensors: int) -> str | None:
    """Return the first field that says a size which weights of `total` bytes cannot have.

    `tensors` is their number; 0 where it is not known.
    """
    most_values = max(total * _VALUES_PER_BYTE, _SMALL_MODEL_VALUES)
    for part in _nested_configs(config):
        width = max([1, *(part[name] for name in _WIDTHS if isinstance(part.get(name), int))])
        limits = dict.fromkeys(_SIZES, most_values // width)
        limits |= dict.fromkeys(_WIDTHS, int(most_values**0.5))
        limits |= dict.fromkeys(
            _LAYER_COUNTS, _LAYERS_PER_TENSOR * tensors + 64 if tensors else most_values // width
        )
        limits["num_labels"] = _MAX_LABELS
        for name, limit in limits.items():
            value = part.get(name)
            if isinstance(value, int) and not 0 <= value <= limit:
                return f"{name} is {value:,}"
    return None


def _nested_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and those of the parts of its model, such as `text_config`."""
    yield config
    for name, part in config.items():
        if isinstance(part, dict) and name not in ("id2label", "label2id"):
            yield from _nested_configs(part)
