"""Supervised fine-tuning and pretraining: TRL's SFTTrainer over rows that are tokens."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import SFTTrainer

from luthier.config.schema import RunConfig
from luthier.data.batching.collators import uses_flattening
from luthier.data.batching.image_collators import ImageInputs
from luthier.data.batching.samplers import SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.model.device import Machine
from luthier.model.model_class import check_image_attention
from luthier.train.arguments import build_sft_arguments
from luthier.train.console import print_line
from luthier.train.dataloaders import (
    StreamDataset,
    as_token_rows,
    build_collator,
    build_stream_loader,
    check_stream_arguments,
    flatten_packed_batch,
)
from luthier.train.methods.method import TrainerInputs, TrainingMethod
from luthier.train.methods.token_loss import TokenLoss
from luthier.train.packing_check import DocumentIsolation, check_isolation, expect_batch
from luthier.train.trainers.base import TrainerMixin, keep_weight_precision

_FACTS = ("tokens", "documents", "columns")
"""What a batch says of itself, and no model takes."""


class SFTMethod(TrainingMethod):
    """Trains the replies of conversations, and every token of plain texts."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """Return the `trl.SFTConfig`."""
        return build_sft_arguments(config, machine, folder, has_eval)

    def build_trainer(self, inputs: TrainerInputs) -> "TokenTrainer":
        """Return TRL's SFTTrainer over token rows."""
        arguments, rows = inputs.table_arguments(), inputs.prepared.train
        if not isinstance(rows, TokenRows):
            batching = arguments["batching"]
            arguments["train_dataset"] = StreamDataset(
                rows,
                seed=inputs.config.seed,
                shuffle_buffer=inputs.config.dataset.shuffle_buffer,
                length=batching.length if batching.packing else None,
            )
        loss = inputs.config.trainer.loss
        trainer_class = self.extend_trainer(TokenTrainer)
        return trainer_class(**arguments, token_loss=None if loss is None else TokenLoss(loss))


