"""The files of an image-text model's processor, which whoever saves the model carries along.

A run that trains text loads a tokenizer alone. Without the processor's settings beside the weights
the saved model could never be given an image again.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from luthier.config.schema import ModelConfig
from luthier.model import source
from luthier.storage.typed_files import load_json, parse_json

IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""The names of files with an image processor's settings; a model has one of them, or both."""
PROCESSOR_FILES = (
    *IMAGE_PROCESSOR_FILES,
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
"""The names that transformers' `AutoProcessor` looks for, besides the tokenizer's files."""


class ProcessorFile(NamedTuple):
    """A file of a processor by its name, with the settings of `model.processor` in it."""

    name: str
    content: bytes


_OLD_SIZES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Names in older files of processors, and the keys of `size` that took their place."""


def find_processor_files(model: ModelConfig) -> tuple[ProcessorFile, ...]:
    """Return the processor's files of a model; none where it has no processor.

    Those of a hub model that are not on this machine are fetched, where the hub can be reached.
    Raises UserError for a file whose settings `model.processor` changes and that cannot be read.
    """
    folder = source.local_folder(model)
    if source.needs_hub(model.path):
        folder = _fetch_processor_files(model) or folder
    if folder is None:
        return ()
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    return tuple(ProcessorFile(file.name, _read_changed(file, model.processor)) for file in files)


def read_image_settings(content: Mapping[str, Any]) -> Any:
    """Return the image processor's settings of a processor's file: they may stand under a key."""
    # transformers 5 nests them in processor_config.json; preprocessor_config.json is theirs alone.
    return content.get("image_processor", content)


def find_processor_changes(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Return the settings of an image processor in a saved folder that its base has otherwise."""
    changes: dict[str, Any] = {}
    if not any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES):
        return changes
    for file in find_processor_files(model):
        saved = folder / file.name
        if file.name in IMAGE_PROCESSOR_FILES and saved.is_file():
            base = read_image_settings(parse_json(file.name, file.content, dict[str, Any]))
            settings = read_image_settings(load_json(saved, dict[str, Any]))
            changes |= {
                key: value
                for key, value in settings.items()
                if base.get(key) != value and not key.endswith(("_type", "_class"))
            }
    return changes


def merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image processor's settings with some changed, within mappings key by key."""
    merged = dict(settings)
    if "size" in changes:
        # transformers 5.23: the older names, which files of Qwen2-VL have, win over `size`.
        old = {edge: merged.pop(name) for name, edge in _OLD_SIZES.items() if name in merged}
        merged["size"] = {**(merged.get("size") or {}), **old}
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = merge_settings(before, value)
        merged[key] = value
    return merged


def _read_changed(file: Path, changes: Mapping[str, Any]) -> bytes:
    """Return the content of a processor's file with changed settings of the image processor."""
    content = file.read_bytes()
    if not changes or file.name not in IMAGE_PROCESSOR_FILES:
        return content
    values = load_json(file, dict[str, Any])
    if file.name == "processor_config.json" and "image_processor" not in values:
        return content
    settings = merge_settings(read_image_settings(values), changes)
    values = {**values, "image_processor": settings} if "image_processor" in values else settings
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def has_other_inputs(config: Any) -> bool:
    """Return whether a model, by its `PretrainedConfig`, reads images or sound beside text."""
    return any(
        getattr(config, name, None) is not None for name in ("vision_config", "audio_config")
    )


def copy_processor_files(files: Iterable[ProcessorFile], target: Path) -> None:
    """Write a processor's files into the folder of a model; what is there already stays."""
    for file in files:
        if not (target / file.name).exists():
            (target / file.name).write_bytes(file.content)


def _fetch_processor_files(model: ModelConfig) -> Path | None:
    """Return the cached folder of a hub model with its processor's files; None where it fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=list(PROCESSOR_FILES),
                local_files_only=source.is_hub_unreachable(),
            )
        )
    except Exception:  # the HTTP client has its own errors; the model itself is here by now
        return None
