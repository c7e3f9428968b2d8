"""Plain text as token ids: never a control token, with what the tokenizer adds, cut to fit.

`PlainTextTokenizer` encodes texts, `SpecialTokenFrame` is what stands around them, `LengthLimit`
cuts them, and `WindowEncoder` makes windows of whole documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from luthier.chat import IGNORED, ChatError
from luthier.chat.tokens import (
    PieceKind,
    TextPiece,
    TokenEncoder,
    compile_token_pattern,
    list_control_tokens,
)
from luthier.errors import UserError

OnLong = Literal["turns", "drop", "error"]
"""`chat.on_long`; `turns` cuts from the end, as plain texts have no turns."""
_LETTERS = ("a", "b")


@dataclass(frozen=True)
class SpecialTokenFrame:
    """The tokens around one text, or around and between two, as the tokenizer adds them."""

    ids_around: tuple[tuple[int, ...], ...]
    """Token ids before the first text, between two, and behind the last."""
    types: tuple[tuple[int, ...], ...] | None
    """The segment ids (`token_type_ids`) of these; None for a tokenizer that has none."""
    text_types: tuple[int, ...]
    """The segment id of each text's tokens."""

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return sum(map(len, self.ids_around))

    def settings(self) -> list[Any]:
        """All of it, for JSON."""
        return [self.ids_around, self.types, self.text_types]

    def around(self, texts: list[list[int]]) -> list[int]:
        """The ids of a row."""
        return list(chain(self.ids_around[0], *map(chain, texts, self.ids_around[1:])))

    def types_around(self, texts: list[list[int]]) -> list[int]:
        """The segment ids of a row; the frame must have such."""
        assert self.types is not None
        inner = [[kind] * len(ids) for kind, ids in zip(self.text_types, texts, strict=True)]
        return list(chain(self.types[0], *map(chain, inner, self.types[1:])))


def measure_frame(tokenizer: Any, texts: int = 1, target: bool = False) -> SpecialTokenFrame:
    """What `tokenizer(text)`, or `tokenizer(text, other)` for two texts, puts around them.

    `target`: what it puts around the text that an encoder-decoder model is to write.
    """
    letters = _LETTERS[:texts]
    encoding = tokenizer(text_target=letters[0]) if target else tokenizer(*letters)
    ids: list[int] = encoding["input_ids"]
    frame_ids: list[tuple[int, ...]] = []
    text_starts: list[int] = []
    position = 0
    for letter in letters:
        alone = tokenizer(letter, add_special_tokens=False)["input_ids"]
        start = next(p for p in range(position, len(ids)) if ids[p : p + len(alone)] == alone)
        frame_ids.append(tuple(ids[position:start]))
        text_starts.append(start)
        position = start + len(alone)
    frame_ids.append(tuple(ids[position:]))
    type_ids = encoding.get("token_type_ids")
    if type_ids is None:
        return SpecialTokenFrame(tuple(frame_ids), None, (0,) * texts)
    return SpecialTokenFrame(
        tuple(frame_ids),
        _frame_type_ids(type_ids, frame_ids, text_starts),
        tuple(type_ids[spot] for spot in text_starts),
    )


def _frame_type_ids(
    type_ids: list[int], frame_ids: list[tuple[int, ...]], text_starts: list[int]
) -> tuple[tuple[int, ...], ...]:
    """The segment ids of each part of the frame."""
    before = [
        tuple(type_ids[spot - len(part) : spot])
        for part, spot in zip(frame_ids, text_starts, strict=False)
    ]
    behind = len(frame_ids[-1])
    return (*before, tuple(type_ids[len(type_ids) - behind :]))


def add_end_token(frame: SpecialTokenFrame, tokenizer: Any) -> SpecialTokenFrame:
    """The frame with the tokenizer's end token behind the text, once."""
    *before, behind = frame.ids_around
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "trainer=seq2seq: each target needs an end token after it, and the tokenizer has none "
            "(eos_token). Set model.tokenizer to one that has one, or add eos_token to its "
            "tokenizer_config.json."
        )
    if end in behind:
        return frame
    return SpecialTokenFrame((*before, (*behind, end)), None, frame.text_types)


