"""Rows of a dataset as tokens to be shown, side by side as in a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.inspect.division import Chosen, pick
from luthier.inspect.material import Material
from luthier.inspect.rows import Row, cut_words
from luthier.inspect.tokens import Shown, padded, token_texts, tokens_of

_FATES = {
    "lossy": "trains, but is not shown whole",
    "dropped": "dropped",
    "stops": "training stops here",
}


@dataclass(frozen=True)
class View:
    """Sequences to be shown, and what fills them up to one length."""

    rows: list[Shown]
    pad: str
    pad_id: int
    boundaries: str
    about: str


def view(material: Material, chosen: Chosen, numbers: range, side: str) -> View:
    """The rows of these numbers, counted from 0 over the chosen ones, each sequence as tokens.

    `side`: what the rows are called, such as `training`.
    """
    settings = material.config.chat
    text_of = token_texts(material.tokenizer)
    controls = set(material.tokenizer.added_tokens_decoder)
    rows = [
        Shown(number + 1, row.place, part, max(len(row.sequences), 1), tokens, _notes(row))
        for number, row in zip(numbers, _rows(material, chosen, numbers), strict=True)
        for part, tokens in enumerate(
            [tokens_of(sequence, controls, text_of) for sequence in row.sequences] or [[]], start=1
        )
    ]
    pad: int = material.tokenizer.pad_token_id
    total = sum(len(positions) for _, positions in chosen)
    about = (
        f"{_span(numbers)} of {total:,} {side} rows, tokenizer of "
        f"{material.config.model.tokenizer or material.config.model.path}, "
        f"boundaries: {settings.boundaries}"
    )
    return View(padded(rows), text_of(pad), pad, settings.boundaries, about)


def _rows(material: Material, chosen: Chosen, numbers: range) -> Iterator[Row]:
    """The rows of these numbers, from one source after the other."""
    start = 0
    for opened, positions in chosen:
        inside = range(max(numbers.start - start, 0), min(numbers.stop - start, len(positions)))
        if inside:
            yield from material.readers.of(opened).rows(list(pick(opened, positions[inside])))
        start += len(positions)


def _span(numbers: range) -> str:
    first, last = numbers[0] + 1, numbers[-1] + 1
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _notes(row: Row) -> list[str]:
    notes = []
    if row.fate != "trains":
        notes.append(f"{_FATES[row.fate]}: {row.words}")
    if row.cut_turns is not None:
        notes.append(f"cut to fit chat.max_length: {cut_words(row.cut_turns)}")
    return notes
