"""`data.json`: how long a run's sequences are, and some of its rows as tokens, for its report.

It is written when the data is ready, so that a report needs neither the dataset nor its code.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encode_source import EncodedSource
from luthier.data.examples import LocatedExample
from luthier.data.formats.image_parts import image_parts
from luthier.data.images.decode import decode_image
from luthier.data.images.reader import ImageRef
from luthier.data.prepare import PreparedData
from luthier.data.rows import RowError
from luthier.errors import UserError
from luthier.inspection.batch_fill import histogram, quantiles
from luthier.inspection.readers import Readers
from luthier.inspection.render import THUMBNAIL_PIXELS
from luthier.inspection.tokens import (
    DisplayedImage,
    DisplayedSequence,
    RowImage,
    Token,
    TokenKind,
    display_row,
    token_decoder,
)
from luthier.model.tokenizer import end_token_ids
from luthier.redaction import redact_text
from luthier.storage.atomic import write_json
from luthier.storage.typed_files import load_json

DATA_FILE = "data.json"
_ROWS = 3
"""Rows that are shown of one source; of several it is one each."""
_SOURCES = 4
_BARS = 24
MAX_TOKENS = 1200
"""Tokens of a sequence that are shown; of a longer one these are its first and its last."""
_LAST_TOKENS = 400
_MAX_IMAGES = 6


_StoredToken = tuple[int, str, TokenKind, bool, str | None, int | None, str | None]
"""The fields of `Token`, without its tag."""
_StoredTaggedToken = tuple[int, str, TokenKind, bool, str | None, int | None, str | None, str]


class StoredImage(BaseModel):
    """An image of a stored row, with a small copy of the picture."""

    model_config = ConfigDict(extra="allow")

    start: int
    tokens: int
    width: int
    height: int
    source: str
    picture: str
    """The small copy: JPEG in base64; empty where it could not be read."""


class StoredRow(BaseModel):
    """One sequence, or part, of a row as `luthier preview` shows it.

    Its middle is left out where it is long. A further part of a row has no place.
    """

    model_config = ConfigDict(extra="allow")

    heading: str
    place: str
    counts: str
    notes: list[str] = []
    tokens: list[_StoredToken | _StoredTaggedToken]
    left_out_at: int = 0
    left_out: int = 0
    """So many tokens are left out before the token of the number `left_out_at`."""
    images: list[StoredImage] = []

    def pieces(self) -> Iterator[Token | DisplayedImage]:
        """Yield the tokens and images in order."""
        tokens = [Token(*fields) for fields in self.tokens]
        position = 0
        for number, image in enumerate(self.images):
            ref: Any = {"width": image.width, "height": image.height, "source": image.source}
            yield from tokens[position : image.start]
            position = image.start + image.tokens
            inside = tokens[image.start : position]
            if inside:
                read = _picture_reader(image.picture)
                yield DisplayedImage(number, image.start, inside, ref, read)
        yield from tokens[position:]


class DataSummary(BaseModel):
    """The content of `data.json`."""

    model_config = ConfigDict(extra="allow")

    quantiles: dict[str, int] = {}
    """The least, middle, 90th and 99th percentile and the most of the lengths, in tokens."""
    histogram: list[tuple[int, int, int]] = []
    """From (inclusive), to (inclusive), and the number of sequences of such a length."""
    rows: list[StoredRow] = []
    remark: str = ""
    """Why there are no rows; empty where there are some."""


def write_data_summary(
    folder: Path, config: RunConfig, prepared: PreparedData, tokenizer: Any
) -> None:
    """Write `data.json` into a run's folder; raises nothing but errors of writing."""
    summary = DataSummary()
    if isinstance(prepared.train, TokenRows):
        lengths = prepared.train.lengths
        ends = [(start, end, count) for start, end, count in histogram(lengths, _BARS)]
        longest = int(lengths.max(initial=0))
        summary.quantiles = quantiles(lengths)
        summary.histogram = [
            (start, longest if end is None else end - 1, count) for start, end, count in ends
        ]
        try:
            summary.rows = [*_sample_rows(config, prepared, tokenizer)]
        # Whatever a row holds: a picture for people must not end a training.
        except Exception as error:
            summary.remark = f"no rows could be shown: {error}"
    else:
        summary.remark = "a stream: its rows are not known ahead"
    write_json(folder / DATA_FILE, summary.model_dump(exclude_defaults=True))