class RowTooLongError(Exception):
    """A row that is longer than allowed; how long it is, in tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


@dataclass(frozen=True)
class LengthLimit:
    """The longest row, and what becomes of a longer one."""

    max_length: int | None
    on_long: OnLong

    def check(self, frame: SpecialTokenFrame) -> None:
        """Raise UserError where a frame leaves no room for a text."""
        if self.max_length is not None and frame.size >= self.max_length:
            raise UserError(
                f"chat.max_length={self.max_length} leaves no room for text: the tokenizer itself "
                f"adds {frame.size} tokens to each row. Set a greater one."
            )

    def fit(self, texts: list[list[int]], frame: SpecialTokenFrame) -> list[list[int]]:
        """The texts, cut at their ends; raises TooLong where a long row is not to be cut."""
        lengths = [len(ids) for ids in texts]
        total = sum(lengths) + frame.size
        if self.max_length is None or total <= self.max_length:
            return texts
        if self.on_long != "turns":
            raise RowTooLongError(total)
        fitting = cut_lengths(lengths, self.max_length - frame.size)
        return [ids[:length] for ids, length in zip(texts, fitting, strict=True)]


def cut_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """The lengths of one or two texts, cut to so many tokens together.

    Of two, the longer one is cut until they are alike, then both: what tokenizers call
    `longest_first`.
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter * 2 > room:
        fitting = [room // 2, room // 2 + room % 2]
    else:
        fitting = [shorter, min(longer, room - shorter)]
    return fitting if lengths[0] <= lengths[1] else fitting[::-1]


_CHUNK = 2_000_000
"""Characters that go through the tokenizer at once: it needs about 100 bytes for each token."""


class PlainTextTokenizer:
    """Encodes texts as a tokenizer does, without what it puts around them.

    tokenizer: a fast tokenizer of transformers. Text never becomes a control token, as in chats:
    `</s>` in a text is encoded as plain text. Control tokens are the special ones and those that
    the tokenizer's chat template writes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokens = TokenEncoder(tokenizer)
        self.controls = list_control_tokens(tokenizer, _template_text(tokenizer))
        """The tokens that text must not become."""
        self._pattern = compile_token_pattern(self.controls)

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of each text.

        Raises ChatError, with the text's number, where a control token in it cannot be encoded as
        text.
        """
        number = 0
        for chunk in _chunks(texts):
            yield from self._encoded(chunk, number)
            number += len(chunk)

    def encode_words(self, rows: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
        """The ids of each word of each row, as they are in a text with one space between words.

        Raises ChatError as `encode` does.
        """
        pieces = [[self._word(word, place) for place, word in enumerate(row)] for row in rows]
        try:
            ids = iter(self._tokens.encode(chain.from_iterable(chain.from_iterable(pieces))))
        except ChatError:
            # Again, row by row, to know which one it is.
            for number, row in enumerate(pieces):
                self._pieces(list(chain.from_iterable(row)), number)
            raise
        for row in pieces:
            yield [list(chain.from_iterable(next(ids) for _ in word)) for word in row]

    def _word(self, word: str, position: int) -> list[TextPiece]:
        if not word:
            return []
        return _pieces(f" {word}" if position else word, self._pattern, at_start=not position)

    def _encoded(self, texts: list[str], first: int) -> Iterator[list[int]]:
        """The ids of texts, those without control tokens in one go."""
        suspect = [self._pattern.search(text) is not None for text in texts]
        clean = iter(
            self._plain([t for t, is_suspect in zip(texts, suspect, strict=True) if not is_suspect])
        )
        for index, text in enumerate(texts):
            yield self._neutral(text, first + index) if suspect[index] else next(clean)

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, without what the tokenizer puts around them."""
        backend = self._tokens.backend
        # The backend is the tokenizer's own and others may have left their settings on it.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = False
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _neutral(self, text: str, number: int) -> list[int]:
        """The ids of a text in which control tokens stand, these as plain text."""
        pieces = _pieces(text, self._pattern)
        return list(chain.from_iterable(self._pieces(pieces, number)))

    def _pieces(self, pieces: list[TextPiece], number: int) -> list[list[int]]:
        try:
            return self._tokens.encode(pieces)
        except ChatError as error:
            raise error.in_row(number) from None


def _pieces(text: str, pattern: re.Pattern[str], at_start: bool = True) -> list[TextPiece]:
    """A text taken apart at its control tokens; `at_start`: nothing stands before it."""
    pieces: list[TextPiece] = []
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            kind: PieceKind = "start" if at_start and not position else "continuation"
            pieces.append(TextPiece(text[position : match.start()], kind))
        pieces.append(TextPiece(match[0], "literal"))
        position = match.end()
    if position < len(text):
        kind = "start" if at_start and not position else "continuation"
        pieces.append(TextPiece(text[position:], kind))
    return pieces


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in runs of some characters, so that one call of the tokenizer stays small."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _template_text(tokenizer: Any) -> str:
    """The text of the tokenizer's chat templates, whose control tokens text must not become."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


class TextWindow(NamedTuple):
    """A stretch of a document: token ids, and labels of the same length."""

    input_ids: list[int]
    labels: list[int]
    """The ids, but `IGNORED` for tokens that the window before trains."""


class WindowEncoder:
    """Turns documents into windows of token ids, of which every token trains.

    tokenizer: a fast tokenizer of transformers. A document begins with what the tokenizer itself
    puts before a text (a BOS, or nothing) and ends with its end token. max_length: tokens of a
    window; null keeps documents whole. stride: tokens that a window repeats from the one before, as
    context that does not train again. Without a stride the first token of a later window has
    nothing to be predicted from.

    Text never becomes a control token, as in chats: `</s>` in a document is encoded as plain text.
    Raises UserError for a tokenizer without an end token and for a stride as long as a window.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, stride: int = 0) -> None:
        if max_length is not None and stride >= max_length:
            raise UserError(
                f"dataset.stride={stride} must be less than chat.max_length={max_length}: windows "
                "of a document overlap by so many tokens, and each must bring new ones."
            )
        self.max_length = max_length
        self.stride = stride
        self._text = PlainTextTokenizer(tokenizer)
        self.start, self.end = _surrounding_ids(tokenizer)

    def encode_batch(self, texts: Iterable[str]) -> list[list[TextWindow]]:
        """The windows of each document, in order; none for an empty one.

        Raises ChatError, with the document's number, where a control token in its text cannot be
        encoded as text.
        """
        return [
            self._windows([*self.start, *ids, *self.end]) if ids else []
            for ids in self._text.encode(texts)
        ]

    def settings(self) -> dict[str, Any]:
        """Everything besides the tokenizer's files that decides the windows, for JSON."""
        return {
            "max_length": self.max_length,
            "stride": self.stride,
            "start": self.start,
            "end": self.end,
            "controls": sorted(self._text.controls),
        }

    def _windows(self, ids: list[int]) -> list[TextWindow]:
        """The document, cut where it is longer than a window."""
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return [TextWindow(ids, ids.copy())]
        windows = [TextWindow(ids[:limit], ids[:limit])]
        for begin in range(limit - self.stride, len(ids) - self.stride, limit - self.stride):
            window = ids[begin : begin + limit]
            windows.append(TextWindow(window, [IGNORED] * self.stride + window[self.stride :]))
        return windows


def _surrounding_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and behind every document."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    start = next(p for p in range(len(ids)) if ids[p : p + len(alone)] == alone)
    behind = ids[start + len(alone) :]
    if not behind and tokenizer.eos_token_id is None:
        raise UserError(
            "dataset: plain text needs an end token after each document, and the tokenizer has "
            "none (eos_token). Set model.tokenizer to one that has one, or add eos_token to its "
            "tokenizer_config.json."
        )
    return ids[:start], behind or [tokenizer.eos_token_id]
