"""Rows of the embeddings that an adapter's new tokens need, told without loading anything."""

import json
from pathlib import Path

from luthier.model import gguf, source
from luthier.model.artifact import Artefact
from luthier.storage.sizes import head_of

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "word_embeddings.weight")


def needed(folder: Path) -> int:
    """The rows that an adapter's saved tensors go up to; 0 where it trained none."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    given = config.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    ends = [max(ids) + 1 for ids in lists if ids]
    tensors = head_of(folder / "adapter_model.safetensors").tensors
    wholes = [one["shape"][0] for name, one in tensors.items() if name.endswith(_EMBEDDINGS)]
    return max([0, *ends, *wholes])


def grown(artefact: Artefact) -> int | None:
    """The rows that a base must be given before its adapter goes on; None where it has enough."""
    if artefact.adapter is None:
        return None
    rows = needed(artefact.adapter)
    have = _rows_of_base(artefact.base.path)
    return rows if have is not None and rows > have else None


def _rows_of_base(path: str) -> int | None:
    file = source.gguf_file(path)
    if file is not None:
        config = gguf.convert(file) / "config.json"
    elif source.is_local(path):
        config = Path(path).expanduser() / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
        config = Path(found) if isinstance(found, str) else Path("config.json-is-not-here")
    if not config.is_file():
        return None
    content = json.loads(config.read_text(encoding="utf-8"))
    rows = (content.get("text_config") or content).get("vocab_size")
    return int(rows) if rows else None
