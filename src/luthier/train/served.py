"""What makes others' servers read and stop as the training did, beside a saved adapter or model."""

import copy
from pathlib import Path
from typing import Any

from luthier.chat import ChatEncoder


def write_served(folder: Path, trainer: Any, encoder: ChatEncoder) -> None:
    """Write the training's template with the tokenizer, and its stop tokens.

    A tokenizer keeps its own template where the config names another; and the token that ends a
    turn is often none of the base's end tokens, or an adapter's folder has no generation config
    at all.
    """
    tokenizer = copy.copy(trainer.processing_class)
    tokenizer.chat_template = encoder.settings()["template"]
    tokenizer.save_pretrained(folder)
    if trainer.model.can_generate():  # a model that scores says nothing
        _write_stops(folder, trainer.model.generation_config, encoder, tokenizer.pad_token_id)


def _write_stops(folder: Path, base: Any, encoder: ChatEncoder, pad: int | None) -> None:
    """Write a generation config with the base's settings and the training's stop tokens."""
    config = copy.deepcopy(base)
    stops = encoder.stop_token_ids
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    more = [end for end in own if end is not None and end not in stops]
    config.eos_token_id = [*stops, *more]
    config.pad_token_id = pad
    # Not `save_pretrained`, which refuses settings that do not go together, the base's own among
    # them.
    config.to_json_file(folder / "generation_config.json")
