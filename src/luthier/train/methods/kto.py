"""KTO: replies with a rating each, against a reference: TRL's KTOTrainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import KTOConfig, KTOTrainer

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import (
    PartnerSampler,
    TableWithColumns,
    UnpairedCollator,
    UnpairedKLCollator,
    assign_fixed_partners,
)
from luthier.data.batching.samplers import Sampler
from luthier.data.batching.token_rows import TokenRows
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train import console
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    LossTerms,
    PreferenceTrainerMixin,
    ReferenceMethod,
    RowScores,
    count_rows,
    forward_fused,
    mean_over_rows,
    mean_over_tokens,
    sum_token_outputs,
)

PARTNER_COLUMN = "partner"
"""The column with the number of a row's partner, where that does not change from step to step."""
LOSS_WITHOUT_KL = "apo_zero_unpaired"
"""The loss that needs no estimate of how far the model has gone from the reference."""
DRIFT = "gone"
"""The scores that the KL term is the mean of; checkpoints of earlier versions have this name."""
_MODEL_INPUTS = ("input_ids", "attention_mask", "completion_mask")


class KTOMethod(ReferenceMethod):
    """Replies with a rating; of two replies to one prompt, the better one is good."""

    arguments_class = KTOConfig

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """Return the `trl.KTOConfig`."""
        args = super().build_arguments(config, machine, folder, has_eval)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.loss_type != LOSS_WITHOUT_KL and step < 2:
            raise UserError(
                "trainer.args.per_device_train_batch_size=1: a step of one row leaves nothing to "
                "estimate the KL term from.\nSet trainer.args.gradient_accumulation_steps=8, say, "
                f"or trainer.args.loss_type={LOSS_WITHOUT_KL}, which has no such term."
            )
        return args

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierKTOTrainer":
        """Return TRL's KTOTrainer over replies that are tokens."""
        _advise_weights(inputs)
        return LuthierKTOTrainer(ref_model=self.reference_model, **inputs.table_arguments())


def _advise_weights(inputs: TrainerInputs) -> None:
    """Print weights for good and bad replies where theirs are unlike what the paper advises.

    Equation 8 of https://huggingface.co/papers/2402.01306: their sums of weights as 1 to 4/3.
    """
    rows = inputs.prepared.train
    assert isinstance(rows, TokenRows)
    labels = rows.table.column("label")  # type: ignore[attr-defined]
    good = int((labels if rows.index is None else labels[rows.index]).sum())
    bad = len(rows) - good
    args = inputs.args
    if not good or not bad or not args.distributed_state.is_main_process:
        return
    balance = args.desirable_weight * good / (args.undesirable_weight * bad)
    # A hundredth below and above, so that a weight which was rounded as advised is not told again.
    if not 0.99 <= balance <= 1.34:
        lowest = args.undesirable_weight * bad / good
        console.print_line(
            f"balance   {good:,} good and {bad:,} bad replies; trainer.args.desirable_weight from "
            f"{lowest:.2f} to {lowest * 4 / 3:.2f} would make them count alike"
        )


