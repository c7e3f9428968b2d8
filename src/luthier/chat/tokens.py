"""Text -> token ids exactly as a server encodes it, with message text kept from becoming control.

The reference is `tokenizer(rendered_text, add_special_tokens=False)`, and transformers'
`sanitize_control_tokens=True` where message text holds control tokens: such a token is encoded as
plain text, and the text behind it as a continuation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from luthier.chat.provenance import FieldOrigin, OriginRun
from luthier.chat.types import ChatError, pack_ids, unpack_ids
from luthier.chat.word_cache import UNICODE_NORMALIZERS, WordEncoder, make_word_encoder

# Many texts encoded in few calls: a call of the backend has a cost of its own.

_GROUP_CHARS = 2000


def group_texts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups of a size that one call of the backend handles well."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size > _GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode_groups(
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


_CACHE_BYTES = 12_000_000
"""Bytes, about, of the texts whose ids are kept."""
_TEXT_OVERHEAD = 150
"""Bytes that a kept text takes besides its characters."""
PieceKind = Literal["start", "continuation", "reply", "literal", "words"]
"""How a piece stands in its sequence: at its start, behind a neutralised token, as a reply behind
its prompt, as the neutralised token itself, or as text alone in which nothing is a token."""


# Parts of a pattern whose match depends on what stands before it.
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGzZ]|(?<!\[)\^|\$")


class TextPiece(NamedTuple):
    """A stretch of text that is encoded on its own."""

    text: str
    kind: PieceKind


class TokenEncoder:
    """Encodes pieces of rendered text in batches."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.added: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._names = {index: token for token, index in self.added.items()}
        self._packed = {token: pack_ids([index]) for token, index in self.added.items()}
        self.special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self.pattern = compile_token_pattern(self.added)
        self._steps = steps = _preprocessing_steps(self.backend)
        self.free = all(map(_is_position_free, steps))
        """Whether a text's ids are the same at the start of a text and in its middle."""
        self.local = (
            self.free and _has_model(self.backend, "BPE") and any(map(_splits_words, steps))
        )
        """Whether text is split into words by what stands next to it alone."""
        self._newline = self._plain(["\n"])[0]
        self.splits = self.free and all(
            map(_is_exact_match_token, self.backend.get_added_tokens_decoder().values())
        )
        """Whether a text's ids are those of its parts, taken apart at its added tokens."""
        self._splitter = re.compile(f"({self.pattern.pattern})")
        self._firsts = frozenset(token[0] for token in self.added)
        self._cache: dict[str, bytes] = {}
        self._size = 0

    def encode(self, pieces: Iterable[TextPiece]) -> list[list[int]]:
        """The ids of each piece, encoded in one batch."""
        pieces = list(pieces)
        if self.splits and {piece.kind for piece in pieces} <= {"start", "reply"}:
            return self._encode_split([piece.text for piece in pieces])
        found: dict[TextPiece, list[int]] = {}
        plain = [piece for piece in pieces if self._is_plain(piece)]
        self._fill(found, plain, "")
        continued = [p for p in pieces if p.kind in ("continuation", "reply") and p not in found]
        self._fill(found, continued, "\n")
        for piece in pieces:
            if piece not in found:
                found[piece] = self._as_text(piece)
        return [found[piece] for piece in pieces]

    def _encode_split(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, taken apart at their added tokens as the backend takes them apart.

        What stands between the tokens is encoded once, however often it comes.
        """
        split = [self._splitter.split(text) for text in texts]
        known = self.known([part for parts in split for part in parts[::2]])
        ids = [
            [self.token(part) if place % 2 else known[part] for place, part in enumerate(parts)]
            for parts in split
        ]
        return [unpack_ids(b"".join(parts)) for parts in ids]

    def token(self, token: str) -> bytes:
        """The packed id of an added token."""
        return self._packed[token]

    def parted(self, text: str) -> list[str]:
        """The text taken apart at its added tokens: a text, a token, a text, ..., a text."""
        return self._splitter.split(text)

    def known(self, texts: list[str]) -> Mapping[str, bytes]:
        """The packed ids of texts without added tokens, for a tokenizer that `splits`."""
        cache = self._cache
        new = {text: None for text in texts if text not in cache}
        self._size += _cached_bytes(new)
        if self._size > _CACHE_BYTES:
            cache.clear()
            new = dict.fromkeys(texts)
            self._size = _cached_bytes(new)
        if new:
            cache.update(self._new(list(new)))
        return cache

    def _new(self, texts: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each text with its packed ids."""
        words = self._words
        if words is not None:
            plain = [text for text in texts if text.isascii()]
            yield from zip(plain, words.encode(plain), strict=True)
            texts = [text for text in texts if not text.isascii()]
        yield from zip(texts, map(pack_ids, self._joined(texts)), strict=True)

    @cached_property
    def _words(self) -> WordEncoder | None:
        """What encodes ASCII word by word, if that gives what the backend gives."""
        return make_word_encoder(self.backend, self._steps)

    def holds_token(self, text: str) -> bool:
        """Whether an added token stands in the text."""
        return any(first in text for first in self._firsts) and bool(self.pattern.search(text))

    def may_end_in_token(self, text: str) -> bool:
        """Whether the text ends as an added token begins."""
        heads, _ = self._edges
        return any(text[start:] in heads for start in range(len(text)))

    def may_begin_in_token(self, text: str) -> bool:
        """Whether the text begins as an added token ends."""
        _, tails = self._edges
        return any(text[:stop] in tails for stop in range(1, len(text) + 1))

    @cached_property
    def _edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """The beginnings and the ends of added tokens, whole tokens aside."""
        parts = [(token[:cut], token[cut:]) for token in self.added for cut in range(1, len(token))]
        return frozenset(head for head, _ in parts), frozenset(tail for _, tail in parts)

    def _joined(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without added tokens: several go in one, with a token between them."""
        if not self.added:
            return self._plain(texts)
        index = min(self.added.values())
        return encode_groups(list(group_texts(texts)), self._names[index], index, self._plain)

    def _is_plain(self, piece: TextPiece) -> bool:
        return piece.kind == "start" or (piece.kind == "reply" and self.free)

    def _fill(
        self, found: dict[TextPiece, list[int]], pieces: list[TextPiece], before: str
    ) -> None:
        """Encode pieces behind `before`, whose ids are taken off again.

        SentencePiece puts a space before the start of a text; behind a newline it does not. Where
        the newline merges with the piece, the piece is encoded alone (so does transformers).
        """
        new = list(dict.fromkeys(pieces))
        encoded = self._plain([before + piece.text for piece in new])
        merged = []
        for piece, ids in zip(new, encoded, strict=True):
            if not before:
                found[piece] = ids
            elif ids[: len(self._newline)] == self._newline:
                found[piece] = ids[len(self._newline) :]
            else:
                merged.append(piece)
        for piece, ids in zip(merged, self._plain([p.text for p in merged]), strict=True):
            found[piece] = ids

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of whole texts, added tokens and all."""
        if not texts:
            return []
        backend = self.backend
        # The backend is the tokenizer's own and others may have left their settings on it.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def starts(self, piece: TextPiece) -> list[int]:
        """Where each token of a piece starts in it; about, for people to look at."""
        if piece.kind in ("literal", "words"):
            return [0] * len(self._as_text(piece))
        before = "" if self._is_plain(piece) else "\n"
        encoding = self.backend.encode(before + piece.text, add_special_tokens=False)
        ids, skip = encoding.ids, 0
        if before and ids[: len(self._newline)] == self._newline:
            skip = len(self._newline)
        elif before:
            return self.starts(TextPiece(piece.text, "start"))
        return [max(start - len(before), 0) for start, _ in encoding.offsets[skip:]]

    def _as_text(self, piece: TextPiece) -> list[int]:
        """The ids of text in which added tokens are no tokens."""
        if piece.kind == "words":
            return list(self.tokenizer._encode_without_added_tokens(piece.text))
        return self._literal(piece.text)

    def _literal(self, text: str) -> list[int]:
        """The ids of a control token's text as plain text."""
        encode = self.tokenizer._encode_without_added_tokens
        ids = encode("\n" + text)
        ahead = ids[: len(self._newline)] == self._newline
        ids = ids[len(self._newline) :] if ahead else encode(text)
        if self.added[text] in ids:
            raise ChatError(
                f"{text!r} stands in the row's text, and this tokenizer makes the control token "
                "of it even as plain text; remove it from the row",
                reason="cannot be neutralised",
            )
        return list(ids)


def _cached_bytes(texts: Iterable[str]) -> int:
    """About the bytes that texts take that are kept."""
    return sum(len(text) + _TEXT_OVERHEAD for text in texts)


def _is_exact_match_token(token: Any) -> bool:
    """Whether an added token is found wherever its text stands, and takes nothing around it."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def compile_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def list_control_tokens(tokenizer: Any, source: str) -> frozenset[str]:
    """The added tokens that message text must not become, for a template.

    These are transformers' own: special tokens, and added tokens that stand in the template's
    text, or those that the tokenizer lists itself (`chat_control_tokens`).
    """
    return frozenset(tokenizer._get_control_tokens(source))


def _preprocessing_steps(backend: Any) -> list[dict[str, Any]]:
    """The steps that a backend takes before its model."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    states = [json.loads(part.__getstate__()) for part in parts if part is not None]
    return [step for state in states for step in _flatten_step(state)]


def _flatten_step(step: dict[str, Any]) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [flat for child in inner for flat in _flatten_step(child)] if inner else [step]


def _has_model(backend: Any, kind: str) -> bool:
    return type(backend.model).__name__ == kind


def _is_position_free(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", False)
    if step["type"] == "Split":
        return not _LOOKS_BACK.search(step["pattern"].get("Regex", ""))
    return step["type"] in UNICODE_NORMALIZERS | {"Digits", "Punctuation"}


def _splits_words(step: dict[str, Any]) -> bool:
    """Whether a step splits text into words."""
    return step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"])


def origin_spans(runs: Iterable[OriginRun]) -> Iterator[tuple[int, int, FieldOrigin | None]]:
    """Where each stretch of one origin starts and ends, and its origin."""
    begin = position = 0
    current: FieldOrigin | None = None
    for length, origin, _ in runs:
        if origin is not current:
            if begin < position:
                yield begin, position, current
            begin, current = position, origin
        position += length
    if begin < position:
        yield begin, position, current
