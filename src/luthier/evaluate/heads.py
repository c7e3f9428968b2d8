"""Measure classifiers, taggers and reward models by what they decide of each row."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np

from luthier.config.schema import RunConfig
from luthier.data.batching import preference_collators
from luthier.data.encoders.plain_text import OnLong
from luthier.data.encoders.preference import RewardEncoder
from luthier.data.encoders.tasks import ClassificationEncoder, TaggingEncoder
from luthier.data.examples import LocatedExample, OpenedSource
from luthier.errors import UserError
from luthier.evaluate.likelihood import ModelScores, batches_by_length
from luthier.evaluate.rows import (
    EvaluationRow,
    EvaluationRows,
    EvaluationSet,
    encode_rows,
    lenient_length,
    without_length_limit,
)
from luthier.infer.llm import WeightPrecision, parse_weight_precision
from luthier.infer.questions import Question
from luthier.metrics import MetricScores, classification
from luthier.metrics.classification import are_entity_tags
from luthier.model.artifact import Artifact, build_chat_encoder
from luthier.terminal import ProgressReport
from luthier.train.methods.classify import (
    ClassificationCollator,
    classification_losses,
    encode_label,
)
from luthier.train.methods.heads import REGRESSION, LabelSet
from luthier.train.methods.labelled import NumberedRow, RowLosses, model_input_columns
from luthier.train.methods.tag import TaggingCollator, predict_word_tags, tagging_losses

Values = Mapping[str, Any]
_SHOWN = 5


class HeadScorer(ABC):
    """Turns what a model with a head decides of rows into losses, numbers and words."""

    kind: ClassVar[str]
    """The kind of rows that it decides."""

    names: Sequence[str] = ()
    """The labels that it knows."""

    @property
    @abstractmethod
    def better(self) -> dict[str, bool | None]:
        """For each number whether higher is better; rows are won and lost by the first."""

    @abstractmethod
    def read(self, where: str, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with its labels as the model knows them; UserError for others."""

    @abstractmethod
    def question(self, example: Mapping[str, Any]) -> Question:
        """The row as people read it."""

    @abstractmethod
    def losses(self, model: Any, rows: Sequence[Values], pad_token_id: int) -> RowLosses:
        """The loss of each row, summed over its answers, and what the model says of it."""

    def answers(self, row: Values) -> int:
        """How many answers a row has."""
        return int(row["trained"])

    def length(self, row: Values) -> int:
        """The tokens that the model reads of a row."""
        return len(row["input_ids"])

    @abstractmethod
    def score(
        self, items: Sequence[EvaluationRow], predictions: Sequence[Any]
    ) -> tuple[MetricScores, list[str]]:
        """The numbers over all rows, and what was said of each in words."""