class LuthierKTOTrainer(PreferenceTrainerMixin, KTOTrainer):
    """Trains replies with a rating each.

    How far the model has gone from the reference (the KL term) is estimated from replies behind
    other rows' prompts, as TRL does, but over the whole step: each row gets the reply of the row
    before it in the step. So neither accumulation nor the number of processes changes the loss,
    and rows may be shuffled. In evaluation it is estimated over the whole set.
    """

    result_metrics = ("rewards/margins",)

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        # All of this is set before the mixin builds the collator and TRL reads the loss.
        self.with_kl = args.loss_type != LOSS_WITHOUT_KL
        self.collator_class = UnpairedKLCollator if self.with_kl else UnpairedCollator
        self.reference_columns = ("ref_logps", "ref_KL_logps") if self.with_kl else ("ref_logps",)
        with _loss_without_kl(args):
            super().__init__(model, args=args, **kwargs)
        self.loss_type = args.loss_type
        self._step_kl: Tensor | float = 0.0

    # Each row and its partner, whose reply stands behind the row's prompt.

    def make_sampler(
        self, rows: TokenRows, size: int, processes: int, is_training: bool
    ) -> Sampler:
        """The order of the rows, each with its partner where the loss has a KL term."""
        order, table = super().make_sampler(rows, size, processes, is_training), rows.table
        if not self.with_kl:
            return order
        step = self.get_total_train_batch_size(self.args) if is_training else max(len(rows), 1)
        partners = table.column(PARTNER_COLUMN) if isinstance(table, TableWithColumns) else None
        return PartnerSampler(order, step, partners)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The rows with what the reference says of each, and with a partner that never changes."""
        if self.with_kl and isinstance(dataset, TokenRows):
            is_training = name == "train"
            step = self.get_total_train_batch_size(self.args) if is_training else len(dataset)
            columns = {PARTNER_COLUMN: assign_fixed_partners(dataset, max(step, 1))}
            table = TableWithColumns(dataset.table, columns)
            dataset = TokenRows(table, dataset.index, read_images=dataset.read_images)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def count_items(self, inputs: Any) -> Tensor:
        """The real rows of a batch; no part of the loss is by token."""
        return count_rows(inputs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take the batches of a step, and estimate the KL term over all of them."""
        samples, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.with_kl:
            # The estimate has no gradient, as in TRL.
            drift = torch.zeros((), device=device)
            for batch in samples:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    row_drift = self._partner_drift(self.model_wrapped, inputs)
                drift = drift + torch.where(inputs["real"], row_drift, 0).sum()
            total = self.accelerator.gather(drift[None]).sum()
            self._step_kl = (total / counts[0].clamp(min=1)).clamp(min=0)
        return samples, counts

    # Scores, loss and metrics.

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities of the replies, the reference's, and each row's part of the KL."""
        scores = sum_token_outputs(self.forward_with_router(model, inputs), inputs)
        scores["label"] = inputs["label"]
        if self.precompute_ref_logps:
            scores["ref_logps"] = inputs["ref_logps"]
        else:
            scores["ref_logps"] = self._reference_logps(inputs)
        if self.with_kl and self.model.training:
            scores[DRIFT] = torch.as_tensor(self._step_kl).expand_as(scores["logps"])
        elif self.with_kl:
            with torch.no_grad():
                scores[DRIFT] = self._partner_drift(model, inputs)
        return scores

    def score_reference(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of the rows' replies, and of their partners'."""
        scores = {"ref_logps": self._reference_logps(inputs)}
        if self.with_kl:
            scores["ref_KL_logps"] = self._reference_logps(_partner_inputs(inputs))
        return scores

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor:
        model = self.ref_model or self.model
        logps, _ = self.compute_ref_log_probs(model, {name: inputs[name] for name in _MODEL_INPUTS})
        return logps.float()

    def _partner_drift(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """How much likelier the partners' replies are than to the reference, by row."""
        partners = _partner_inputs(inputs)
        if self.precompute_ref_logps:
            before = inputs["ref_KL_logps"]
        else:
            before = self._reference_logps(partners)
        return sum_token_outputs(forward_fused(model, partners), partners)["logps"] - before

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The loss of each row, by its rating."""
        log_ratio = scores["logps"] - scores["ref_logps"]
        kl = self.estimate_kl(scores) if self.with_kl else 0.0
        good = torch.sigmoid(-self.beta * (log_ratio - kl))
        bad = torch.sigmoid(self.beta * (log_ratio - kl))
        desired, undesired = self.desirable_weight * good, self.undesirable_weight * bad
        return LossTerms(torch.where(scores["label"], desired, undesired))

    def estimate_kl(self, scores: RowScores) -> Tensor:
        """The estimate of the KL divergence over all real rows, which is never negative."""
        total = torch.where(scores["real"], scores[DRIFT], 0).sum()
        return (total / scores["real"].sum().clamp(min=1)).clamp(min=0)

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics, of good and of bad replies."""
        rewards = self.beta * (scores["logps"] - scores["ref_logps"])
        metrics = {"entropy": mean_over_tokens(scores["entropy"], scores["trained"])}
        if self.with_kl:
            metrics["kl"] = float(self.estimate_kl(scores))
        good = scores["label"]
        for name, side in (("chosen", good), ("rejected", ~good)):
            if bool(side.any()):
                logits, trained = scores["logits"][side], scores["trained"][side]
                metrics |= {
                    f"rewards/{name}": mean_over_rows(rewards, side),
                    f"logps/{name}": mean_over_rows(scores["logps"], side),
                    f"logits/{name}": mean_over_tokens(logits, trained),
                }
        if bool(good.any()) and not bool(good.all()):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


def _partner_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows with their partners' replies."""
    return {name: inputs[f"KL_{name}"] for name in _MODEL_INPUTS}


@contextmanager
def _loss_without_kl(args: Any) -> Iterator[None]:
    """Set the loss without a KL term within the block.

    For any other, TRL 1.16 pairs the rows itself, and so wants a fixed order and batches of two
    rows or more.
    """
    loss_type, args.loss_type = args.loss_type, LOSS_WITHOUT_KL
    yield
    args.loss_type = loss_type
