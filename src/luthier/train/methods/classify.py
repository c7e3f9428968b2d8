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
from luthier.train.methods.base import TrainerInputs
from luthier.train.methods.heads import (
    REGRESSION,
    Labelled,
    Labels,
    check_positions,
    find_labels,
    labels_of,
    load_head,
    share_padding,
)
from luthier.train.methods.labelled import OWN, Found, Layout, Losses, Row, columns_for, over_tables

CLASSES = ("accuracy", "macro_f1", "micro_f1")
NUMBERS = ("mae", "rmse", "pearson")


class Classify:
    """Trains a head on texts with labels."""

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The `transformers.TrainingArguments`."""
        return build_trainer_arguments(TrainingArguments, config, machine, folder, has_eval, OWN)

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A model whose head has an output for each label."""
        labels = find_labels(prepared, config.model.kwargs.get("problem_type"))
        return load_head(config, machine, "SEQ_CLS", labels, problem_type=labels.problem)

    def trainer(self, given: TrainerInputs) -> "ClassTrainer":
        """transformers' Trainer over labelled texts."""
        share_padding(given.model, given.tokenizer, given.prepared)
        check_positions(given.model, given.prepared)
        return over_tables(ClassTrainer, given)


@dataclass(frozen=True, kw_only=True)
class ClassLayout(Layout):
    """Texts side by side with their labels: one answer a row."""

    labels: Labels

    def answers(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Class numbers (int64, shape (rows,)), numbers (float32), or flags (rows, classes)."""
        targets = [target(self.labels, json.loads(row["label"])) for row in rows]
        return np.stack(targets), np.ones(len(rows), np.int64)


def target(labels: Labels, label: Any) -> np.ndarray:
    """A label as the loss takes it."""
    if labels.problem == REGRESSION:
        return np.array(label, np.float32)
    known = labels.numbers
    if labels.problem == "multi_label_classification":
        flags = np.zeros(len(known), np.float32)
        flags[[known[str(one)] for one in label]] = 1
        return flags
    return np.array(known[str(label)], np.int64)


def class_losses(labels: Labels, logits: Any, wanted: Any, smoothing: float = 0.0) -> Losses:
    """The loss of each text, and the class, classes or number that the model says.

    `logits`: shape (rows, classes), or (rows, 1) for numbers; `wanted`: as `target` gives it.
    """
    logits = logits.float()
    if labels.problem == REGRESSION:
        said = logits.squeeze(-1)
        return Losses(mse_loss(said, wanted, reduction="none"), said)
    if labels.problem == "multi_label_classification":
        loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
        return Losses(loss, logits > 0)
    loss = cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)
    return Losses(loss, logits.argmax(dim=-1))


class ClassTrainer(Labelled, Trainer):
    """Trains and scores texts with labels; the labels are those of the model's config."""

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self.labels = labels_of(model.config)
        self.shown = NUMBERS if self.labels.problem == REGRESSION else CLASSES
        self._smoothing = args.label_smoothing_factor
        if self._smoothing and self.labels.problem != "single_label_classification":
            raise UserError(
                "trainer.args.label_smoothing_factor is for one class a text, and this is a "
                f"{self.labels.problem.replace('_', ' ')}. Remove it."
            )
        batching, rows = kwargs["batching"], kwargs["train_dataset"]
        layout = ClassLayout(
            pad_token_id=kwargs["processing_class"].pad_token_id,
            width=batching.length if batching.constant else None,
            names=columns_for(model, rows.table.row(0)),
            labels=self.labels,
        )
        super().__init__(model, args=args, data_collator=layout, **kwargs)

    def losses(self, model: Any, inputs: dict[str, Any]) -> Losses:
        """The loss of each text, and the class, classes or number that the model says."""
        wanted = inputs.pop("labels")
        smoothing = self._smoothing if self.model.training else 0.0
        return class_losses(self.labels, model(**inputs).logits, wanted, smoothing)

    def scores(self, rows: Any, found: Sequence[Found]) -> dict[str, float]:
        """Metrics over all texts."""
        labels = [json.loads(rows.row(one.number)["label"]) for one in found]
        wanted = np.stack([target(self.labels, label) for label in labels])
        said = np.array([one.predicted for one in found])
        if self.labels.problem == REGRESSION:
            return regression_scores(said, wanted)
        if self.labels.problem == "multi_label_classification":
            return multi_label_scores(said, wanted > 0)
        return single_label_scores(said, wanted, len(self.labels.names))
