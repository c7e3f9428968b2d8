"""The key of encoded rows: a hash of all that decides them, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ENCODING_VERSION = 2
"""Raise it when the same sources, settings and tokenizer give other rows than before."""


def cache_key(parts: Mapping[str, Any]) -> str:
    """64 hex digits: the SHA-256 of these JSON values and luthier's encoding version.

    The order of keys does not count; TypeError or ValueError for what is not JSON.
    """
    values = {"encoding_version": ENCODING_VERSION, "parts": parts}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A SHA-256 of what decides a fast tokenizer's ids: the same wherever its files lie.

    Takes in the whole backend (vocabulary, merges, added tokens, normalizer, pre-tokenizer,
    post-processor), the special tokens that a template may write, and whether they are parsed in
    text; not the template, names, lengths, or the truncation and padding of the last call.
    """
    digest = hashlib.sha256()
    for part in _without_last_call(tokenizer.backend_tokenizer.to_str()):
        digest.update(part.encode())
    facts = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _without_last_call(backend: str) -> tuple[str, str]:
    """The backend's JSON without `truncation` and `padding`, which every call of it may change.

    They stand in front, before the tokens; only that part is parsed, as the rest has megabytes.
    """
    head, mark, tokens = backend.partition(',"added_tokens":')
    facts = json.loads(head + "}")
    return json.dumps({k: v for k, v in facts.items() if k not in ("truncation", "padding")}), (
        mark + tokens
    )
