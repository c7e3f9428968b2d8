"""The identity of a model's weights: a hash of their files, noted so that it is counted once."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.model import source
from luthier.model.model_files import WEIGHT_PATTERNS
from luthier.storage.atomic import write_json
from luthier.storage.cache import cache_root
from luthier.storage.manifest import hash_file


def identify_weights(path: str, revision: str | None) -> dict[str, Any]:
    """Return the identity of a model's weights: path, revision with its commit, hash and files.

    Commit and hash are None where the files are not on this machine.
    """
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
    """Return the files with a model's weights on this machine, sorted; none if they are absent."""
    packaged = source.find_gguf_file(path)
    if packaged is not None:
        return [packaged]
    if source.is_local(path):
        folder = Path(path).expanduser()
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return next((f for p in WEIGHT_PATTERNS if (f := sorted(folder.glob(p)))), [])


def hash_files(files: list[Path]) -> str:
    """Return one SHA-256 of the names and contents of files."""
    combined = hashlib.sha256()
    for file in files:
        combined.update(f"{file.name}\0{_noted_hash(file)}\n".encode())
    return combined.hexdigest()


def _noted_hash(file: Path) -> str:
    """Return the SHA-256 of a file: the noted one if its path, size and time are the same."""
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
    sha256 = hash_file(real)
    # A cache that cannot be written to costs time, and no more.
    with suppress(OSError):
        write_json(note, {"file": facts, "sha256": sha256})
    return sha256
