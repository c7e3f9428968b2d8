"""Which weights a model has: a hash of their files, which costs nothing the second time."""

import hashlib
import json
from pathlib import Path
from typing import Any

from luthier.model import source
from luthier.storage.cache import cache_root
from luthier.storage.manifest import hash_file

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf", "*.bin")
"""Files with weights; of the first pattern that has any."""


def identify_weights(path: str, revision: str | None) -> dict[str, Any]:
    """What identifies a model's weights: the path, the revision and its commit, and the hash."""
    files = find_weight_files(path, revision)
    commit = files[0].parent.name if files and source.needs_hub(path) else None
    return {
        "path": path,
        "revision": revision,
        "commit": commit,
        "weights_sha256": hash_files(files) if files else None,
        "files": [file.name for file in files],
    }


def find_weight_files(path: str, revision: str | None) -> list[Path]:
    """The files with a model's weights on this machine, sorted; none where they are not found."""
    packaged = source.find_gguf_file(path)
    if packaged is not None:
        return [packaged]
    folder = Path(path).expanduser() if source.is_local(path) else _snapshot(path, revision)
    return next((f for p in WEIGHT_PATTERNS if folder and (f := sorted(folder.glob(p)))), [])


def hash_files(files: list[Path]) -> str:
    """One SHA-256 of the names and contents of files."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{_hash_of(file)}\n".encode())
    return whole.hexdigest()


def _hash_of(file: Path) -> str:
    """The SHA-256 of a file: the one that is noted, if its place, size and time are the same."""
    real = file.resolve()
    state = real.stat()
    facts = [str(real), state.st_size, state.st_mtime_ns]
    name = hashlib.sha256(str(real).encode()).hexdigest()[:32]
    note = cache_root() / "hashes" / f"{name}.json"
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        if noted["file"] == facts:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = hash_file(real)
    _note(note, {"file": facts, "sha256": found})
    return found


def _note(note: Path, content: dict[str, Any]) -> None:
    from luthier.storage.atomic import write_json

    try:
        write_json(note, content)
    except OSError:
        return  # a cache that cannot be written to costs time, and no more


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub repository in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
