"""What a tokenizer puts around texts, and texts cut so that they fit with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from luthier.errors import UserError

OnLong = Literal["turns", "drop", "error"]
"""`chat.on_long`; `turns` cuts from the end, as plain texts have no turns."""
_LETTERS = ("a", "b")


@dataclass(frozen=True)
class Frame:
    """The tokens around one text, or around and between two, as the tokenizer adds them."""

    parts: tuple[tuple[int, ...], ...]
    """Token ids before the first text, between two, and behind the last."""
    types: tuple[tuple[int, ...], ...] | None
    """The segment ids (`token_type_ids`) of these; None for a tokenizer that has none."""
    text_types: tuple[int, ...]
    """The segment id of each text's tokens."""

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return sum(map(len, self.parts))

    def settings(self) -> list[Any]:
        """All of it, for JSON."""
        return [self.parts, self.types, self.text_types]

    def around(self, texts: list[list[int]]) -> list[int]:
        """The ids of a row."""
        return list(chain(self.parts[0], *map(chain, texts, self.parts[1:])))

    def types_around(self, texts: list[list[int]]) -> list[int]:
        """The segment ids of a row; the frame must have such."""
        assert self.types is not None
        inner = [[kind] * len(ids) for kind, ids in zip(self.text_types, texts, strict=True)]
        return list(chain(self.types[0], *map(chain, inner, self.types[1:])))


def frame_of(tokenizer: Any, texts: int = 1, target: bool = False) -> Frame:
    """What `tokenizer(text)`, or `tokenizer(text, other)` for two texts, puts around them.

    `target`: what it puts around the text that an encoder-decoder model is to write.
    """
    letters = _LETTERS[:texts]
    whole = tokenizer(text_target=letters[0]) if target else tokenizer(*letters)
    ids: list[int] = whole["input_ids"]
    parts: list[tuple[int, ...]] = []
    spots: list[int] = []
    position = 0
    for letter in letters:
        alone = tokenizer(letter, add_special_tokens=False)["input_ids"]
        place = next(p for p in range(position, len(ids)) if ids[p : p + len(alone)] == alone)
        parts.append(tuple(ids[position:place]))
        spots.append(place)
        position = place + len(alone)
    parts.append(tuple(ids[position:]))
    kinds = whole.get("token_type_ids")
    if kinds is None:
        return Frame(tuple(parts), None, (0,) * texts)
    return Frame(tuple(parts), _split(kinds, parts, spots), tuple(kinds[spot] for spot in spots))


def _split(
    kinds: list[int], parts: list[tuple[int, ...]], spots: list[int]
) -> tuple[tuple[int, ...], ...]:
    """The segment ids of each part of the frame."""
    before = [
        tuple(kinds[spot - len(part) : spot]) for part, spot in zip(parts, spots, strict=False)
    ]
    behind = len(parts[-1])
    return (*before, tuple(kinds[len(kinds) - behind :]))


def with_end(frame: Frame, tokenizer: Any) -> Frame:
    """The frame with the tokenizer's end token behind the text, once."""
    *before, behind = frame.parts
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "trainer=seq2seq: a target needs an end token behind it, and the tokenizer names none "
            "(eos_token). Set model.tokenizer to one that does, or add eos_token to its "
            "tokenizer_config.json."
        )
    if end in behind:
        return frame
    return Frame((*before, (*behind, end)), None, frame.text_types)


class TooLong(Exception):
    """A row that is longer than allowed; how long it is, in tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


@dataclass(frozen=True)
class Bound:
    """The longest row, and what becomes of a longer one."""

    max_length: int | None
    on_long: OnLong

    def check(self, frame: Frame) -> None:
        """Raise UserError where a frame leaves no room for a text."""
        if self.max_length is not None and frame.size >= self.max_length:
            raise UserError(
                f"chat.max_length={self.max_length} leaves no room for text: the tokenizer itself "
                f"adds {frame.size} tokens to each row. Set a greater one."
            )

    def fit(self, texts: list[list[int]], frame: Frame) -> list[list[int]]:
        """The texts, cut at their ends; raises TooLong where a long row is not to be cut."""
        lengths = [len(ids) for ids in texts]
        whole = sum(lengths) + frame.size
        if self.max_length is None or whole <= self.max_length:
            return texts
        if self.on_long != "turns":
            raise TooLong(whole)
        kept = cut(lengths, self.max_length - frame.size)
        return [ids[:length] for ids, length in zip(texts, kept, strict=True)]


def cut(lengths: Sequence[int], room: int) -> list[int]:
    """The lengths of one or two texts, cut to so many tokens together.

    Of two, the longer one is cut until they are alike, then both: what tokenizers call
    `longest_first`.
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter * 2 > room:
        kept = [room // 2, room // 2 + room % 2]
    else:
        kept = [shorter, min(longer, room - shorter)]
    return kept if lengths[0] <= lengths[1] else kept[::-1]
