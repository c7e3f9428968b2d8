"""One text from another: `transformers.AutoModelForSeq2SeqLM` in transformers' Seq2SeqTrainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import IGNORE_INDEX
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.heads import check_row_lengths, load_task_config
from luthier.train.methods.labelled import (
    LABELLED_ARGUMENTS,
    LabelledCollator,
    LabelledTrainerMixin,
    Row,
    RowLosses,
    RowPrediction,
    base_model,
    build_labelled_trainer,
    pad_rows,
)
from luthier.train.methods.method import TrainerInputs

TASK = "SEQ_2_SEQ_LM"


class Seq2SeqMethod:
    """Trains an encoder-decoder model on sources and targets."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `transformers.Seq2SeqTrainingArguments`."""
        return build_trainer_arguments(
            Seq2SeqTrainingArguments, config, machine, folder, has_eval, LABELLED_ARGUMENTS
        )

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """An encoder-decoder model."""
        load_task_config(
            config.model, TASK, "seq2seq", "an encoder-decoder model, such as T5 or BART"
        )
        model = load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled, task=TASK
        )
        start = model.generation_config.decoder_start_token_id
        if start is None and model.config.decoder_start_token_id is None:
            raise UserError(
                f"model.path={config.model.path}: its config names no token that a target begins "
                "with. Set it: model.kwargs.decoder_start_token_id=ID (T5 takes its padding token)."
            )
        return model

    def build_trainer(self, given: TrainerInputs) -> "LuthierSeq2SeqTrainer":
        """transformers' Seq2SeqTrainer over sources and targets."""
        for column in ("input_ids", "labels"):
            check_row_lengths(given.model, given.prepared, column)
        return build_labelled_trainer(LuthierSeq2SeqTrainer, given)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqCollator(LabelledCollator):
    """Sources side by side with their targets: one answer a token of the target."""

    def answers(self, rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The targets, padded right with IGNORE_INDEX; int64, shape (rows, longest target)."""
        lengths = np.array([len(row["labels"]) for row in rows])
        longest = self.width or int(lengths.max())
        return pad_rows([row["labels"] for row in rows], longest, IGNORE_INDEX), lengths


class LuthierSeq2SeqTrainer(LabelledTrainerMixin, Seq2SeqTrainer):
    """Trains targets, token by token: the loss is the mean over all of their tokens."""

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self._smoothing = args.label_smoothing_factor
        batching = kwargs["batching"]
        layout = Seq2SeqCollator(
            pad_token_id=kwargs["processing_class"].pad_token_id,
            width=batching.length if batching.constant else None,
        )
        super().__init__(model, args=args, data_collator=layout, **kwargs)
        # Given labels, a model would compute a loss of its own; a few models can only do that.
        self._shift = getattr(base_model(model), "prepare_decoder_input_ids_from_labels", None)

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> RowLosses:
        """The loss of each target, summed over its tokens, and how many of these it says right."""
        wanted = inputs["labels"]
        if self._shift is not None:
            inputs["decoder_input_ids"] = self._shift(labels=inputs.pop("labels"))
        logits = model(**inputs).logits.float()
        smoothing = self._smoothing if self.model.training else 0.0
        loss = cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", label_smoothing=smoothing
        )
        sums = loss.view(wanted.shape).sum(dim=1)
        if self.model.training:
            return RowLosses(sums, torch.zeros_like(sums))
        return RowLosses(sums, (logits.argmax(dim=-1) == wanted).sum(dim=1))

    def aggregate_metrics(self, rows: Any, found: Sequence[RowPrediction]) -> dict[str, float]:
        """The share of tokens that are right, each behind the right ones before it."""
        items = sum(one.items for one in found)
        return {"mean_token_accuracy": sum(one.predicted for one in found) / max(items, 1)}
