"""Sequences as tokens that a person can look at: their text, and what each is there for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any, Literal

from luthier.chat import IGNORED, ChatSequence
from luthier.data.encoders.chat import RowState
from luthier.data.examples import OpenedSource
from luthier.data.images.reader import ImageRef, ReadImage
from luthier.inspection.dataset import LoadedDataset
from luthier.inspection.readers import TIED, InspectedRow, RowPart
from luthier.inspection.statistics import SelectedRows, read_examples
from luthier.terminal import pluralize

TokenKind = Literal["trained", "context", "control"]
ReadBytes = Callable[[], bytes]
"""Returns the bytes of an image; RowError where its file cannot be read any more."""


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
    tag: str | None = None
    """The tag that trains at this token; None where rows have no tags, or the token has none."""

    @property
    def origin(self) -> str:
        """Who wrote the token, in words."""
        if self.field is None:
            return "template"
        if self.message is None:
            return self.field
        return f"message {self.message}, {self.role}, {self.field}"


@dataclass(frozen=True)
class DisplayedImage:
    """An image among the tokens of a sequence, which stands for a run of them."""

    number: int
    """Its number in the row, counted from 0."""
    start: int
    """The first of its tokens in the sequence."""
    tokens: list[Token]
    ref: ImageRef
    """The image as the row's example has it: its size in pixels and its source."""
    read: ReadBytes = field(repr=False, compare=False)
    trained = False
    """Tokens of an image never train."""

    @property
    def label(self) -> str:
        """The image in a few words, such as `image 448x336: 196 tokens`."""
        count = len(self.tokens)
        size = f"{self.ref['width']}x{self.ref['height']}"
        return f"image {size}: {count} {'token' if count == 1 else 'tokens'}"

    @property
    def ids(self) -> str:
        """The ids of its tokens, with a run of equal ones as `ID×COUNT`."""
        runs = [(id_, len([*run])) for id_, run in groupby(token.id for token in self.tokens)]
        return " ".join(f"{id_}×{count}" if count > 1 else f"{id_}" for id_, count in runs)

    @property
    def origin(self) -> str:
        """Where the image is from, in words."""
        return f"{self.tokens[0].origin}: {self.ref['source']}"


@dataclass(frozen=True)
class DisplayedSequence:
    """A sequence to be shown: its row, its tokens and the padding behind them."""

    row: int
    place: str
    part: int
    """Which sequence, or part, of its row it is, from 1."""
    parts: int
    """How many sequences the row makes, or parts it has."""
    tokens: list[Token]
    notes: list[str]
    """What is to be known of its row: the reason where it does not train, turns that were cut."""
    padding: int = 0
    images: list[DisplayedImage] = field(default_factory=list)
    """Its images, in the order of their tokens."""
    name: str | None = None
    """What it is called as a part of its row, such as `chosen`; None for a whole sequence."""
    behind: int = 0
    """Tokens that stand before it in its sequence, and are displayed as another part."""
    is_padded: bool = True
    """Whether a batch pads it; a prompt without its reply is not."""
    remark: str = ""
    """What trains in place of its tokens."""

    @property
    def is_first(self) -> bool:
        """Whether a new row begins with it, or a new sequence of one."""
        return self.name is None or self.part == 1

    @property
    def pieces(self) -> Iterator[Token | DisplayedImage]:
        """Its tokens in order, those of an image as one piece."""
        position = 0
        for image in self.images:
            yield from self.tokens[position : image.start]
            yield image
            position = image.start + len(image.tokens)
        yield from self.tokens[position:]

    @property
    def heading(self) -> str:
        """The row and, where it makes several, which of its sequences."""
        if self.name is not None:
            return f"row {self.row}{f', {self.name}' if self.name else ''}"
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
        count = len(self.tokens)
        counts = pluralize(count, "token")
        # Nothing of a prompt or of a text with a label trains, which says nothing of its row.
        if self.name is None or self.trained:
            counts += f", {self.trained:,} trained ({self.trained / count:.0%})"
        counts += self._image_counts
        counts += f", {self.behind + count:,} with the prompt" if self.behind else ""
        counts += f", {self.padding:,} padding" if self.padding else ""
        return counts + (f"; {self.remark}" if self.remark else "")

    @property
    def _image_counts(self) -> str:
        if not self.images:
            return ""
        tokens, count = sum(len(image.tokens) for image in self.images), len(self.images)
        return f", {tokens} for {'an image' if count == 1 else f'{count} images'}"


