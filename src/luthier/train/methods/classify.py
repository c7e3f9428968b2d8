"""Classes, numbers, or several classes of texts: `transformers.AutoModelForSequenceClassification`.

The loss of a row is the cross entropy of its class, the mean binary cross entropy over all classes
where several may hold, or the squared error of a number: those of transformers' own models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import Trainer, TrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.metrics.classification import (
    multi_label_scores,
    regression_scores,
    single_label_scores,
)
from luthier.model.device import Machine
from luthier.train.methods.heads import (
    REGRESSION,
    LabelSet,
    check_row_lengths,
    collect_labels,
    labels_from_config,
    load_head_model,
    set_padding_token,
)
from luthier.train.methods.labelled import (
    LabelledCollator,
    LabelledMethod,
    LabelledTrainerMixin,
    Padding,
    Row,
    RowLosses,
    RowPrediction,
    model_input_columns,
)
from luthier.train.methods.method import TrainerInputs

CLASSIFICATION_METRICS = ("accuracy", "macro_f1", "micro_f1")
REGRESSION_METRICS = ("mae", "rmse", "pearson")


class ClassifyMethod(LabelledMethod):
    """Trains a head on texts with labels."""

    arguments_class = TrainingArguments

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return a model whose head has an output for each label."""
        labels = collect_labels(prepared, config.model.kwargs.get("problem_type"))
        return load_head_model(config, machine, "SEQ_CLS", labels, problem_type=labels.problem_type)

    def build_trainer(self, inputs: TrainerInputs) -> "ClassificationTrainer":
        """Return transformers' Trainer over labelled texts."""
        set_padding_token(inputs.model, inputs.tokenizer, inputs.prepared)
        check_row_lengths(inputs.model, inputs.prepared)
        return ClassificationTrainer(**inputs.table_arguments())


@dataclass(frozen=True, kw_only=True)
class ClassificationCollator(LabelledCollator):
    """Texts side by side with their labels: one answer a row."""

    labels: LabelSet

    def encode_labels(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Class numbers (int64, shape (rows,)), numbers (float32), or flags (rows, classes)."""
        targets = [encode_label(self.labels, json.loads(row["label"])) for row in rows]
        return np.stack(targets), np.ones(len(rows), np.int64)


def encode_label(labels: LabelSet, label: Any) -> np.ndarray:
    """A label as the loss takes it: a float32 number, a flag a class, or the number of a class."""
    if labels.problem_type == REGRESSION:
        return np.array(label, np.float32)
    numbers = labels.numbers
    if labels.problem_type == "multi_label_classification":
        flags = np.zeros(len(numbers), np.float32)
        flags[[numbers[str(name)] for name in label]] = 1
        return flags
    return np.array(numbers[str(label)], np.int64)


def classification_losses(
    labels: LabelSet, logits: Any, targets: Any, smoothing: float = 0.0
) -> RowLosses:
    """The loss of each text, and the class, classes or number that the model predicts.

    `logits`: shape (rows, classes), or (rows, 1) for numbers; `targets`: as `target` gives it.
    """
    logits = logits.float()
    if labels.problem_type == REGRESSION:
        values = logits.squeeze(-1)
        return RowLosses(mse_loss(values, targets, reduction="none"), values)
    if labels.problem_type == "multi_label_classification":
        loss = binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return RowLosses(loss, logits > 0)
    loss = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return RowLosses(loss, logits.argmax(dim=-1))


class ClassificationTrainer(LabelledTrainerMixin, Trainer):
    """Trains and scores texts with labels; the labels are those of the model's config."""

    labels: LabelSet

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self.labels = labels_from_config(model.config)
        problem = self.labels.problem_type
        self.result_metrics = (
            REGRESSION_METRICS if problem == REGRESSION else CLASSIFICATION_METRICS
        )
        if args.label_smoothing_factor and problem != "single_label_classification":
            raise UserError(
                "trainer.args.label_smoothing_factor is for one class a text, and this is a "
                f"{problem.replace('_', ' ')}. Remove it."
            )
        super().__init__(model, args=args, **kwargs)

    def build_collator(self, model: Any, rows: TokenRows, padding: Padding) -> LabelledCollator:
        """The collator of labelled texts."""
        columns = model_input_columns(model, rows.table.row(0))
        return ClassificationCollator(columns=columns, labels=self.labels, **padding)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each text, and the class, classes or number that the model predicts."""
        targets = inputs.pop("labels")
        logits = model(**inputs).logits
        return classification_losses(self.labels, logits, targets, self.label_smoothing)

    def aggregate_metrics(self, table: Any, rows: Sequence[RowPrediction]) -> dict[str, float]:
        """The metrics over all texts."""
        labels = [json.loads(table.row(row.number)["label"]) for row in rows]
        targets = np.stack([encode_label(self.labels, label) for label in labels])
        predicted = np.array([row.prediction for row in rows])
        if self.labels.problem_type == REGRESSION:
            return regression_scores(predicted, targets)
        if self.labels.problem_type == "multi_label_classification":
            return multi_label_scores(predicted, targets > 0)
        return single_label_scores(predicted, targets, len(self.labels.names))
