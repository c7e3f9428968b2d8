"""Trainers over tables of rows with an answer each: every loss is a mean over all answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object

from luthier.data.batching.samplers import RowTuple, SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.batching.token_rows import TokenRows
from luthier.train.methods.method import TrainerInputs
from luthier.train.trainers.base import LoaderMixin

BuiltTrainer = TypeVar("BuiltTrainer")
PADDING_ROW = -1
"""The number of a row that only fills up a batch, so that all processes have as many; it counts
nothing."""


Row = Mapping[str, Any]
"""The columns of one row."""
LABELLED_ARGUMENTS = {"remove_unused_columns": False, "label_names": ["labels"]}
"""What the arguments of such a trainer must say."""


class NumberedRow(NamedTuple):
    """A row of the table and its number there."""

    number: int
    row: Row


class RowLosses(NamedTuple):
    """What a forward pass gives for each row of a batch."""

    sums: torch.Tensor
    """The loss summed over the row's answers, shape (rows,)."""
    predicted: torch.Tensor
    """What the model says, one entry a row."""


class RowPrediction(NamedTuple):
    """What an evaluation found for one row."""

    number: int
    loss: float
    items: int
    predicted: Any


class NumberedRows(SampledDataset):
    """Gives rows of the table as they are, one at a time."""

    def __getitem__(self, numbers: RowTuple) -> NumberedRow:  # type: ignore[override]
        # What fills up a batch is a true row, as models may refuse others.
        number = numbers[0] if numbers else PADDING_ROW
        return NumberedRow(number, self.table.row(max(number, 0)))


@dataclass(frozen=True, kw_only=True)
class LabelledCollator(ABC):
    """Rows of token ids side by side, padded on the right, with a mask by length."""

    pad_token_id: int
    width: int | None = None
    """The tokens of each row; None for as many as the longest one has."""
    names: tuple[str, ...] = ("input_ids",)
    """The columns of token rows that the model takes; all as long as `input_ids`."""

    def __call__(self, rows: Sequence[NumberedRow]) -> dict[str, torch.Tensor]:
        """Give the columns and `attention_mask` (int64, shape (rows, width)), and what is to be
        said: `labels`, and `items`, how many answers each row has. `numbers` are those of the rows.
        """
        lengths = np.array([len(row["input_ids"]) for _, row in rows])
        width = self.width or int(lengths.max())
        batch = {
            name: pad_rows([row[name] for _, row in rows], width, self._blank(name))
            for name in self.names
        }
        labels, items = self.answers([row for _, row in rows], width)
        numbers = np.array([number for number, _ in rows])
        batch |= {
            "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
            "labels": labels,
            "items": np.where(numbers == PADDING_ROW, 0, items),
            "numbers": numbers,
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @abstractmethod
    def answers(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The labels of the rows as the loss takes them, and how many answers each row has."""

    def _blank(self, name: str) -> int:
        return self.pad_token_id if name == "input_ids" else 0


def pad_rows(rows: Sequence[Any], width: int, blank: int) -> np.ndarray:
    """Rows of numbers as int64, shape (rows, width), filled up with `blank`."""
    table = np.full((len(rows), width), blank, np.int64)
    for line, row in enumerate(rows):
        table[line, : len(row)] = row
    return table


class LabelledTrainerMixin(LoaderMixin):
    """Stands before a trainer of transformers: `class Mine(Tabled, Trainer)`.

    The loss is a mean over all answers (rows, words or tokens): of the whole step in training, of
    the whole set in evaluation. So neither the batch size, nor gradient accumulation, nor the
    number of processes changes it. Metrics are computed once, over all rows of the set.
    """

    # compute_loss divides by the step's answers itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self, model: Any, *, train_dataset: TokenRows, batching: BatchingSettings, **kwargs: Any
    ) -> None:
        """Take what Trainer takes, with rows of a table as datasets."""
        self.batching = batching
        super().__init__(model=model, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._found: list[RowPrediction] = []

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The losses of a batch, and what the model says; `inputs` has the labels."""
        raise NotImplementedError

    def aggregate_metrics(self, rows: Any, found: Sequence[RowPrediction]) -> dict[str, float]:
        """The metrics of an evaluation: `found` has each row of the table `rows` that took part."""
        raise NotImplementedError

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows as they are, with their numbers."""
        return NumberedRows(sampler)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """How many answers a step has, over all its batches and all processes."""
        items = torch.stack([batch["items"].sum() for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items.to(device)).sum()
        return items.to(device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed loss over the step's answers, which all ranks count together."""
        inputs = dict(inputs)
        numbers, items = inputs.pop("numbers"), inputs.pop("items")
        sums, predicted = self.row_losses(model, inputs)
        sums = torch.where(items > 0, sums, 0)
        count = items.sum() if num_items_in_batch is None else num_items_in_batch
        # Clamped, so that a batch of rows that only fill it up is a loss of 0 and not 0 / 0.
        loss = sums.sum() / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages gradients over ranks, and the count is of all of them.
            loss = loss * self.accelerator.num_processes
        if not self.model.training:
            columns = (part.tolist() for part in (numbers, sums, items, predicted))
            rows = map(RowPrediction._make, zip(*columns, strict=True))
            self._found += [row for row in rows if row.number != PADDING_ROW]
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with loss and metrics of the whole set."""
        self._found.clear()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = gather_object(self._found) if self.args.world_size > 1 else self._found
        if found:
            items = sum(row.items for row in found)
            scores = self.aggregate_metrics(dataloader.dataset.table, found)
            scores["loss"] = math.fsum(row.loss for row in found) / max(items, 1)
            output.metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
        return output


def base_model(model: Any) -> Any:
    """The model of transformers below an adapter."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_input_columns(model: Any, row: Row) -> tuple[str, ...]:
    """Which columns of a token row a model takes: segment ids only where its forward knows them."""
    known = signature(base_model(model).forward).parameters
    return tuple(n for n in ("input_ids", "token_type_ids") if n in row and n in known)


def build_labelled_trainer(kind: Callable[..., BuiltTrainer], given: TrainerInputs) -> BuiltTrainer:
    """The trainer of this kind for a run, over the tables that were prepared."""
    return kind(
        given.model,
        args=given.args,
        train_dataset=given.prepared.train,
        eval_dataset=evaluation_rows(given.prepared.eval),
        batching=read_batching_settings(given.config),
        processing_class=given.tokenizer,
        callbacks=given.callbacks,
    )


def evaluation_rows(sets: dict[str, TokenRows]) -> Any:
    """The evaluation sets as a trainer takes them: the only one has no name."""
    return next(iter(sets.values())) if len(sets) == 1 else sets or None
