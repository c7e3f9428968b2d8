"""A model as names and shapes: what a merge needs to know, without a byte of weights."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.library_settings import QuantizationSettings
from luthier.errors import UserError
from luthier.model import gguf, quantized, source
from luthier.model.artifact import Artifact
from luthier.model.load import insert_quantized_layers, label_settings
from luthier.model.model_class import build_empty_model
from luthier.model.model_files import read_adapter_config, read_config_file
from luthier.storage.sizes import read_safetensors_header


class NeedsMemoryMerge(Exception):
    """This adapter is not one that can be merged tensor by tensor; the text says why."""


@dataclass(frozen=True)
class ModelLayout:
    """The model that comes out, before any row of its embeddings is added."""

    config: Any
    """Its `PretrainedConfig`."""
    architecture: str
    """The name of its class."""
    base_architectures: list[str]
    """The classes that the base's config.json names."""
    shapes: dict[str, tuple[int, ...]]
    """Every weight that is saved, by name; of tied ones each name."""
    tied: dict[str, str]
    """A second name -> the first name of the same matrix."""
    transposed: frozenset[str]
    """Layers that keep their matrices as (inputs, outputs): GPT-2's Conv1D, gpt-oss' experts."""
    packed: frozenset[str]
    """Weights that the run's quantization packs: of linear layers, and of experts."""
    inputs: str
    """The weight of the input embeddings."""
    model: Any
    """The model itself, on torch's meta device, as transformers builds it."""


def base_folder(artifact: Artifact) -> Path:
    """Return the local folder of the base's weights, fetched from the hub where there is none.

    Raises UserError where it cannot be had.
    """
    model = artifact.base
    file = source.find_gguf_file(model.path)
    if file is not None:
        return gguf.convert_model(file)
    if source.is_local(model.path):
        return Path(model.path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                local_files_only=source.is_hub_unreachable(),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(source.hub_error_message(error, model.path, "its base")) from error


def layout_of(artifact: Artifact, folder: Path) -> ModelLayout:
    """Build the model on torch's meta device from the base's config.json and look at it."""
    from transformers.pytorch_utils import Conv1D

    config = _load_base_config(artifact, folder)
    empty = build_empty_model(config, artifact.task, artifact.base.trust_remote_code)
    # Tied weights are one object under two names, and named_parameters leaves out the second name
    # unless it is told not to.
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in parameters.items():
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    transposed = frozenset(
        name
        for name, module in empty.named_modules()
        # The attribute is that of transformers' experts; peft asks for it, too.
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    )
    inputs = empty.get_input_embeddings()
    return ModelLayout(
        config,
        type(empty).__name__,
        list(config.architectures or []),
        {name: tuple(value.shape) for name, value in empty.state_dict().items()},
        tied,
        transposed,
        # The layers go in place of the model's own, which are still needed.
        _find_packed_weights(copy.deepcopy(empty), artifact.quantization),
        next(f"{name}.weight" for name, module in empty.named_modules() if module is inputs),
        empty,
    )


def _load_base_config(artifact: Artifact, folder: Path) -> Any:
    from transformers import AutoConfig

    if artifact.base.loader is not None:
        raise NeedsMemoryMerge("model.loader loads its base")
    if quantized.read_quantization_config(artifact.base) is not None:
        # The tensors of such files are packed codes and scales: only the model's own layers unpack
        # them.
        raise NeedsMemoryMerge("its base comes quantized")
    return AutoConfig.from_pretrained(
        folder, trust_remote_code=artifact.base.trust_remote_code, **label_settings(artifact)
    )


def _find_packed_weights(model: Any, quantization: QuantizationSettings) -> frozenset[str]:
    """Return the weights that would be packed while loading: transformers chooses them."""
    if quantization.bits is None:
        return frozenset()
    from bitsandbytes.nn import Int8Params, Params4bit

    # The packed layers are put in as for a training, so what that skips (the head, for one) is
    # skipped here too.
    insert_quantized_layers(model, quantization)
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, Int8Params | Params4bit)
    )


# Rows of the embeddings that an adapter's new tokens need. They are read from the headers and the
# configuration, so that a card can name them without loading the model.

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "word_embeddings.weight")


def embedding_rows_needed(folder: Path) -> int:
    """Return how many rows of embeddings an adapter reaches up to; 0 where it trained none."""
    config = read_adapter_config(folder) or {}
    indices = config.get("trainable_token_indices") or []
    # peft takes a list for the input embeddings, or a dictionary of lists by layer.
    lists = indices.values() if isinstance(indices, dict) else [indices]
    ends = [max(ids) + 1 for ids in lists if ids]
    tensors = read_safetensors_header(folder / "adapter_model.safetensors").tensors
    wholes = [tensor["shape"][0] for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS)]
    return max([0, *ends, *wholes])


def grown_shapes(artifact: Artifact) -> int | None:
    """Return the rows that a base needs before its adapter goes on; None where it has enough."""
    if artifact.adapter is None:
        return None
    rows = embedding_rows_needed(artifact.adapter)
    have = _count_base_rows(artifact.base.path)
    return rows if have is not None and rows > have else None


def _count_base_rows(path: str) -> int | None:
    file = source.find_gguf_file(path)
    if file is not None:
        config = gguf.convert_model(file) / "config.json"
    elif source.is_local(path):
        config = Path(path).expanduser() / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json")
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    content = read_config_file(config)
    # Without a configuration at hand nothing is known, and nothing is fetched only to tell it.
    if content is None:
        return None
    # A multimodal model keeps the vocabulary in the configuration of its language model.
    rows = (content.get("text_config") or content).get("vocab_size")
    return int(rows) if rows else None
