"""Trainers over rows with labels: every loss is a mean over all answers of a step or a set.

An answer is the label of a text, the tag of a word, or a token of a target. The trainers of
`classify`, `tag` and `seq2seq` share what stands here, and `luthier.evaluate` its collators.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from luthier.config.schema import RunConfig
from luthier.data.batching.samplers import RowTuple, SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.storage.atomic import write_json
from luthier.train.methods.heads import LabelSet
from luthier.train.methods.method import TrainingMethod
from luthier.train.trainers.base import TrainerMixin

PADDING_ROW = -1
"""The number of a row that only fills up a batch, so that all processes have as many; it counts
nothing."""
Row = Mapping[str, Any]
"""The columns of one row."""
Padding = dict[str, Any]
"""The arguments `pad_token_id` and `width` of a collator."""


class LabelledMethod(TrainingMethod):
    """A method whose rows have labels."""

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """Rows keep their columns, and `labels` are what Trainer takes for such."""
        return {"remove_unused_columns": False, "label_names": ["labels"]}


class NumberedRow(NamedTuple):
    """A row of the table and its number there."""

    number: int
    row: Row


class RowLosses(NamedTuple):
    """What a forward pass yields for each row of a batch."""

    sums: torch.Tensor
    """The loss summed over the row's answers, shape (rows,)."""
    predictions: torch.Tensor
    """What the model predicts, one entry a row."""


class RowPrediction(NamedTuple):
    """What an evaluation yields for one row."""

    number: int
    loss: float
    """Summed over the row's answers."""
    answers: int
    prediction: Any


class NumberedRows(SampledDataset):
    """The rows of a table as they are, one at a time, each with its number."""

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
    columns: tuple[str, ...] = ("input_ids",)
    """The columns of token rows that the model takes; all as long as `input_ids`."""

    def __call__(self, rows: Sequence[NumberedRow]) -> dict[str, torch.Tensor]:
        """Return the columns and `attention_mask` (int64, shape (rows, width)), and the answers.

        These are `labels`, and `items`, how many answers each row has. `numbers` are those of the
        rows.
        """
        lengths = np.array([len(row["input_ids"]) for _, row in rows])
        width = self.width or int(lengths.max())
        batch = {
            name: pad_rows(
                [row[name] for _, row in rows],
                width,
                self.pad_token_id if name == "input_ids" else 0,
            )
            for name in self.columns
        }
        labels, counts = self.encode_labels([row for _, row in rows], width)
        numbers = np.array([number for number, _ in rows])
        batch |= {
            "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
            "labels": labels,
            "items": np.where(numbers == PADDING_ROW, 0, counts),
            "numbers": numbers,
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @abstractmethod
    def encode_labels(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The labels of the rows as the loss takes them, and how many answers each row has."""


def pad_rows(rows: Sequence[Any], width: int, padding: int) -> np.ndarray:
    """Rows of numbers as int64, shape (rows, width), filled up with `padding` on the right."""
    table = np.full((len(rows), width), padding, np.int64)
    for line, row in enumerate(rows):
        table[line, : len(row)] = row
    return table


def model_input_columns(model: Any, row: Row) -> tuple[str, ...]:
    """The columns of a token row that a model takes.

    Those are the ids, and segment ids where the row has them and the model's forward takes them.
    """
    parameters = signature(base_model(model).forward).parameters
    return tuple(n for n in ("input_ids", "token_type_ids") if n in row and n in parameters)


def base_model(model: Any) -> Any:
    """The model of transformers below an adapter; the model itself where it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class LabelledTrainerMixin(TrainerMixin):
    """Stands before a trainer of transformers: `TaggingTrainer(LabelledTrainerMixin, Trainer)`.

    The loss is a mean over all answers (rows, words or tokens): of the whole step in training, of
    the whole set in evaluation. So neither the batch size, nor gradient accumulation, nor the
    number of processes changes it. Metrics are computed once, over all rows of the set.
    """

    # compute_loss divides by the step's answers itself.
    loss_is_scaled_for_ga = True
    labels: LabelSet | None = None
    """The labels of the model's head; None for a model that has no such head."""

    def __init__(
        self,
        model: Any,
        *,
        train_dataset: TokenRows,
        batching: BatchingSettings,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        """Take what Trainer takes, with rows of a table as datasets."""
        self.batching = batching
        self._predictions: list[RowPrediction] = []
        padding: Padding = {
            "pad_token_id": processing_class.pad_token_id,
            "width": batching.length if batching.constant else None,
        }
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            data_collator=self.build_collator(model, train_dataset, padding),
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True

    # What a trainer of this family defines.

    def build_collator(self, model: Any, rows: TokenRows, padding: Padding) -> LabelledCollator:
        """The collator for the rows."""
        raise NotImplementedError

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The losses of a batch, and what the model predicts; `inputs` has the labels."""
        raise NotImplementedError

    def aggregate_metrics(self, table: Any, rows: Sequence[RowPrediction]) -> dict[str, float]:
        """The metrics of an evaluation; `rows` are those of the table that took part."""
        raise NotImplementedError

    # Training and evaluation.

    @property
    def label_smoothing(self) -> float:
        """The label smoothing of the loss; 0 in evaluation."""
        return self.args.label_smoothing_factor if self.model.training else 0.0

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
        sums, predictions = self.row_losses(model, inputs)
        # What is not finite in a row that fills up the batch must not count.
        sums = torch.where(items > 0, sums, 0)
        count = items.sum() if num_items_in_batch is None else num_items_in_batch
        # Clamped, so that a batch of rows that only fill it up is a loss of 0 and not 0 / 0.
        loss = sums.sum() / torch.as_tensor(count).clamp(min=1)
        loss = self._scale_over_ranks(loss, num_items_in_batch)
        if not self.model.training:
            columns = (values.tolist() for values in (numbers, sums, items, predictions))
            rows = map(RowPrediction._make, zip(*columns, strict=True))
            self._predictions += [row for row in rows if row.number != PADDING_ROW]
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with loss and metrics of the whole set."""
        self._predictions.clear()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        predictions = self._predictions
        if self.args.world_size > 1:
            predictions = gather_object(predictions)
        if predictions:
            answers = sum(row.answers for row in predictions)
            metrics = self.aggregate_metrics(dataloader.dataset.table, predictions)
            metrics["loss"] = math.fsum(row.loss for row in predictions) / max(answers, 1)
            output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does, and beside an adapter the labels, which it has no config for.

        With the content of labels.json as `labels`, and whole numbers as the keys of its
        `id2label`, `from_pretrained(base, **labels)` makes the base that the adapter goes on.
        """
        super().save_model(output_dir, _internal_call)
        is_adapter = isinstance(self.model, PeftModel)
        if self.args.should_save and is_adapter and self.labels is not None:
            folder = Path(output_dir or self.args.output_dir)
            problem = {"problem_type": self.model.config.problem_type}
            write_json(folder / "labels.json", self.labels.config_settings() | problem)
