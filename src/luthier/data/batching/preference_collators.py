"""From rows of judged replies to the tensors of one batch.

Padding stands on the right and is known by its place. Every batch has `input_ids`,
`attention_mask` and, but for whole conversations, `completion_mask` (1 for tokens that train), all
int64 of shape (sequences, width); of two replies all better ones come first, then all worse ones.
`numbers` are those of the rows in their table and `real` is False for rows that only fill up a
batch, both of shape (rows,).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from luthier.data.batching.collators import to_tensors
from luthier.data.batching.image_collators import ImageInputs, decode_images
from luthier.data.batching.samplers import RowTuple, SampledDataset, Sampler
from luthier.data.batching.token_rows import Array, TokenRows

Row = Mapping[str, Any]
Batch = dict[str, Any]


class PreferenceItem(NamedTuple):
    """A row of the table, and the row whose reply stands behind its prompt for comparison."""

    number: int
    row: Row
    partner: Row
    """The row itself where nothing is compared."""
    real: bool
    images: tuple[bytes, ...] = ()
    """The images of the row's prompt as their files have them, in the order of their tokens."""


class PreferenceDataset(SampledDataset):
    """Gives rows of the table as they are; what only fills up a batch is its first row."""

    # Its layouts take these items, where those of SampledDataset take training rows.
    def __getitem__(self, numbers: RowTuple) -> PreferenceItem:  # type: ignore[override]
        # Empty numbers only fill a batch up: the first row stands there, and `real` says so.
        number, partner = (numbers or (0,))[0], (numbers or (0,))[-1]
        row = self.table.row(number)
        other = row if partner == number else self.table.row(partner)
        images = self.read_images(number) if self.read_images is not None else ()
        return PreferenceItem(number, row, other, bool(numbers), images)


class TableWithColumns:
    """A table with further columns of numbers, such as what a reference model said of each row."""

    def __init__(self, table: Any, columns: Mapping[str, Array]) -> None:
        """Each column has one entry for each row of the table."""
        self.table = table
        self.lengths = table.lengths
        self._columns = dict(columns)

    def row(self, number: int, /) -> Row:
        """Return the columns of one row."""
        extra = {name: column[number] for name, column in self._columns.items()}
        return {**self.table.row(number), **extra}

    def column(self, name: str) -> Array:
        """Return a column of numbers."""
        extra = self._columns.get(name)
        return self.table.column(name) if extra is None else extra


class PartnerSampler(Sampler):
    """Gives each row of another sampler a partner: the row before it in the same step.

    The first row of a step gets the last one, so that the partners of a step's rows are those rows.
    A step of one row takes the row before it in the epoch.
    """

    def __init__(self, sampler: Sampler, step: int, fixed: Array | None = None) -> None:
        """`step`: the rows of one step, over all processes and accumulated batches; `fixed`: the
        partner of each row of the table, in place of those that the order gives."""
        super().__init__(sampler.rows, sampler.seed, sampler.multiple)
        self.sampler = sampler
        self.step = step
        self.fixed = fixed

    @property
    def count(self) -> int:
        """Return the rows of an epoch."""
        return self.sampler.count

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        super().set_epoch(epoch)
        self.sampler.set_epoch(epoch)

    def _arrange(self) -> Any:
        # Not by iterating over the sampler, whose empty tuples at the end have no number.
        order = np.array([number for (number,) in self.sampler._arrange()], dtype=np.int64)
        partners = rotate_partners(order, self.step) if self.fixed is None else self.fixed[order]
        return zip(order.tolist(), partners.tolist(), strict=True)


def rotate_partners(order: Array, step: int) -> Array:
    """Return the partner of each row of an order, int64: the one before it within its `step`
    rows."""
    partners = np.roll(order, 1)
    starts = np.arange(0, len(order), step)
    ends = np.minimum(starts + step, len(order)) - 1
    # The row of a step of one would be its own partner, and compare with nothing.
    partners[starts] = order[np.where(starts == ends, np.maximum(starts - 1, 0), ends)]
    return partners


def assign_fixed_partners(rows: TokenRows, step: int) -> Array:
    """Return the partner of each row of a table by its number (int64).

    The order of the rows that take part decides; a row that does not is its own partner.
    """
    order = np.arange(len(rows)) if rows.index is None else np.asarray(rows.index)
    partners = np.arange(len(rows.table.lengths))
    partners[order] = rotate_partners(order, step)
    return partners


