"""Fingerprints: 16 bytes that tell whether two examples are equal, and the rows to keep.

An example is a dict of JSON values. Its canonical JSON has sorted keys, no white space and nothing
but ASCII, so it is the same in any process and holds any text, half surrogate pairs included.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

FINGERPRINT_BYTES = 16
"""Bytes of a fingerprint: among 10 million rows, two share one by chance once in 10^24 runs."""

Fingerprints = NDArray[np.bytes_]
"""Fingerprints as an array of `S16`. Keep it an array: numpy cuts zero bytes off single items."""

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


_REFERENCE_KEYS = {"sha256", "width", "height", "source"}
"""The keys of a reference to an image (`luthier.data.images.reader.ImageRef`)."""
_REFERENCE_MARK = '"sha256":"'


def _without_sources(value: Any) -> Any:
    """Return the value with references to images that are equal where their bytes are."""
    if isinstance(value, dict):
        if value.keys() == _REFERENCE_KEYS:
            return {"sha256": value["sha256"]}
        return {key: _without_sources(item) for key, item in value.items()}
    return [_without_sources(item) for item in value] if isinstance(value, list) else value


_encode_in_order = json.JSONEncoder(separators=(",", ":")).encode


def encode_json(example: Mapping[str, Any]) -> bytes:
    """Return the example's JSON without white space, its keys in their own order."""
    return _encode_in_order(example).encode()


def canonical_json(example: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Return the example's canonical JSON and its fingerprint, which is the BLAKE2b of that
    JSON."""
    text = _encode(example)
    # References to images are rare; their sources say nothing of whether two rows are equal.
    if _REFERENCE_MARK in text:
        text = _encode(_without_sources(example))
    data = text.encode()
    return data, blake2b(data, digest_size=FINGERPRINT_BYTES).digest()


def fingerprint(example: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that are the same for equal examples, whatever the order of their keys."""
    return canonical_json(example)[1]


def normalised_fingerprint(example: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that do not change with case, white space or Unicode form of the texts.

    Texts are compared in Unicode's NFKC form with case folded, white space at their ends removed
    and runs of it made one space. Numbers, truth values and the structure count as they are.
    """
    texts: list[str] = []
    _collect_texts(example, texts)
    # NUL keeps the texts of neighbouring fields apart; no text of a row is likely to hold it.
    text = _fold_text("\0".join(texts))
    text = " ".join(text.split()).replace(" \0", "\0").replace("\0 ", "\0")
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=FINGERPRINT_BYTES).digest()


def pack_fingerprints(prints: Iterable[bytes]) -> Fingerprints:
    """Return fingerprints of 16 bytes each as an array."""
    return np.frombuffer(b"".join(prints), dtype=f"S{FINGERPRINT_BYTES}")


def is_first_occurrence(prints: Fingerprints) -> NDArray[np.bool_]:
    """Return True for the rows to keep: the first of equal ones, wherever the others stand."""
    keep = np.zeros(len(prints), dtype=bool)
    # np.unique sorts stably where it gives indices, so each is that of the first of equal rows.
    keep[np.unique(prints, return_index=True)[1]] = True
    return keep


def _fold_text(text: str) -> str:
    """Return a text case-folded and in NFKC; folding can undo the form, so it is taken twice."""
    # ASCII is in NFKC already; most texts take this way, which is far shorter.
    if text.isascii():
        return text.lower()
    return normalize("NFKC", normalize("NFKC", text).casefold())


def _collect_texts(value: Any, texts: list[str]) -> None:
    """Append the texts of a value, with marks that no text begins with for all that is not text."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        texts.append("\1{")
        if value.keys() == _REFERENCE_KEYS:
            value = _without_sources(value)
        for key in sorted(value):
            texts.append(key)
            _collect_texts(value[key], texts)
        texts.append("\1}")
    elif isinstance(value, list):
        texts.append("\1[")
        for item in value:
            _collect_texts(item, texts)
        texts.append("\1]")
    else:
        texts.append("\1" + _encode(value))
