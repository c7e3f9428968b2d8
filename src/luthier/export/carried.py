"""What a model's folder holds besides weights: tokenizer, template, configuration, stop tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

from luthier.export.serving import Spoken

SPEECH = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"),
    *("merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("chat_template.jinja", "chat.json"),
)
"""Files of a tokenizer and its template."""
TEMPLATES = "additional_chat_templates"
GENERATION = "generation_config.json"


def carry_speech(source: Path, target: Path) -> None:
    """Copy the tokenizer, its templates and the chat settings."""
    for name in SPEECH:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def carry_generation(base: Path, own: Path | None, target: Path, spoken: Spoken) -> None:
    """Write the generation config: the base's (or what was saved), with the stop tokens trained."""
    for folder in (own, base):
        if folder is not None and (folder / GENERATION).is_file():
            settings: dict[str, Any] = json.loads((folder / GENERATION).read_text("utf-8"))
            break
    else:
        settings = {}
    if spoken.stop_ids:
        settings["eos_token_id"] = (
            spoken.stop_ids if len(spoken.stop_ids) > 1 else spoken.stop_ids[0]
        )
    # Otherwise transformers would make it anew from config.json, which knows no stop tokens.
    settings.pop("_from_model_config", None)
    write_config(target / GENERATION, settings)


def write_config(file: Path, settings: dict[str, Any]) -> None:
    """Write a JSON configuration as transformers does."""
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def model_config(config: Any, architecture: str, dtype: str, rows: int | None, tied: bool) -> None:
    """Set in a `PretrainedConfig` what a merge changes."""
    config.architectures = [architecture]
    config.dtype = dtype
    if rows is not None:
        config.get_text_config().vocab_size = rows
    if not tied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
