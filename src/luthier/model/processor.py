"""The files of an image-text model's processor, which whoever saves the model carries along.

A run that trains text loads a tokenizer alone. Without the processor's settings beside the weights
the saved model could never be given an image again.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.config.schema import ModelConfig
from luthier.model import source

IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""The names of files with an image processor's settings; a model has one of them, or both."""
PROCESSOR_FILES = (
    *IMAGE_PROCESSOR_FILES,
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
"""The names that transformers' `AutoProcessor` looks for, besides the tokenizer's files."""


def find_processor_files(model: ModelConfig) -> tuple[Path, ...]:
    """Return the processor's files of a model; none where it has no processor.

    Those of a hub model that are not on this machine are fetched, where the hub can be reached.
    """
    folder = source.local_folder(model)
    if source.needs_hub(model.path):
        folder = _fetch_processor_files(model) or folder
    if folder is None:
        return ()
    return tuple(folder / name for name in PROCESSOR_FILES if (folder / name).is_file())


def has_other_inputs(config: Any) -> bool:
    """Return whether a model, by its `PretrainedConfig`, reads images or sound beside text."""
    return any(
        getattr(config, name, None) is not None for name in ("vision_config", "audio_config")
    )


def copy_processor_files(files: Iterable[Path], target: Path) -> None:
    """Copy a processor's files into the folder of a model; what is there already stays."""
    for file in files:
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


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