@dataclass(frozen=True)
class PreferenceCollator:
    """Holds what the layouts share."""

    pad_token_id: int
    width: int | None = None
    """The tokens of each sequence; None for as many as the longest one has."""
    multiple_of: int | None = None
    """Widths are rounded up to a multiple of this."""
    images: ImageInputs | None = None
    """What makes the inputs of pictures; None where no row has one."""

    def _columns(self, items: Sequence[PreferenceItem]) -> dict[str, Array]:
        numbers = np.array([item.number for item in items], np.int64)
        return {"numbers": numbers, "real": np.array([item.real for item in items])}

    def _numbers(self, items: Sequence[PreferenceItem], *names: str) -> dict[str, Array]:
        """Return the named columns of numbers, those of them that the rows have."""
        here = [name for name in names if name in items[0].row]
        return {name: np.array([item.row[name] for item in items]) for name in here}

    def _sequences(self, ids: Sequence[Array]) -> dict[str, Array]:
        """Return sequences below one another, padded on the right, with their mask."""
        lengths = np.array([len(sequence) for sequence in ids])
        multiple = self.multiple_of or 1
        width = -(-(self.width or int(lengths.max())) // multiple) * multiple
        table = np.full((len(ids), width), self.pad_token_id, np.int64)
        for line, sequence in enumerate(ids):
            table[line, : len(sequence)] = sequence
        mask = np.arange(width) < lengths[:, None]
        return {"input_ids": table, "attention_mask": mask.astype(np.int64)}

    def _replies(self, pieces: Sequence[tuple[Array, Array, Array]]) -> dict[str, Array]:
        """Return prompts with their replies; the third part of each piece has what trains of it."""
        columns = self._sequences([np.concatenate(piece[:2]) for piece in pieces])
        trained = np.zeros_like(columns["attention_mask"])
        for line, (prompt, _, spans) in enumerate(pieces):
            # Spans are starts and stops in turn: every second pair of neighbours is a trained
            # stretch, and those between are gaps.
            for start, stop in list(pairwise(spans.tolist()))[::2]:
                trained[line, len(prompt) + start : len(prompt) + stop] = 1
        return columns | {"completion_mask": trained}


class PairCollator(PreferenceCollator):
    """Lays out two replies behind one prompt.

    Where prompts have images, `image_inputs` holds what a model's forward takes besides: pixels,
    first those of all better replies and then those of all worse ones, and the types of tokens.
    """

    def __call__(self, items: Sequence[PreferenceItem]) -> Batch:
        """Lay out some rows; the reference's sums come along where the rows have them."""
        pieces = [
            (item.row["prompt_ids"], item.row[f"{name}_ids"], item.row[f"{name}_spans"])
            for name in ("chosen", "rejected")
            for item in items
        ]
        reference_sums = self._numbers(items, "ref_chosen_logps", "ref_rejected_logps")
        batch = to_tensors(self._replies(pieces) | self._columns(items) | reference_sums)
        return batch if self.images is None else batch | self._image_inputs(items, batch)

    def _image_inputs(self, items: Sequence[PreferenceItem], batch: Batch) -> Batch:
        """Return `image_inputs`; nothing where none of the prompts has an image."""
        import torch

        assert self.images is not None
        pictures = [decode_images(item.images) for item in items]
        pixels = self.images.pixel_inputs(pictures)
        if not pixels:
            return {}
        # Both replies of a row stand behind the same images, which are computed once.
        twice = {name: torch.cat((value, value)) for name, value in pixels.items()}
        return {"image_inputs": twice | self.images.token_type_inputs(batch["input_ids"])}


class UnpairedCollator(PreferenceCollator):
    """Lays out one reply; `label` says whether it is a good one."""

    def __call__(self, items: Sequence[PreferenceItem]) -> Batch:
        """Lay out some rows; the reference's sums come along where the rows have them."""
        return to_tensors(self._all(items))

    def _all(self, items: Sequence[PreferenceItem]) -> dict[str, Array]:
        columns = self._replies([_completion(item.row, item.row) for item in items])
        columns["label"] = np.array([bool(item.row["label"]) for item in items])
        return columns | self._columns(items) | self._numbers(items, "ref_logps", "ref_KL_logps")


class UnpairedKLCollator(UnpairedCollator):
    """Lays out one reply, and the reply of the row's partner behind the same prompt.

    The latter's columns begin with `KL_`.
    """

    def _all(self, items: Sequence[PreferenceItem]) -> dict[str, Array]:
        other = self._replies([_completion(item.row, item.partner) for item in items])
        return super()._all(items) | {f"KL_{name}": array for name, array in other.items()}


class RewardCollator(PreferenceCollator):
    """Lays out two whole conversations, none of which ends with the padding token.

    Models find a sequence's last token as the last one that is no padding token.
    """

    def __call__(self, items: Sequence[PreferenceItem]) -> Batch:
        """Lay out some rows; ValueError for one that ends with the padding token."""
        ids = [item.row[f"{name}_ids"] for name in ("chosen", "rejected") for item in items]
        if any(sequence[-1] == self.pad_token_id for sequence in ids):
            raise ValueError("a row ends with the padding token")
        return to_tensors(self._sequences(ids) | self._columns(items))


def _completion(row: Row, replied: Row) -> tuple[Array, Array, Array]:
    return row["prompt_ids"], replied["completion_ids"], replied["completion_spans"]
