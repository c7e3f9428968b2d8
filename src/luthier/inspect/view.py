"""Rows of a dataset as tokens to be shown, side by side as in a batch."""

from dataclasses import dataclass
from pathlib import Path

from luthier.inspect.material import Material
from luthier.inspect.rows import Reader, Row
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


def view(material: Material, positions: range, heldout: bool = False) -> View:
    """The rows at these positions of one side, each sequence as tokens."""
    settings = material.config.chat
    reader = Reader(material.tokenizer, settings, material.end_tokens)
    source = material.heldout if heldout else material.train
    text_of = token_texts(material.tokenizer)
    controls = set(material.tokenizer.added_tokens_decoder)
    rows = [
        Shown(row.number, place(row.place), part, max(len(row.sequences), 1), tokens, _notes(row))
        for row in reader.rows(source, positions)
        for part, tokens in enumerate(
            [tokens_of(sequence, controls, text_of) for sequence in row.sequences] or [[]], start=1
        )
    ]
    pad: int = material.tokenizer.pad_token_id
    side = "held-out" if heldout else "training"
    about = (
        f"{_span(positions)} of {len(source.places):,} {side} rows, tokenizer of "
        f"{material.config.model.tokenizer or material.config.model.path}, "
        f"boundaries: {settings.boundaries}"
    )
    return View(padded(rows), text_of(pad), pad, settings.boundaries, about)


def place(text: str) -> str:
    """A row's place as one would type it from here."""
    return text.removeprefix(f"{Path.cwd()}/")


def cut_words(replies: int) -> str:
    """What went from a row's front, in words."""
    if not replies:
        return "turns went from its front, every reply still trains"
    return (
        f"turns went from its front, {replies} {'reply' if replies == 1 else 'replies'} with them"
    )


def _span(positions: range) -> str:
    first, last = positions[0] + 1, positions[-1] + 1
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _notes(row: Row) -> list[str]:
    notes = []
    if row.fate != "trains":
        notes.append(f"{_FATES[row.fate]}: {row.words}")
    if row.cut_turns is not None:
        notes.append(f"cut to fit chat.max_length: {cut_words(row.cut_turns)}")
    return notes
