"""Many texts encoded in few calls: a call of the backend has a cost of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

_GROUP = 2000


def grouped_texts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups of a size that one call of the backend handles well."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size > _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def parted_ids(
    groups: list[list[str]], token: str, index: int, encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """The ids of each text, from those of each group joined by a token of the given index."""
    found = []
    for group, ids in zip(groups, encode(list(map(token.join, groups))), strict=True):
        start = 0
        for _ in group[1:]:
            stop = ids.index(index, start)
            found.append(ids[start:stop])
            start = stop + 1
        found.append(ids[start:])
    return found


def without_normalizer(
    backend: Any,
) -> tuple[Callable[[list[str]], list[list[int]]], int] | None:
    """How to encode ASCII with the same model but no normal form, and the index of its one token.

    None where the backend's normalizer may change ASCII, or there is none to leave out.
    """
    added = backend.get_added_tokens_decoder()
    normalizer = backend.normalizer
    if not added or normalizer is None:
        return None
    forms = flat_steps(json.loads(normalizer.__getstate__()))
    if not all(form["type"] in ("NFC", "NFD", "NFKC", "NFKD") for form in forms):
        return None
    token = added[min(added)]
    quick = type(backend)(backend.model)
    quick.pre_tokenizer = backend.pre_tokenizer
    quick.add_special_tokens([token])

    def encode(texts: list[str]) -> list[list[int]]:
        encodings = quick.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode, quick.token_to_id(token.content)


def flat_steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [flat for child in inner for flat in flat_steps(child)] if inner else [part]
