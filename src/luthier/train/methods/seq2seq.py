"""One text from another: `transformers.AutoModelForSeq2SeqLM` in transformers' Seq2SeqTrainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import IGNORE_INDEX, TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.heads import check_row_lengths, load_task_config
from luthier.train.methods.labelled import (
    LabelledCollator,
    LabelledMethod,
    LabelledTrainerMixin,
    Padding,
    Row,
    RowLosses,
    RowPrediction,
    base_model,
    pad_rows,
)
from luthier.train.methods.method import TrainerInputs, load_trained_model

TASK = "SEQ_2_SEQ_LM"


class Seq2SeqMethod(LabelledMethod):
    """Trains an encoder-decoder model on sources and targets."""

    arguments_class = Seq2SeqTrainingArguments

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return an encoder-decoder model."""
        needs = "an encoder-decoder model, such as T5 or BART"
        load_task_config(config.model, TASK, "seq2seq", needs)
        model = load_trained_model(config, machine, TASK)
        start = model.generation_config.decoder_start_token_id
        if start is None and model.config.decoder_start_token_id is None:
            raise UserError(
                f"model.path={config.model.path}: its config names no token that a target begins "
                "with. Set it: model.kwargs.decoder_start_token_id=ID (T5 takes its padding token)."
            )
        return model

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierSeq2SeqTrainer":
        """Return transformers' Seq2SeqTrainer over sources and targets."""
        for column in ("input_ids", "labels"):
            check_row_lengths(inputs.model, inputs.prepared, column)
        return LuthierSeq2SeqTrainer(**inputs.table_arguments())


@dataclass(frozen=True, kw_only=True)
class Seq2SeqCollator(LabelledCollator):
    """Sources side by side with their targets: one answer a token of the target."""

    def encode_labels(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The targets, padded right with IGNORE_INDEX; int64, shape (rows, longest target)."""
        lengths = np.array([len(row["labels"]) for row in rows])
        longest = self.width or int(lengths.max())
        return pad_rows([row["labels"] for row in rows], longest, IGNORE_INDEX), lengths


class LuthierSeq2SeqTrainer(LabelledTrainerMixin, Seq2SeqTrainer):
    """Trains targets, token by token: the loss is the mean over all of their tokens."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        # With labels, a model would compute a loss of its own; a few models can only do that.
        self._shift = getattr(base_model(model), "prepare_decoder_input_ids_from_labels", None)

    def build_collator(self, model: Any, rows: TokenRows, padding: Padding) -> LabelledCollator:
        """The collator of sources and targets."""
        return Seq2SeqCollator(**padding)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each target, summed over its tokens, and how many of these are right."""
        targets = inputs["labels"]
        if self._shift is not None:
            inputs["decoder_input_ids"] = self._shift(labels=inputs.pop("labels"))
        logits = model(**inputs).logits.float()
        loss = cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        sums = loss.view(targets.shape).sum(dim=1)
        if self.model.training:
            return RowLosses(sums, torch.zeros_like(sums))
        return RowLosses(sums, (logits.argmax(dim=-1) == targets).sum(dim=1))

    def aggregate_metrics(self, table: Any, rows: Sequence[RowPrediction]) -> dict[str, float]:
        """The share of tokens that are right, each behind the right ones before it."""
        answers = sum(row.answers for row in rows)
        right = sum(row.prediction for row in rows)
        return {"mean_token_accuracy": right / max(answers, 1)}
