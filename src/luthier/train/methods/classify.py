"""Classes, numbers, or several classes of texts: `transformers.AutoModelForSequenceClassification`.

The loss of a row is the cross entropy of its class, the mean binary cross entropy over all classes
where several may hold, or the squared error of a number: those of transformers' own models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import Trainer, TrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.metrics.classification import (
    multi_label_scores,
    regression_scores,
    single_label_scores,
)
from luthier.model.device import Machine
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.heads import (
    REGRESSION,
    Labelled,
    LabelSet,
    check_row_lengths,
    collect_labels,
    labels_from_config,
    load_head_model,
    set_padding_token,
)
from luthier.train.methods.labelled import (
    LABELLED_ARGUMENTS,
    LabelledCollator,
    Row,
    RowLosses,
    RowPrediction,
    build_labelled_trainer,
    model_input_columns,
)
from luthier.train.methods.method import TrainerInputs

CLASSIFICATION_METRICS = ("accuracy", "macro_f1", "micro_f1")
REGRESSION_METRICS = ("mae", "rmse", "pearson")


class ClassifyMethod:
    """Trains a head on texts with labels."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `transformers.TrainingArguments`."""
        return build_trainer_arguments(
            TrainingArguments, config, machine, folder, has_eval, LABELLED_ARGUMENTS
        )

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A model whose head has an output for each label."""
        labels = collect_labels(prepared, config.model.kwargs.get("problem_type"))
        return load_head_model(config, machine, "SEQ_CLS", labels, problem_type=labels.problem)

    def build_trainer(self, given: TrainerInputs) -> "ClassificationTrainer":
        """transformers' Trainer over labelled texts."""
        set_padding_token(given.model, given.tokenizer, given.prepared)
        check_row_lengths(given.model, given.prepared)
        return build_labelled_trainer(ClassificationTrainer, given)


@dataclass(frozen=True, kw_only=True)
class ClassificationCollator(LabelledCollator):
    """Texts side by side with their labels: one answer a row."""

    labels: LabelSet

    def answers(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Class numbers (int64, shape (rows,)), numbers (float32), or flags (rows, classes)."""
        targets = [encode_label(self.labels, json.loads(row["label"])) for row in rows]
        return np.stack(targets), np.ones(len(rows), np.int64)


def encode_label(labels: LabelSet, label: Any) -> np.ndarray:
    """A label as the loss takes it."""
    if labels.problem == REGRESSION:
        return np.array(label, np.float32)
    known = labels.numbers
    if labels.problem == "multi_label_classification":
        flags = np.zeros(len(known), np.float32)
        flags[[known[str(one)] for one in label]] = 1
        return flags
    return np.array(known[str(label)], np.int64)


def classification_losses(
    labels: LabelSet, logits: Any, wanted: Any, smoothing: float = 0.0
) -> RowLosses:
    """The loss of each text, and the class, classes or number that the model says.

    `logits`: shape (rows, classes), or (rows, 1) for numbers; `wanted`: as `target` gives it.
    """
    logits = logits.float()
    if labels.problem == REGRESSION:
        said = logits.squeeze(-1)
        return RowLosses(mse_loss(said, wanted, reduction="none"), said)
    if labels.problem == "multi_label_classification":
        loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
        return RowLosses(loss, logits > 0)
    loss = cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)
    return RowLosses(loss, logits.argmax(dim=-1))


class ClassificationTrainer(Labelled, Trainer):
    """Trains and scores texts with labels; the labels are those of the model's config."""

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self.labels = labels_from_config(model.config)
        self.result_metrics = (
            REGRESSION_METRICS if self.labels.problem == REGRESSION else CLASSIFICATION_METRICS
        )
        self._smoothing = args.label_smoothing_factor
        if self._smoothing and self.labels.problem != "single_label_classification":
            raise UserError(
                "trainer.args.label_smoothing_factor is for one class a text, and this is a "
                f"{self.labels.problem.replace('_', ' ')}. Remove it."
            )
        batching, rows = kwargs["batching"], kwargs["train_dataset"]
        layout = ClassificationCollator(
            pad_token_id=kwargs["processing_class"].pad_token_id,
            width=batching.length if batching.constant else None,
            names=model_input_columns(model, rows.table.row(0)),
            labels=self.labels,
        )
        super().__init__(model, args=args, data_collator=layout, **kwargs)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each text, and the class, classes or number that the model says."""
        wanted = inputs.pop("labels")
        smoothing = self._smoothing if self.model.training else 0.0
        return classification_losses(self.labels, model(**inputs).logits, wanted, smoothing)

    def aggregate_metrics(self, rows: Any, found: Sequence[RowPrediction]) -> dict[str, float]:
        """Metrics over all texts."""
        labels = [json.loads(rows.row(one.number)["label"]) for one in found]
        wanted = np.stack([encode_label(self.labels, label) for label in labels])
        said = np.array([one.predicted for one in found])
        if self.labels.problem == REGRESSION:
            return regression_scores(said, wanted)
        if self.labels.problem == "multi_label_classification":
            return multi_label_scores(said, wanted > 0)
        return single_label_scores(said, wanted, len(self.labels.names))