def describe_tokens(
    sequence: ChatSequence,
    controls: set[int],
    text_of: Callable[[int], str],
    tags: Sequence[str | None] = (),
) -> list[Token]:
    """Return the tokens of a sequence, each with its part in training and its origin.

    `controls` are the ids of tokens added to the plain vocabulary. One of them that also trains,
    such as the stop token of a reply, is of kind `control` with `trained` set. `tags`: the tag of
    each token, where words have tags.
    """
    tokens = [
        Token(id_, text_of(id_), _token_kind(id_ in controls, label), label != IGNORED, *origin)
        for id_, label, origin in zip(
            sequence.input_ids, sequence.labels, _origins(sequence), strict=True
        )
    ]
    if not tags:
        return tokens
    return [replace(token, tag=tag) for token, tag in zip(tokens, tags, strict=True)]


def pad_rows(rows: Sequence[DisplayedSequence]) -> list[DisplayedSequence]:
    """The rows as one batch of them: filled up on the right to the longest."""
    width = max(row.behind + len(row.tokens) for row in rows)
    return [
        replace(row, padding=width - row.behind - len(row.tokens))
        if row.tokens and row.is_padded
        else row
        for row in rows
    ]


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
    RowState.LOSSY: "trained, but not all of its text is shown",
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
        sequence
        for number, (row, read_images) in zip(
            numbers, _rows(material, chosen, numbers), strict=True
        )
        for sequence in display_row(number + 1, row, controls, text_of, read_images)
    ]
    pad: int = material.tokenizer.pad_token_id
    total = sum(len(positions) for _, positions in chosen)
    about = (
        f"{_span(numbers)} of {total:,} {side} rows, tokenizer of "
        f"{material.config.model.tokenizer or material.config.model.path}, "
        f"boundaries: {settings.boundaries}"
    )
    return TokenView(pad_rows(rows), text_of(pad), pad, settings.boundaries, about)


RowImage = tuple[ImageRef, ReadBytes]
"""An image of a row, and what reads its bytes."""


def display_row(
    number: int,
    row: InspectedRow,
    controls: set[int],
    text_of: Callable[[int], str],
    row_images: Sequence[RowImage],
) -> list[DisplayedSequence]:
    """Return what is displayed of a row: its sequences or parts, or why it has none.

    `number`: the row's, from 1; `row_images`: its images, in the order of their parts.
    """
    nameless = [(None, RowPart("", sequence)) for sequence in row.sequences]
    parts = [(part.name, part) for part in row.parts] or nameless
    notes = describe_outcome(row)
    if not parts:
        return [DisplayedSequence(number, row.place, 1, 1, [], notes)]
    displayed = []
    for position, (name, part) in enumerate(parts, start=1):
        tokens = describe_tokens(part.sequence, controls, text_of, part.tags)
        displayed.append(
            DisplayedSequence(
                number,
                row.place,
                position,
                len(parts),
                tokens,
                notes if name is None or position == 1 else [],
                images=_images(part.sequence, tokens, row_images),
                name=name,
                behind=part.behind,
                is_padded=part.is_padded,
                remark=part.remark,
            )
        )
    return displayed


def _rows(
    material: LoadedDataset, chosen: SelectedRows, numbers: range
) -> Iterator[tuple[InspectedRow, list[RowImage]]]:
    """The rows of these numbers with their images, from one source after the other."""
    start = 0
    for opened, positions in chosen:
        inside = range(max(numbers.start - start, 0), min(numbers.stop - start, len(positions)))
        if inside:
            examples = [*read_examples(opened, positions[inside])]
            rows = material.readers.of(opened).rows([example.row for example in examples])
            for row, example in zip(rows, examples, strict=True):
                yield row, [(image.ref, _bytes_reader(opened, image)) for image in example.images]
        start += len(positions)


def _bytes_reader(opened: OpenedSource, image: ReadImage) -> ReadBytes:
    return partial(opened.images.read_bytes, image)


def _images(
    sequence: ChatSequence, tokens: list[Token], row_images: Sequence[RowImage]
) -> list[DisplayedImage]:
    """Return the images of a sequence; `row_images` are those of its row."""
    images = []
    for number, start, stop in sequence.images:
        ref, read = row_images[number]
        images.append(DisplayedImage(number, start, tokens[start:stop], ref, read))
    return images


def _span(numbers: range) -> str:
    first, last = numbers[0] + 1, numbers[-1] + 1
    return f"row {first}" if first == last else f"rows {first} to {last}"


def describe_outcome(row: InspectedRow) -> list[str]:
    """Return what is to be known of a row: why it does not train, what was cut, what it lacks."""
    notes = []
    outcome = row.outcome
    if outcome.state != RowState.TRAINS:
        notes.append(f"{_OUTCOMES[outcome.state]}: {outcome.problem}")
    if row.cut:
        notes.append(f"cut to fit chat.max_length: {row.cut}")
    if row.is_tied:
        notes.append(f"no preference: {TIED}")
    return notes
