"""Sequences as tokens that a person can look at: their text, and what each is there for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from luthier.chat import IGNORED, ChatSequence
from luthier.data.encoders.chat import RowState
from luthier.inspection.dataset import InspectedRow, LoadedDataset, describe_cut
from luthier.inspection.statistics import SelectedRows, read_examples

TokenKind = Literal["trained", "context", "control"]


@dataclass(frozen=True)
class Token:
    """One token: its id, its text, whether it trains, and the message field that it is from."""

    id: int
    text: str
    kind: TokenKind
    trained: bool
    role: str | None = None
    message: int | None = None
    field: str | None = None

    @property
    def origin(self) -> str:
        """Who wrote the token, in words."""
        if self.field is None:
            return "template"
        if self.message is None:
            return self.field
        return f"message {self.message}, {self.role}, {self.field}"


@dataclass(frozen=True)
class DisplayedSequence:
    """A sequence to be shown: its row, its tokens and the padding behind them."""

    row: int
    place: str
    part: int
    """Which sequence of its row it is, from 1."""
    parts: int
    """How many sequences the row makes."""
    tokens: list[Token]
    notes: list[str]
    """What is to be known of its row: the reason where it does not train, turns that were cut."""
    padding: int = 0

    @property
    def heading(self) -> str:
        """The row and, where it makes several, which of its sequences."""
        several = f", sequence {self.part} of {self.parts}" if self.parts > 1 else ""
        return f"row {self.row}{several}"

    @property
    def trained(self) -> int:
        """How many of the tokens train."""
        return sum(token.trained for token in self.tokens)

    @property
    def counts(self) -> str:
        """The numbers of tokens in words."""
        if not self.tokens:
            return "no tokens"
        share = self.trained / len(self.tokens)
        padding = f", {self.padding} padding" if self.padding else ""
        return f"{len(self.tokens)} tokens, {self.trained} trained ({share:.0%}){padding}"


def describe_tokens(
    sequence: ChatSequence, controls: set[int], text_of: Callable[[int], str]
) -> list[Token]:
    """Return the tokens of a sequence, each with its part in training and its origin.

    `controls` are the ids of tokens added to the plain vocabulary. One of them that also trains,
    such as the stop token of a reply, is of kind `control` with `trained` set.
    """
    return [
        Token(id_, text_of(id_), _token_kind(id_ in controls, label), label != IGNORED, *origin)
        for id_, label, origin in zip(
            sequence.input_ids, sequence.labels, _origins(sequence), strict=True
        )
    ]


def pad_rows(rows: Sequence[DisplayedSequence]) -> list[DisplayedSequence]:
    """The rows as one batch of them: filled up on the right to the longest."""
    width = max(len(row.tokens) for row in rows)
    return [replace(row, padding=width - len(row.tokens)) if row.tokens else row for row in rows]


def token_decoder(tokenizer: Any) -> Callable[[int], str]:
    """Return a function from a token id to its text as it stands inside a longer text.

    A token decoded alone loses the space that SentencePiece writes before a word, so each is
    decoded behind an anchor. A piece of a character is shown as its raw token.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = tokenizer.decode(anchor)

    @cache
    def text_of(token: int) -> str:
        text: str = tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
        text = text.removeprefix(prefix)
        return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text else text

    return text_of


def _token_kind(control: bool, label: int) -> TokenKind:
    if control:
        return "control"
    return "context" if label == IGNORED else "trained"


def _origins(sequence: ChatSequence) -> list[tuple[str | None, int | None, str | None]]:
    origins: list[tuple[str | None, int | None, str | None]] = [(None, None, None)]
    origins *= len(sequence.input_ids)
    for segment in sequence.segments:
        origin = (segment.role, segment.message, segment.field)
        origins[segment.start : segment.end] = [origin] * (segment.end - segment.start)
    return origins


_OUTCOMES = {
    RowState.LOSSY: "trains, but is not shown whole",
    RowState.DROPPED: "dropped",
    RowState.STOPS: "training stops here",
}


@dataclass(frozen=True)
class TokenView:
    """Sequences to be shown, and what fills them up to one length."""

    rows: list[DisplayedSequence]
    pad: str
    pad_id: int
    boundaries: str
    about: str


def view_rows(
    material: LoadedDataset, chosen: SelectedRows, numbers: range, side: str
) -> TokenView:
    """The rows of these numbers, counted from 0 over the chosen ones, each sequence as tokens.

    `side`: what the rows are called, such as `training`.
    """
    settings = material.config.chat
    text_of = token_decoder(material.tokenizer)
    controls = set(material.tokenizer.added_tokens_decoder)
    rows = [
        DisplayedSequence(
            number + 1, row.place, part, max(len(row.sequences), 1), tokens, _notes(row)
        )
        for number, row in zip(numbers, _rows(material, chosen, numbers), strict=True)
        for part, tokens in enumerate(
            [describe_tokens(sequence, controls, text_of) for sequence in row.sequences] or [[]],
            start=1,
        )
    ]
    pad: int = material.tokenizer.pad_token_id
    total = sum(len(positions) for _, positions in chosen)
    about = (
        f"{_span(numbers)} of {total:,} {side} rows, tokenizer of "
        f"{material.config.model.tokenizer or material.config.model.path}, "
        f"boundaries: {settings.boundaries}"
    )
    return TokenView(pad_rows(rows), text_of(pad), pad, settings.boundaries, about)


def _rows(material: LoadedDataset, chosen: SelectedRows, numbers: range) -> Iterator[InspectedRow]:
    """The rows of these numbers, from one source after the other."""
    start = 0
    for opened, positions in chosen:
        inside = range(max(numbers.start - start, 0), min(numbers.stop - start, len(positions)))
        if inside:
            yield from material.readers.of(opened).rows(
                list(read_examples(opened, positions[inside]))
            )
        start += len(positions)


def _span(numbers: range) -> str:
    first, last = numbers[0] + 1, numbers[-1] + 1
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _notes(row: InspectedRow) -> list[str]:
    notes = []
    outcome = row.outcome
    if outcome.state != RowState.TRAINS:
        notes.append(f"{_OUTCOMES[outcome.state]}: {outcome.problem}")
    if outcome.cut_turns is not None:
        notes.append(f"cut to fit chat.max_length: {describe_cut(outcome.cut_turns)}")
    return notes
