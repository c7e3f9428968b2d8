"""Prompts as rows of a trainer that has its model answer them, with the columns for rewards."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from trl.trainer.utils import RepeatSampler

from luthier.config.schema import RunConfig
from luthier.data.batching.rows import TokenRows
from luthier.data.encode_source import Encoded
from luthier.data.encoders.prompts import parted, reference_of
from luthier.data.prepare import Prepared
from luthier.data.store.table import JoinedTable
from luthier.model.encoder import make_encoder

RESERVED = frozenset(
    ["prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids",
     "trainer_state", "log_extra", "log_metric", "environment", "environments", "image", "images"]
)  # fmt: skip
"""Names that TRL itself gives to reward functions, or reads from a row."""


class PromptRows:
    """Prompts by number: `prompt` (messages), `prompt_ids`, `reference`, and the row's columns.

    `reference` is the text of the reply that the conversation ends with, if the row has no column
    of this name. Every row has every column, null where its source has none.
    """

    def __init__(self, rows: TokenRows, parts: Iterable[Encoded]) -> None:
        """`parts`: those whose token rows the table joins, in any order."""
        assert isinstance(rows.table, JoinedTable)
        by_table = {id(part.tokens): part for part in parts}
        self._parts = [by_table[id(table)] for table in rows.table.tables]
        self._tokens = rows.table
        count = len(rows)
        self._index = np.arange(count) if rows.index is None else rows.index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        example, own = self._row(int(self._index[number]))
        ids = self._tokens.row(int(self._index[number]))["input_ids"]
        columns: dict[str, Any] = dict.fromkeys(self.names) | {"reference": reference_of(example)}
        columns |= {name: value for name, value in own.items() if name not in RESERVED}
        return {"prompt": parted(example)[0], "prompt_ids": ids.tolist(), **columns}

    @cached_property
    def names(self) -> list[str]:
        """The columns of all rows besides the prompt, `reference` first."""
        found = dict.fromkeys(["reference"])
        for number in np.unique(self._index):
            found |= dict.fromkeys(self._row(int(number))[1])
        return [name for name in found if name not in RESERVED]

    def columns(self) -> dict[str, list[Any]]:
        """Each column over all different rows."""
        numbers = np.unique(self._index, return_index=True)[1]
        rows = [self[int(number)] for number in numbers]
        return {name: [row[name] for row in rows] for name in self.names}

    @cached_property
    def _numbers(self) -> list[Any]:
        """For each part, the rows that make a prompt."""
        return [np.flatnonzero(part.sequences > 0) for part in self._parts]

    def _row(self, number: int) -> tuple[Any, Mapping[str, Any]]:
        """The example and the columns of a prompt of the table."""
        starts = [self._tokens.start_of(n) for n in range(len(self._parts))]
        table = int(np.searchsorted(starts, number, side="right")) - 1
        row = [int(self._numbers[table][number - starts[table]])]
        part = self._parts[table]
        return part.examples(row)[0], part.columns(row)[0]


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, of which each stands once for each of its completions.

    TRL draws the order of an epoch behind that of the one before, so a run that goes on in a later
    epoch would see the first one's again. Here it depends on the seed and the epoch alone.
    """

    epoch = 0

    @classmethod
    def like(cls, other: RepeatSampler) -> "PromptSampler":
        """One that repeats prompts as TRL's own does."""
        return cls(
            other.data_source,
            mini_repeat_count=other.mini_repeat_count,
            batch_size=other.batch_size,
            repeat_count=other.repeat_count,
            shuffle=other.shuffle,
            seed=other.seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            state = np.random.SeedSequence([self.seed or 0, self.epoch]).generate_state(1)
            self.generator.manual_seed(int(state[0]))
        return super().__iter__()


def stop_ids(config: RunConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a reply, by the run's chat template."""
    encoder = make_encoder(config, tokenizer)
    assert encoder is not None, "the prompts have come from it"
    return encoder.stop_token_ids


def prompt_rows(prepared: Prepared) -> tuple[PromptRows, dict[str, PromptRows]]:
    """The prompts to train on, and those of each evaluation set by name; the only one has none."""
    assert isinstance(prepared.train, TokenRows)
    parts = list(prepared.parts.values())
    sets = {name: PromptRows(rows, parts) for name, rows in prepared.eval.items()}
    if len(sets) == 1:
        sets = {"": next(iter(sets.values()))}
    return PromptRows(prepared.train, parts), sets