def read_data_summary(folder: Path) -> DataSummary:
    """Return what a run's folder says of its data; empty where an older luthier wrote nothing.

    Raises UserError for a damaged file.
    """
    content = load_json(folder / DATA_FILE, dict[str, Any])
    if content is None:
        return DataSummary(remark="this run was trained by a luthier that recorded no rows")
    try:
        return DataSummary.model_validate(content)
    except ValueError as error:
        raise UserError(
            f"{folder / DATA_FILE}: its content is not what luthier wrote there. "
            "Remove the file, and the report leaves the rows out."
        ) from error


def _sample_rows(config: RunConfig, prepared: PreparedData, tokenizer: Any) -> Iterator[StoredRow]:
    """Yield the first rows of each source, each sequence or part as its tokens."""
    text_of, controls = token_decoder(tokenizer), set(tokenizer.added_tokens_decoder)
    readers = Readers(tokenizer, config, end_token_ids(config.model))
    number = 0
    for source, rows in _first_rows(prepared):
        for row in rows:
            number += 1
            example = source.examples([row])[0]
            located = LocatedExample(example, source.locations([row])[0], {})
            (inspected,) = readers.of(source.opened).rows([located])
            images = [_row_image(source, part["image"]) for part in image_parts(example)]
            displayed = display_row(number, inspected, controls, text_of, images)
            yield from map(_store_row, displayed[:_ROWS])


def _row_image(source: EncodedSource, ref: ImageRef) -> RowImage:
    """Return an image of a row, and what reads its bytes."""
    return ref, partial(source.images.read_reference, ref)


def _first_rows(prepared: PreparedData) -> Iterator[tuple[EncodedSource, list[int]]]:
    """Yield the numbers of the first rows of an epoch, of each source."""
    rows = prepared.train
    assert isinstance(rows, TokenRows) and rows.index is not None
    trained = [*prepared.sources.values()]
    several = len(prepared.train_counts.sources) > 1
    start = 0
    for source in trained[: _SOURCES if several else 1]:
        stop = start + len(source.tokens)
        inside = rows.index[(rows.index >= start) & (rows.index < stop)][:1000] - start
        ends = np.cumsum(source.sequences, dtype=np.int64)
        numbers = np.searchsorted(ends, inside, side="right").tolist()
        yield source, [*dict.fromkeys(numbers)][: 1 if several else _ROWS]
        start = stop


def _store_row(sequence: DisplayedSequence) -> StoredRow:
    """Return a sequence for the file, without its middle where it is long.

    One that holds a secret has no tokens, which would hide it from what looks for secrets.
    """
    tokens, place = sequence.tokens, sequence.place if sequence.is_first else ""
    text = "".join(token.text for token in tokens)
    if redact_text(text) != text:
        return StoredRow(
            heading=sequence.heading, place=place, counts=f"{len(tokens):,} tokens", tokens=[],
            notes=["not shown: it holds what looks like a secret"],
        )  # fmt: skip
    left_out = max(len(tokens) - MAX_TOKENS, 0)
    at = MAX_TOKENS - _LAST_TOKENS
    shown = tokens[:at] + tokens[at + left_out :] if left_out else tokens
    images = sequence.images[:_MAX_IMAGES]
    return StoredRow(
        heading=sequence.heading,
        place=place,
        counts=sequence.counts,
        notes=sequence.notes,
        tokens=[_store_token(token) for token in shown],
        left_out_at=at if left_out else 0,
        left_out=left_out,
        images=[
            _store_image(image)
            for image in images
            if not left_out or image.start + len(image.tokens) <= at
        ],
    )


def _store_token(token: Token) -> tuple[Any, ...]:
    """Return the fields of a token; few have a tag, which stands last."""
    values = tuple(vars(token).values())
    return values[:-1] if token.tag is None else values


def _store_image(image: DisplayedImage) -> StoredImage:
    """Return an image for the file, with a small copy of it."""
    file = BytesIO()
    try:
        picture = decode_image(image.read())
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        picture.save(file, "png" if max(picture.size) < THUMBNAIL_PIXELS else "jpeg")
    except (RowError, UserError, OSError):
        file = BytesIO()
    return StoredImage(
        start=image.start,
        tokens=len(image.tokens),
        width=image.ref["width"],
        height=image.ref["height"],
        source=str(image.ref["source"]),
        picture=b64encode(file.getvalue()).decode(),
    )


def _picture_reader(picture: str) -> Any:
    """Return what gives the bytes of a stored picture; RowError where it is none."""

    def read() -> bytes:
        if not picture:
            raise RowError("its file could not be read when the run began")
        return b64decode(picture)

    return read