class ClassScorer(HeadScorer):
    """Scores classes of texts, or numbers for them."""

    kind = "classification"

    def __init__(self, labels: LabelSet) -> None:
        self.labels, self.names = labels, labels.names

    @property
    def better(self) -> dict[str, bool | None]:
        """Numbers by their errors, classes by their hits."""
        if self.labels.problem_type == REGRESSION:
            return {"mae": False, "rmse": False, "pearson": True}
        return {"accuracy": True, "macro_f1": True, "micro_f1": True}

    def read(self, where: str, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with the names of its classes, or its number."""
        label = example["label"]
        if self.labels.problem_type == REGRESSION:
            # In Python True is an int, and a file that says `true` means no number.
            if isinstance(label, bool) or not isinstance(label, int | float):
                raise UserError(
                    f"{where}: the label {label!r} is no number, and this model says one."
                )
            return {**example}
        # One class in a list and a class by itself are different tasks: neither is guessed.
        is_list = isinstance(label, list)
        if is_list != (self.labels.problem_type == "multi_label_classification"):
            expected_type = "one class" if is_list else "lists of classes"
            raise UserError(
                f"{where}: the label is {label!r}, and this model says {expected_type}."
            )
        named = [
            _named(self.labels, class_name, where) for class_name in (label if is_list else [label])
        ]
        return {**example, "label": named if is_list else named[0]}

    def question(self, example: Mapping[str, Any]) -> Question:
        """The text, or both, and the label."""
        texts = [example[name] for name in ("text", "text_pair") if name in example]
        label = example["label"]
        expected = self._words(label if isinstance(label, list) else [label])
        return _question("\n".join(texts), expected)

    def losses(self, model: Any, rows: Sequence[Values], pad_token_id: int) -> RowLosses:
        """As in training."""
        names = model_input_columns(model, rows[0])
        layout = ClassificationCollator(
            pad_token_id=pad_token_id, columns=names, labels=self.labels
        )
        batch = _on(model, layout([NumberedRow(0, row) for row in rows]))
        logits = model(**{name: batch[name] for name in (*names, "attention_mask")}).logits
        return classification_losses(self.labels, logits, batch["labels"])

    def score(
        self, items: Sequence[EvaluationRow], predictions: Sequence[Any]
    ) -> tuple[MetricScores, list[str]]:
        """Accuracy and F1, or errors."""
        labels = [json.loads(item.values["label"]) for item in items]
        expected = np.stack([encode_label(self.labels, label) for label in labels])
        predicted = np.array(predictions)
        names = np.array(self.labels.names, object)
        if self.labels.problem_type == REGRESSION:
            return classification.regression_samples(predicted, expected), [
                self._words([prediction]) for prediction in predictions
            ]
        if self.labels.problem_type == "multi_label_classification":
            texts = [self._words(names[flags].tolist()) for flags in predicted]
            return classification.multi_label_samples(predicted, expected > 0), texts
        texts = names[predicted].tolist()
        return classification.single_label_samples(predicted, expected, len(names)), texts

    def _words(self, labels: Sequence[Any]) -> str:
        texts = (f"{label:.4g}" if isinstance(label, float) else str(label) for label in labels)
        return ", ".join(texts) or "(none)"


class TagScorer(HeadScorer):
    """Scores tags of words."""

    kind = "tagging"

    def __init__(self, labels: LabelSet) -> None:
        self.labels, self.names = labels, labels.names
        self._are_entities = are_entity_tags(labels.names)

    @property
    def better(self) -> dict[str, bool | None]:
        """Higher is better."""
        names = ("entity_precision", "entity_recall", "entity_f1") if self._are_entities else ()
        return dict.fromkeys(("accuracy", *names), True)

    def read(self, where: str, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with the names of its tags."""
        return {**example, "tags": [_named(self.labels, tag, where) for tag in example["tags"]]}

    def question(self, example: Mapping[str, Any]) -> Question:
        """The words, and their tags."""
        return _question(" ".join(example["tokens"]), " ".join(example["tags"]))

    def losses(self, model: Any, rows: Sequence[Values], pad_token_id: int) -> RowLosses:
        """As in training."""
        layout = TaggingCollator(pad_token_id=pad_token_id, labels=self.labels)
        batch = _on(model, layout([NumberedRow(0, row) for row in rows]))
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        return tagging_losses(logits, batch["labels"])

    def score(
        self, items: Sequence[EvaluationRow], predictions: Sequence[Any]
    ) -> tuple[MetricScores, list[str]]:
        """Accuracy over words, and the scores of entities."""
        predicted = [
            predict_word_tags(self.labels, item.values, prediction)
            for item, prediction in zip(items, predictions, strict=True)
        ]
        expected = [json.loads(item.values["tags"]) for item in items]
        return classification.tag_samples(predicted, expected, self._are_entities), [
            *map(" ".join, predicted)
        ]


class RewardScorer(HeadScorer):
    """Scores rewards by which of two conversations gets the higher one."""

    kind = "preference"

    @property
    def better(self) -> dict[str, bool | None]:
        """The share of pairs in the right order, and by how much."""
        return {"accuracy": True, "margin": True}

    def read(self, where: str, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example: there are no labels."""
        return {**example}

    def question(self, example: Mapping[str, Any]) -> Question:
        """The last thing that was said before the two replies."""
        prompt = example.get("prompt") or [{"content": ""}]
        return _question(str(prompt[-1]["content"]), "chosen above rejected")

    def losses(self, model: Any, rows: Sequence[Values], pad_token_id: int) -> RowLosses:
        """As in training: the loss of Bradley and Terry, and both rewards."""
        import torch
        from torch.nn.functional import logsigmoid

        layout = preference_collators.RewardCollator(pad_token_id)
        batch = _on(
            model,
            layout([preference_collators.PreferenceItem(0, row, row, real=True) for row in rows]),
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        rewards = model(**inputs, use_cache=False).logits.squeeze(-1).float()
        # The collator puts all chosen conversations first, then all rejected ones.
        chosen, rejected = rewards.chunk(2)
        return RowLosses(-logsigmoid(chosen - rejected), torch.stack([chosen, rejected], dim=1))

    def length(self, row: Values) -> int:
        """Both conversations, as long as the longer one."""
        return 2 * max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def score(
        self, items: Sequence[EvaluationRow], predictions: Sequence[Any]
    ) -> tuple[MetricScores, list[str]]:
        """Accuracy and margin."""
        rewards = np.array(predictions, float)
        texts = [
            f"{prediction:+.3g} chosen, {other:+.3g} rejected" for prediction, other in rewards
        ]
        return classification.preference_samples(rewards[:, 0], rewards[:, 1]), texts


def _named(labels: LabelSet, label: Any, where: str) -> str:
    """Return the name of a class, which may also be written as its number; UserError if none."""
    if str(label) in labels.numbers:
        return str(label)
    # Datasets of the hub often hold the number of a class where others have its name.
    if isinstance(label, int) and 0 <= label < len(labels.names):
        return labels.names[label]
    more = ", ..." if len(labels.names) > _SHOWN else ""
    raise UserError(
        f"{where}: the label {label!r} is none of this model's: "
        f"{', '.join(labels.names[:_SHOWN])}{more}. Leave such rows out with dataset.filter."
    )


def _question(text: str, expected: str) -> Question:
    return Question([{"role": "user", "content": text}], {}, expected)


def _on(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


# `HeadModel` has the interface of `WritingModel`, so that one command measures both.


class HeadRowBuilder:
    """Makes items of rows that a head decides."""

    def __init__(self, head: "HeadScorer", encoder: Any) -> None:
        """Take a head, and the encoder of the training's rows."""
        self.kinds: Sequence[str] = (head.kind,)
        self._head, self._encoder = head, encoder

    def add(
        self, rows: EvaluationRows, opened: OpenedSource, placed: Iterable[LocatedExample]
    ) -> None:
        """Add the items of rows of one source; UserError for a label that the model has not."""
        # Labels become the model's own before encoding: a wrong one is reported with its place.
        read = (row._replace(example=self._head.read(row.where, row.example)) for row in placed)
        for row, values in encode_rows(self._encoder, rows, read):
            columns = {n: np.asarray(v) if isinstance(v, list) else v for n, v in values.items()}
            rows.rows.append(
                EvaluationRow(row.where, [], [self._head.question(row.example)], columns)
            )


class HeadModel:
    """Says the labels, tags or scores of rows, as `LLM` says replies; takes the same settings."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        device_map: str | dict[str, Any] | None = None,
        quantization: WeightPrecision = "trained",
        **settings: Any,
    ) -> None:
        """Take an artifact whose task has a head; it is loaded when the block begins."""
        self.artifact = artifact
        self._packing = parse_weight_precision(quantization)
        self._own = {} if device_map is None else {"device_map": device_map}
        self._given = settings
        self._stack = ExitStack()

    def __enter__(self) -> "HeadModel":
        from luthier.infer.llm import read_load_options

        options = read_load_options(self.artifact, self._given)
        self.artifact, _, self.tokenizer = options
        self.model = options.model(self._packing, self._own)
        self._stack.callback(self._release)
        # transformers' sequence classifiers pool at the last token that is not padding, and refuse
        # batches where the config names no padding token.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.head = self._head()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def maker(self, config: RunConfig | None) -> HeadRowBuilder:
        """Return what encodes rows for this model; `config` is that of the run, if there is one."""
        if self.head.kind == "preference":
            chat = without_length_limit(
                build_chat_encoder(self.artifact, self.tokenizer).settings()
            )
            return HeadRowBuilder(self.head, RewardEncoder(self.tokenizer, chat))
        on_long: OnLong = "turns" if config is None else lenient_length(config.chat.on_long)
        # Encoders of classifiers have fixed positions, beyond which an embedding has no row.
        bounds = [self._positions(), None if config is None else config.chat.max_length]
        longest = min((bound for bound in bounds if bound is not None), default=None)
        make = ClassificationEncoder if self.head.kind == "classification" else TaggingEncoder
        return HeadRowBuilder(self.head, make(self.tokenizer, longest, on_long))

    def set_of(
        self, items: EvaluationRows, metrics: Any, config: RunConfig | None
    ) -> EvaluationSet:
        """Return the rows, scored by what the head decides."""
        return EvaluationSet(items, [], self.head.better)

    @property
    def alphabet(self) -> Any:
        """What another model must share for its loss to be of the same: labels."""
        return self.head.names

    def measure(self, each: EvaluationSet, settings: dict[str, Any]) -> ModelScores:
        """Decide all rows, the longest first, and score them."""
        import torch

        items = each.items.rows
        rows: list[Mapping[str, Any]] = [item.values for item in items]
        losses, predictions = np.zeros((len(rows), 2)), list[Any](rows)
        pad = int(self.tokenizer.pad_token_id)
        with torch.inference_mode(), ProgressReport(len(rows), "evaluation") as bar:
            for batch in batches_by_length([self.head.length(row) for row in rows]):
                batch_losses = self.head.losses(self.model, [rows[n] for n in batch], pad)
                for number, loss, prediction in zip(
                    batch, batch_losses.sums, batch_losses.predictions, strict=True
                ):
                    # Batches are sorted by length, so each number goes back to its row's position.
                    losses[number] = loss.item(), self.head.answers(rows[number])
                    predictions[number] = prediction.tolist()
                bar.update(len(batch))
        scored, texts = self.head.score(items, predictions)
        return ModelScores(losses, texts, scored, has_perplexity=False)

    def _head(self) -> "HeadScorer":
        from luthier.train.methods.heads import labels_from_config

        if self.artifact.is_reward:
            return RewardScorer()
        labels = labels_from_config(self.model.config)
        return ClassScorer(labels) if self.artifact.task == "SEQ_CLS" else TagScorer(labels)

    def _positions(self) -> int | None:
        from luthier.train.methods.heads import max_positions
        from luthier.train.methods.labelled import base_model

        return max_positions(base_model(self.model))

    def _release(self) -> None:
        from luthier.infer.generate import release_memory

        # The last reference to the weights: with it the memory can be given back.
        self.model = None
        release_memory()
