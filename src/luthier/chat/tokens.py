"""Text -> token ids exactly as a server encodes it, with message text kept from becoming control.

The reference is `tokenizer(rendered_text, add_special_tokens=False)`, and transformers'
`sanitize_control_tokens=True` where message text holds control tokens: such a token is encoded as
plain text, and the text behind it as a continuation. Shortcuts (parts encoded once, ASCII word by
word) are taken only for tokenizers in which they cannot change an id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from luthier.chat.types import ChatError, pack_ids, unpack_ids
from luthier.chat.word_cache import UNICODE_NORMALIZERS, WordEncoder, make_word_encoder

_GROUP_CHARS = 2000
"""Characters of texts that go to the backend in one: each of its calls has a cost of its own."""
_CACHE_BYTES = 12_000_000
"""Bytes, about, of the texts whose ids are cached."""
_TEXT_OVERHEAD = 150
"""Bytes that a cached text takes besides its characters."""
PieceKind = Literal["start", "continuation", "reply", "literal", "plain text"]
"""How a piece stands in its sequence: at its start, behind a literal token, as a reply behind its
prompt, as the literal token itself, or as text alone in which nothing is a token."""
# Parts of a pattern whose match depends on what stands before it.
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGzZ]|(?<!\[)\^|\$")


class TextPiece(NamedTuple):
    """A stretch of text that is encoded on its own."""

    text: str
    kind: PieceKind
    before: str = ""
    """What stands in front of a reply, from the last token on, where that decides its ids."""


class TokenEncoder:
    """Encodes pieces of rendered text in batches."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.added: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._names = {index: token for token, index in self.added.items()}
        self.token_ids = {token: pack_ids([index]) for token, index in self.added.items()}
        self.special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self.pattern = compile_token_pattern(self.added)
        self._steps = steps = _preprocessing_steps(self.backend)
        self.is_position_free = all(map(_is_position_free, steps))
        """Whether a text's ids are the same at the start of a text and in its middle."""
        self._is_bpe = type(self.backend.model).__name__ == "BPE"
        self.splits_words_locally = (
            self.is_position_free and self._is_bpe and any(map(_splits_words, steps))
        )
        """Whether text is split into words by what stands next to it alone."""
        self._newline = self._encode_texts(["\n"])[0]
        self.is_splittable = self.is_position_free and all(
            map(_is_exact_match_token, self.backend.get_added_tokens_decoder().values())
        )
        """Whether a text's ids are those of its parts, taken apart at its added tokens."""
        self.split_at_tokens = re.compile(f"({self.pattern.pattern})").split
        """Takes a text apart at its added tokens: a text, a token, a text, ..., a text."""
        self._firsts = frozenset(token[0] for token in self.added)
        self._cache: dict[str, bytes] = {}
        self._cache_size = 0

    def encode(self, pieces: Iterable[TextPiece]) -> list[list[int]]:
        """Return the ids of each piece, encoded in one batch."""
        pieces = list(pieces)
        if self.is_splittable and {piece.kind for piece in pieces} <= {"start", "reply"}:
            return self._encode_split([piece.text for piece in pieces])
        ids: dict[TextPiece, list[int]] = {}
        self._encode_behind_headers([piece for piece in pieces if piece.before], ids)
        free = [piece for piece in pieces if piece not in ids and self._starts_freely(piece)]
        self._encode_behind("", free, ids)
        continued = [p for p in pieces if p.kind in ("continuation", "reply") and p not in ids]
        self._encode_behind("\n", continued, ids)
        for piece in pieces:
            if piece not in ids:
                ids[piece] = self._encode_as_text(piece)
        return [ids[piece] for piece in pieces]

    def _encode_split(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts, taken apart at their added tokens as the backend does it.

        What stands between the tokens is encoded once, however often it comes.
        """
        # Of each split every second piece is a token.
        split = [self.split_at_tokens(text) for text in texts]
        plain_ids = self.encode_plain([text for pieces in split for text in pieces[::2]])
        token_ids = self.token_ids
        return [
            unpack_ids(
                b"".join(
                    token_ids[piece] if number % 2 else plain_ids[piece]
                    for number, piece in enumerate(pieces)
                )
            )
            for pieces in split
        ]

    def encode_plain(self, texts: list[str]) -> Mapping[str, bytes]:
        """Return the packed ids of texts without added tokens; `is_splittable` must hold.

        The mapping is the cache: it holds at least these texts until the next call.
        """
        cache = self._cache
        new = {text: None for text in texts if text not in cache}
        self._cache_size += _cached_bytes(new)
        # All goes at once, so that nothing need be counted for each text.
        if self._cache_size > _CACHE_BYTES:
            cache.clear()
            new = dict.fromkeys(texts)
            self._cache_size = _cached_bytes(new)
        if new:
            cache.update(self._encode_new(list(new)))
        return cache

    def _encode_new(self, texts: list[str]) -> Iterator[tuple[str, bytes]]:
        """Return each text with its packed ids."""
        if self._word_encoder is not None:
            ascii_texts = [text for text in texts if text.isascii()]
            yield from zip(ascii_texts, self._word_encoder.encode(ascii_texts), strict=True)
            texts = [text for text in texts if not text.isascii()]
        yield from zip(texts, map(pack_ids, self._encode_joined(texts)), strict=True)

    @cached_property
    def _word_encoder(self) -> WordEncoder | None:
        """What encodes ASCII word by word, if that gives what the backend gives."""
        return make_word_encoder(self.backend, self._steps)

    def holds_token(self, text: str) -> bool:
        """Return whether an added token stands in the text."""
        return any(first in text for first in self._firsts) and bool(self.pattern.search(text))

    def may_end_in_token(self, text: str) -> bool:
        """Return whether the text ends as an added token begins."""
        heads, _ = self._edges
        return any(text[start:] in heads for start in range(len(text)))

    def may_begin_in_token(self, text: str) -> bool:
        """Return whether the text begins as an added token ends."""
        _, tails = self._edges
        return any(text[:stop] in tails for stop in range(1, len(text) + 1))

    @cached_property
    def _edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """The beginnings and the ends of added tokens, whole tokens aside."""
        edges = [(token[:cut], token[cut:]) for token in self.added for cut in range(1, len(token))]
        return frozenset(head for head, _ in edges), frozenset(tail for _, tail in edges)

    def _encode_joined(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts without added tokens, joined by a token in few calls."""
        if not self.added:
            return self._encode_texts(texts)
        # Any added token does: none stands in these texts, and the backend cuts there first.
        index = min(self.added.values())
        token = self._names[index]
        groups = list(group_texts(texts))
        ids: list[list[int]] = []
        encoded = self._encode_texts([token.join(group) for group in groups])
        for group, group_ids in zip(groups, encoded, strict=True):
            start = 0
            for _ in group[1:]:
                stop = group_ids.index(index, start)
                ids.append(group_ids[start:stop])
                start = stop + 1
            ids.append(group_ids[start:])
        return ids

    def _starts_freely(self, piece: TextPiece) -> bool:
        """Return whether the piece is encoded as a text of its own."""
        return piece.kind == "start" or (piece.kind == "reply" and self.is_position_free)

    def header_before_reply(self, header: str) -> str:
        """Return the header where it decides how a reply behind it begins, else nothing.

        `header`: what stands in front of the reply, from the last added token on. Where text stands
        behind that token, BPE that merges nothing across the boundary gives the reply the ids that
        it has behind any other text.
        """
        if self.is_splittable:
            return ""
        is_bare = not self.pattern.sub("", header, count=1).strip()
        return header if is_bare or not self._is_bpe else ""

    def _encode_behind_headers(
        self, pieces: list[TextPiece], ids: dict[TextPiece, list[int]]
    ) -> None:
        """Encode replies with what stands in front of them, and note those that it leaves alone.

        A token may take the white space behind it (Phi-3), and text behind a token may gain a
        SentencePiece space: where the ids of both together begin with those of the first, the rest
        is the reply. Elsewhere the two merge, and a model cannot generate what they merge to.
        """
        new = list(dict.fromkeys(pieces))
        headers = list(dict.fromkeys(piece.before for piece in new))
        header_ids = dict(zip(headers, self._encode_texts(headers), strict=True))
        together = self._encode_texts([piece.before + piece.text for piece in new])
        for piece, both in zip(new, together, strict=True):
            size = len(header_ids[piece.before])
            if both[:size] == header_ids[piece.before]:
                ids[piece] = both[size:]

    def _encode_behind(
        self, before: str, pieces: list[TextPiece], ids: dict[TextPiece, list[int]]
    ) -> None:
        """Encode pieces behind `before`, whose ids are taken off again, and note them in `ids`.

        SentencePiece puts a space before the start of a text; behind a newline it does not. Where
        the newline merges with the piece, the piece is encoded alone (so does transformers).
        """
        new = list(dict.fromkeys(pieces))
        encoded = self._encode_texts([before + piece.text for piece in new])
        merged = []
        for piece, piece_ids in zip(new, encoded, strict=True):
            if not before:
                ids[piece] = piece_ids
            elif piece_ids[: len(self._newline)] == self._newline:
                ids[piece] = piece_ids[len(self._newline) :]
            else:
                merged.append(piece)
        ids.update(zip(merged, self._encode_texts([p.text for p in merged]), strict=True))

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of whole texts, added tokens and all."""
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

    def token_starts(self, piece: TextPiece) -> list[int]:
        """Return where each token of a piece starts in it; about, for people to look at."""
        if piece.kind in ("literal", "plain text"):
            return [0] * len(self._encode_as_text(piece))
        if piece.before:
            encoding = self.backend.encode(piece.before + piece.text, add_special_tokens=False)
            (header_ids,) = self._encode_texts([piece.before])
            size, length = len(header_ids), len(piece.before)
            if encoding.ids[:size] == header_ids:
                return [max(start - length, 0) for start, _ in encoding.offsets[size:]]
        before = "" if self._starts_freely(piece) else "\n"
        encoding = self.backend.encode(before + piece.text, add_special_tokens=False)
        ids, skip = encoding.ids, 0
        if before and ids[: len(self._newline)] == self._newline:
            skip = len(self._newline)
        elif before:
            return self.token_starts(TextPiece(piece.text, "start"))
        return [max(start - len(before), 0) for start, _ in encoding.offsets[skip:]]

    def decode_reply(self, ids: list[int]) -> str:
        """Return the text of ids that stand behind a prompt, control tokens and all."""
        # SentencePiece drops the space in front of the first token, so another one stands there.
        before = self._newline
        together, alone = (
            self.tokenizer.decode(
                each, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            for each in ([*before, *ids], before)
        )
        return str(together[len(alone) :])

    def _encode_as_text(self, piece: TextPiece) -> list[int]:
        """Return the ids of text in which added tokens are no tokens."""
        if piece.kind == "plain text":
            return list(self.tokenizer._encode_without_added_tokens(piece.text))
        return self._encode_literal(piece.text)

    def _encode_literal(self, text: str) -> list[int]:
        """Return the ids of a control token's text as plain text."""
        encode = self.tokenizer._encode_without_added_tokens
        # Behind a newline, as transformers encodes it: alone it would gain a SentencePiece space.
        ids = encode("\n" + text)
        is_separate = ids[: len(self._newline)] == self._newline
        ids = ids[len(self._newline) :] if is_separate else encode(text)
        if self.added[text] in ids:
            raise ChatError(
                f"{text!r} is in the row's text, and this tokenizer makes the control token "
                "of it even as plain text; remove it from the row",
                reason="cannot be neutralised",
            )
        return list(ids)


def group_texts(texts: list[str]) -> Iterator[list[str]]:
    """Return the texts in groups of a size that one call of the backend handles well."""
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


def _cached_bytes(texts: Iterable[str]) -> int:
    """About the bytes that texts take that are kept."""
    return sum(len(text) + _TEXT_OVERHEAD for text in texts)


def _is_exact_match_token(token: Any) -> bool:
    """Return whether an added token is found wherever its text stands, and takes nothing more."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def compile_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first."""
    # Alternatives are tried in their order, and a token may begin with another one.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def list_control_tokens(tokenizer: Any, source: str) -> frozenset[str]:
    """Return the added tokens that message text must not become, for a template.

    These are transformers' own: special tokens, and added tokens that stand in the template's
    text, or those that the tokenizer lists itself (`chat_control_tokens`).
    """
    return frozenset(tokenizer._get_control_tokens(source))


def _preprocessing_steps(backend: Any) -> list[dict[str, Any]]:
    """Return the steps that a backend takes before its model."""
    # Their state is the JSON of tokenizer.json; they have no other way to say what they are.
    stages = [stage for stage in (backend.normalizer, backend.pre_tokenizer) if stage is not None]
    states = [json.loads(stage.__getstate__()) for stage in stages]
    return [step for state in states for step in _flatten_step(state)]


def _flatten_step(step: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a normalizer or pre-tokenizer as the list of its steps."""
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [flat for child in inner for flat in _flatten_step(child)] if inner else [step]


def _is_position_free(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", False)
    if step["type"] == "Split":
        return not _LOOKS_BACK.search(step["pattern"].get("Regex", ""))
    return step["type"] in UNICODE_NORMALIZERS | {"Digits", "Punctuation"}


def _splits_words(step: dict[str, Any]) -> bool:
    """Return whether a step splits text into words."""
    return step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"])
