"""Tags of words: `transformers.AutoModelForTokenClassification`.

Only the first token of a word says its tag, in training and in evaluation (Devlin et al. 2019,
BERT, section 5.3); all others are ignored.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import IGNORE_INDEX
from luthier.data.prepare import PreparedData
from luthier.metrics.classification import OUTSIDE, are_entity_tags, entity_scores
from luthier.model.device import Machine
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.heads import (
    Labelled,
    LabelSet,
    check_row_lengths,
    collect_tags,
    labels_from_config,
    load_head_model,
)
from luthier.train.methods.labelled import (
    LABELLED_ARGUMENTS,
    LabelledCollator,
    Row,
    RowLosses,
    RowPrediction,
    build_labelled_trainer,
    pad_rows,
)
from luthier.train.methods.method import TrainerInputs

ENTITY_METRICS = ("entity_precision", "entity_recall", "entity_f1")


class TagMethod:
    """Trains a head on words with tags."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `transformers.TrainingArguments`."""
        return build_trainer_arguments(
            TrainingArguments, config, machine, folder, has_eval, LABELLED_ARGUMENTS
        )

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A model whose head has an output for each tag."""
        return load_head_model(config, machine, "TOKEN_CLS", collect_tags(prepared))

    def build_trainer(self, given: TrainerInputs) -> "TaggingTrainer":
        """transformers' Trainer over tagged words."""
        check_row_lengths(given.model, given.prepared)
        return build_labelled_trainer(TaggingTrainer, given)


@dataclass(frozen=True, kw_only=True)
class TaggingCollator(LabelledCollator):
    """Words side by side with their tags: one answer a word."""

    labels: LabelSet

    def answers(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Tag numbers at each word's first token, else IGNORE_INDEX; int64, shape (rows, width)."""
        known = self.labels.numbers
        tags = [[known[str(tag)] for tag in json.loads(row["tags"])] for row in rows]
        labels = [
            np.where(row["words"] < 0, IGNORE_INDEX, np.array(own)[row["words"]])
            for row, own in zip(rows, tags, strict=True)
        ]
        return pad_rows(labels, width, IGNORE_INDEX), np.array([row["trained"] for row in rows])


def tagging_losses(logits: Any, wanted: Any, smoothing: float = 0.0) -> RowLosses:
    """The loss of each row, summed over its words, and the tag that each token says.

    `logits`: shape (rows, width, tags); `wanted`: tag numbers or IGNORE_INDEX, shape (rows, width).
    """
    logits = logits.float()
    loss = cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), reduction="none", label_smoothing=smoothing
    )
    return RowLosses(loss.view(wanted.shape).sum(dim=1), logits.argmax(dim=-1))


def predict_word_tags(labels: LabelSet, row: Row, predicted: Sequence[int]) -> list[str]:
    """The tag that the model says for each word of a row; `predicted`: those of its tokens.

    A word without a token, or one that was cut off, counts as outside of all entities, and as
    wrong where there are none.
    """
    blank = OUTSIDE if are_entity_tags(labels.names) else ""
    said = [blank] * len(json.loads(row["tags"]))
    for place in np.flatnonzero(row["words"] >= 0):
        said[row["words"][place]] = labels.names[predicted[place]]
    return said


class TaggingTrainer(Labelled, Trainer):
    """Trains and scores words with tags; the tags are those of the model's config."""

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self.labels = labels_from_config(model.config)
        self._are_entities = are_entity_tags(self.labels.names)
        self.result_metrics = ("accuracy", *ENTITY_METRICS) if self._are_entities else ("accuracy",)
        self._smoothing = args.label_smoothing_factor
        batching = kwargs["batching"]
        layout = TaggingCollator(
            pad_token_id=kwargs["processing_class"].pad_token_id,
            width=batching.length if batching.constant else None,
            labels=self.labels,
        )
        super().__init__(model, args=args, data_collator=layout, **kwargs)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each row, summed over its words, and the tag that each token says."""
        wanted = inputs.pop("labels")
        smoothing = self._smoothing if self.model.training else 0.0
        return tagging_losses(model(**inputs).logits, wanted, smoothing)

    def aggregate_metrics(self, rows: Any, found: Sequence[RowPrediction]) -> dict[str, float]:
        """Accuracy over all words, and the scores of entities where tags are of such."""
        wanted, said = [], []
        for one in found:
            row = rows.row(one.number)
            wanted.append(list(map(str, json.loads(row["tags"]))))
            said.append(predict_word_tags(self.labels, row, one.predicted))
        pairs = [pair for row in zip(said, wanted, strict=True) for pair in zip(*row, strict=True)]
        accuracy = sum(one == other for one, other in pairs) / len(pairs)
        entities = entity_scores(said, wanted) if self._are_entities else {}
        return {"accuracy": accuracy, **entities}