class TokenTrainer(TrainerMixin, SFTTrainer):
    """Trains rows of `input_ids` and `labels`.

    Every loss is the mean negative log-likelihood over trained tokens: of the whole step in
    training (all micro-batches and ranks), of the whole set in evaluation. So neither the batch
    size, nor packing, nor gradient accumulation, nor the number of processes changes it. Accuracy
    and entropy are means over the same tokens.
    """

    # compute_loss divides by the step's tokens itself, also where the model class's forward
    # does not take `num_items_in_batch`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        batching: BatchingSettings | None = None,
        token_loss: TokenLoss | None = None,
        images: ImageInputs | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what SFTTrainer takes, with token rows as datasets.

        A dataset is `TokenRows`, a table of token rows, a `datasets.Dataset` with the columns
        `input_ids` and `labels`, or, for training, `StreamDataset`; evaluation sets may come as
        a dict by name. `token_loss` is the loss of each token in place of its negative
        log-likelihood. `images` makes the inputs of pictures, for rows that have some. Raises
        UserError where the model cannot train packed rows.
        """
        self.images = images
        if images is not None:
            check_image_attention(model)
        self.batching: BatchingSettings = batching or BatchingSettings()
        self.token_loss = token_loss
        self.isolation: DocumentIsolation | None = None
        """How well the model keeps packed documents apart; None until that was measured."""
        if isinstance(train_dataset, StreamDataset):
            check_stream_arguments(kwargs["args"])
        else:
            train_dataset = as_token_rows(train_dataset)
        self._pad_token_id = _share_pad_token(model, kwargs["processing_class"])
        self._flat = uses_flattening(model.config.get_text_config()._attn_implementation)
        text_config = model.config.get_text_config()
        weight = "router_aux_loss_coef"
        router_weight = {weight: vars(text_config)[weight]} if weight in vars(text_config) else {}
        with keep_weight_precision(model):
            super().__init__(
                model=model,
                # TRL takes nothing but a `datasets.Dataset`, of which it only reads the columns.
                train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
                eval_dataset=_evaluation_rows(eval_dataset),
                data_collator=self._collator(kwargs["args"], packed=False),
                **kwargs,
            )
        if not self.aux_loss_enabled:
            # TRL 1.16 writes the weight of 0 into the config, with which the model is saved.
            vars(text_config).update(router_weight)
        self.train_dataset = train_dataset
        self.model_accepts_loss_kwargs = True
        # Summed on the device and reduced once a log: a sync in each step would cost speed.
        # Trained tokens, right answers, entropy, input tokens; since the last log.
        self._sums = torch.zeros(4, device=self.args.device)
        self._eval_sums: list[torch.Tensor] = []
        self._batch_facts: dict[str, Any] = {}
        self._tokens_seen = 0
        packs = self.batching.packing or self.batching.eval_packing
        # Weights that are split can only compute inside the loop: then the first batch shows it.
        if packs and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._measure_isolation(self.model)

    @property
    def has_own_loss(self) -> bool:
        """Whether a class of the user's own computes the loss (`trainer.method`)."""
        return type(self).compute_loss is not TokenTrainer.compute_loss

    # Batches.

    def _collator(self, args: Any, packed: bool, with_columns: bool = False) -> Any:
        multiple = args.pad_to_multiple_of
        layout = (self.batching, packed, self._flat, self._pad_token_id, multiple)
        return build_collator(*layout, with_columns, self.images)

    def _measure_isolation(self, call: Any) -> None:
        layout = self._collator(self.args, packed=True)
        with self.accelerator.autocast():
            is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self.isolation = check_isolation(self.model, layout, call, is_sharded)
        self._flat = self._flat or self.isolation.is_flat
        if not self.accelerator.is_main_process:
            return
        if self.isolation.is_flat:
            print_line("packing   flat rows, whose documents the model's own kernels keep apart")
        if self.isolation.dropped_varlen is not None:
            print_line(f"packing   masks in place of varlen: {self.isolation.dropped_varlen}")
        if self.isolation.documents is not None:
            print_line(f"packing   {self.isolation.documents}")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Put a batch on the device; a loss of the user's own gets what models take alone."""
        inputs = super()._prepare_inputs(inputs)
        if self.has_own_loss:
            inputs = self._unpadded(self.model_wrapped, dict(inputs))
            self._batch_facts = {name: inputs.pop(name) for name in _FACTS if name in inputs}
        return inputs

    def make_sampler(self, rows: Any, size: int, processes: int, is_training: bool) -> Sampler:
        """The order of the rows, which may be those of a `datasets.Dataset`."""
        return super().make_sampler(as_token_rows(rows), size, processes, is_training)

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows in this order, and the collator for them: Trainer has one for both."""
        packed = self.batching.packing if is_training else self.batching.eval_packing
        with_columns = self.token_loss is not None
        self.data_collator = self._collator(self.args, packed, with_columns)
        return SampledDataset(sampler, with_columns)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Build a loader; rows that come as a stream have one of their own."""
        if isinstance(dataset, StreamDataset):
            return self._stream_loader(dataset, batch_size)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def _stream_loader(self, rows: StreamDataset, batch_size: int) -> Any:
        # Rows are dealt out to the processes as rows, and flattened behind that.
        args, packs = self.args, self.batching.packing
        settings = {
            "collate_fn": build_collator(
                self.batching, packs, False, self._pad_token_id, args.pad_to_multiple_of
            ),
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        return build_stream_loader(rows, self.accelerator, batch_size, settings)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed loss over the step's trained tokens, which all ranks count together."""
        inputs = {**inputs, **self._batch_facts}
        documents, columns = inputs.pop("documents", None), inputs.pop("columns", None)
        inputs = self._unpadded(model, inputs)
        input_tokens = inputs.pop("tokens")
        # TRL's fused head returns log-probabilities, entropy and hits by token, and no logits.
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        per_token = -outputs.log_probs
        if self.args.loss_type == "dft":
            # Dynamic fine-tuning, https://huggingface.co/papers/2508.05629
            per_token = per_token * outputs.log_probs.exp().detach()
        if self.token_loss is not None and outputs.label_mask.any():
            # Log-probabilities are those of the labels one place further.
            mask, labels = outputs.label_mask.bool(), inputs["labels"]
            documents = documents.reshape(labels.shape)[:, 1:][mask]
            token_labels = labels[:, 1:][mask]
            losses = self.token_loss(outputs.log_probs[mask], token_labels, documents, columns)
            per_token = torch.zeros_like(outputs.log_probs).masked_scatter(mask, losses)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        # Clamped, so that a batch with nothing to train is a loss of 0 and not 0 / 0.
        loss = per_token.sum() / torch.as_tensor(tokens).clamp(min=1)
        loss = self._scale_over_ranks(loss, num_items_in_batch)
        if self.aux_loss_enabled:
            # Nothing accumulates: `build_trainer_arguments` and the checks of the config see to it.
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._add_sums(outputs, per_token.detach(), input_tokens)
        return (loss, outputs) if return_outputs else loss

    def _unpadded(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Flatten packed rows of a stream, and show once that packed rows stay apart."""
        if "position_ids" not in inputs:
            return inputs
        if self.isolation is None:
            self._measure_isolation(model)
        is_flat = "cu_seq_lens_q" in inputs
        if self._flat and not is_flat:
            inputs = flatten_packed_batch(inputs)
        if self.isolation is not None and self.isolation.documents is not None:
            expect_batch(self.isolation.documents, inputs)
        return inputs

    def _add_sums(self, outputs: Any, per_token: torch.Tensor, input_tokens: torch.Tensor) -> None:
        """Add up what the means of the next log, or of the evaluation, are taken of."""
        if self.model.training:
            columns = (outputs.label_mask, outputs.is_top1, outputs.entropy.detach(), input_tokens)
            self._sums += torch.stack([column.sum().float() for column in columns])
            return
        columns = (outputs.label_mask, outputs.is_top1, outputs.entropy, per_token)
        self._eval_sums.append(torch.stack([c.float().sum(dim=1) for c in columns], dim=1))

    # Evaluation and logs.

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with the loss of the whole set in place of a mean of means."""
        self._eval_sums.clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if not self._eval_sums:  # a loss of the user's own that does not go on to this one
            return output
        tokens, right, entropy, loss = self._sum_over_ranks()
        if tokens:
            # Of a loss of the user's own it is transformers' mean over the batches.
            if not self.has_own_loss:
                output.metrics[f"{prefix}_loss"] = loss / tokens
            output.metrics[f"{prefix}_mean_token_accuracy"] = right / tokens
            output.metrics[f"{prefix}_entropy"] = entropy / tokens
        return output

    def _sum_over_ranks(self) -> list[float]:
        """The sums of the evaluation; no row is in them twice, as the samplers repeat none."""
        sums = torch.cat(self._eval_sums).cpu().double().sum(dim=0).tolist()
        return [math.fsum(column) for column in zip(*gather_object([sums]), strict=True)]

    def add_log_means(self, logs: dict[str, float]) -> None:
        """Add the means since the last line of metrics, reduced over the ranks once."""
        sums = self.accelerator.reduce(self._sums, reduction="sum")
        tokens, right, entropy, input_tokens = sums.tolist()
        if not input_tokens and self.has_own_loss:
            return
        self._sums.zero_()
        self._tokens_seen += int(input_tokens)
        logs["mean_token_accuracy"] = right / max(tokens, 1)
        logs["entropy"] = entropy / max(tokens, 1)
        logs["num_tokens"] = self._tokens_seen

    # Checkpoints.

    def counter_state(self) -> dict[str, Any]:
        """The counters, with the sums since the last line of metrics."""
        sums = {"sums": self._sums.tolist(), "tokens_seen": self._tokens_seen}
        return super().counter_state() | sums

    def load_counter_state(self, state: dict[str, Any]) -> None:
        """Count on from what `counter_state` returned."""
        super().load_counter_state(state)
        self._sums += self._sums.new_tensor(state["sums"])
        self._tokens_seen = state["tokens_seen"]


def _evaluation_rows(rows: Any) -> Any:
    """One evaluation set, several by name, or none, as token rows."""
    if isinstance(rows, dict):
        return {name: as_token_rows(set_rows) for name, set_rows in rows.items()}
    return None if rows is None else as_token_rows(rows)


def _share_pad_token(model: Any, tokenizer: Any) -> int:
    """Set the tokenizer's padding token, or its end token, in the model as TRL does; return it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = pad
    model.generation_config.pad_token_id = pad
    return int(pad)
