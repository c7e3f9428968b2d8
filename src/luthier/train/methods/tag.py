"""Tags of words: `transformers.AutoModelForTokenClassification`.

Only the first token of a word says its tag, in training and in evaluation (Devlin et al. 2019,
BERT, section 5.3); all others are ignored.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import IGNORE_INDEX, TokenRows
from luthier.data.prepare import PreparedData
from luthier.metrics.classification import OUTSIDE, are_entity_tags, entity_scores
from luthier.model.device import Machine
from luthier.train.methods.heads import (
    LabelSet,
    check_row_lengths,
    collect_tags,
    labels_from_config,
    load_head_model,
)
from luthier.train.methods.labelled import (
    LabelledCollator,
    LabelledMethod,
    LabelledTrainerMixin,
    Padding,
    Row,
    RowLosses,
    RowPrediction,
    pad_rows,
)
from luthier.train.methods.method import TrainerInputs

ENTITY_METRICS = ("entity_precision", "entity_recall", "entity_f1")


class TagMethod(LabelledMethod):
    """Trains a head on words with tags."""

    arguments_class = TrainingArguments

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return a model whose head has an output for each tag."""
        return load_head_model(config, machine, "TOKEN_CLS", collect_tags(prepared))

    def build_trainer(self, inputs: TrainerInputs) -> "TaggingTrainer":
        """Return transformers' Trainer over tagged words."""
        check_row_lengths(inputs.model, inputs.prepared)
        return TaggingTrainer(**inputs.table_arguments())


@dataclass(frozen=True, kw_only=True)
class TaggingCollator(LabelledCollator):
    """Words side by side with their tags: one answer a word."""

    labels: LabelSet

    def encode_labels(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Tag numbers at each word's first token, else IGNORE_INDEX; int64, shape (rows, width)."""
        numbers = self.labels.numbers
        labels = []
        for row in rows:
            tags = np.array([numbers[str(tag)] for tag in json.loads(row["tags"])])
            labels.append(np.where(row["words"] < 0, IGNORE_INDEX, tags[row["words"]]))
        return pad_rows(labels, width, IGNORE_INDEX), np.array([row["trained"] for row in rows])


def tagging_losses(logits: Any, targets: Any, smoothing: float = 0.0) -> RowLosses:
    """The loss of each row, summed over its words, and the tag that is predicted at each token.

    `logits` have the shape (rows, width, tags); `targets` are tag numbers or IGNORE_INDEX, of the
    shape (rows, width).
    """
    logits = logits.float()
    loss = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    )
    return RowLosses(loss.view(targets.shape).sum(dim=1), logits.argmax(dim=-1))


def predict_word_tags(labels: LabelSet, row: Row, token_tags: Sequence[int]) -> list[str]:
    """The tag that the model predicts for each word of a row, from those of its tokens.

    A word without a token, or one that was cut off, counts as outside of all entities, and as
    wrong where there are none.
    """
    blank = OUTSIDE if are_entity_tags(labels.names) else ""
    word_tags = [blank] * len(json.loads(row["tags"]))
    for token in np.flatnonzero(row["words"] >= 0):
        word_tags[row["words"][token]] = labels.names[token_tags[token]]
    return word_tags


class TaggingTrainer(LabelledTrainerMixin, Trainer):
    """Trains and scores words with tags; the tags are those of the model's config."""

    labels: LabelSet

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self.labels = labels_from_config(model.config)
        self._are_entities = are_entity_tags(self.labels.names)
        self.result_metrics = ("accuracy", *(ENTITY_METRICS if self._are_entities else ()))
        super().__init__(model, **kwargs)

    def build_collator(self, model: Any, rows: TokenRows, padding: Padding) -> LabelledCollator:
        """The collator of tagged words."""
        return TaggingCollator(labels=self.labels, **padding)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each row, summed over its words, and the tag predicted at each token."""
        targets = inputs.pop("labels")
        return tagging_losses(model(**inputs).logits, targets, self.label_smoothing)

    def aggregate_metrics(self, table: Any, rows: Sequence[RowPrediction]) -> dict[str, float]:
        """Accuracy over all words, and the scores of entities where tags are of such."""
        targets, predicted = [], []
        for prediction in rows:
            row = table.row(prediction.number)
            targets.append(list(map(str, json.loads(row["tags"]))))
            predicted.append(predict_word_tags(self.labels, row, prediction.prediction))
        hits = [
            tag == target
            for row_tags, row_targets in zip(predicted, targets, strict=True)
            for tag, target in zip(row_tags, row_targets, strict=True)
        ]
        entities = entity_scores(predicted, targets) if self._are_entities else {}
        return {"accuracy": sum(hits) / len(hits), **entities}
