"""KTO: replies with a verdict each, against a reference: TRL's KTOTrainer."""

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
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train import console
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    LossTerms,
    PreferenceMethod,
    PreferenceTrainerMixin,
    RowScores,
    forward_fused,
    mean_over_rows,
    mean_over_tokens,
    sum_token_outputs,
)
from luthier.train.methods.reference_model import (
    Referring,
    check_reference_settings,
    load_reference_model,
)

PARTNER_COLUMN = "partner"
"""The column with the number of a row's partner, where that does not change from step to step."""
LOSS_WITHOUT_KL = "apo_zero_unpaired"
"""The loss that needs no estimate of how far the model has gone from the reference."""


class LuthierKTOTrainer(Referring, PreferenceTrainerMixin, KTOTrainer):
    """Trains replies with a verdict each.

    How far the model has gone from the reference (the KL term) is estimated from replies behind
    other rows' prompts, as TRL does, but over the whole step: each row gets the reply of the row
    before it in the step. So neither accumulation nor the number of processes changes the loss,
    and rows may be shuffled. In evaluation it is estimated over the whole set.
    """

    result_metrics = ("rewards/margins",)

    def __init__(self, model: Any, *, args: Any, **kwargs: Any) -> None:
        self.with_kl = args.loss_type != LOSS_WITHOUT_KL
        self.collator_class = UnpairedKLCollator if self.with_kl else UnpairedCollator
        self.reference_columns = ("ref_logps", "ref_KL_logps") if self.with_kl else ("ref_logps",)
        with _unpaired_by_trl(args):
            super().__init__(model, args=args, **kwargs)
        self.loss_type = args.loss_type
        self._kl: Tensor | float = 0.0
        self._router: Tensor | None = None

    def sampler(self, rows: TokenRows, size: int, processes: int, is_training: bool) -> Sampler:
        """The order of the rows, each with the row whose reply stands behind its prompt."""
        order, table = super().sampler(rows, size, processes, is_training), rows.table
        if not self.with_kl:
            return order
        step = self._rows_in_step() if is_training else max(len(rows), 1)
        return PartnerSampler(
            order,
            step,
            table.column(PARTNER_COLUMN) if isinstance(table, TableWithColumns) else None,
        )

    def _rows_in_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The rows with what the reference says of each, and with a partner that never changes."""
        if self.with_kl and isinstance(dataset, TokenRows):
            step = self._rows_in_step() if name == "train" else max(len(dataset), 1)
            columns = {PARTNER_COLUMN: assign_fixed_partners(dataset, step)}
            dataset = TokenRows(TableWithColumns(dataset.table, columns), dataset.index)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def count_items(self, inputs: Any) -> Tensor:
        """The real rows of a batch."""
        real = inputs["real"].sum()
        return torch.stack([real, torch.zeros_like(real)]).float()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take the batches of a step, and estimate over all of them how far the model has gone."""
        samples, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.with_kl:
            sums = torch.zeros((), device=device)
            for batch in samples:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    gone = self._gone(self.model_wrapped, inputs)
                sums = sums + torch.where(inputs["real"], gone, 0).sum()
            total = self.accelerator.gather(sums[None]).sum()
            self._kl = (total / counts[0].clamp(min=1)).clamp(min=0)
        return samples, counts

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities of the replies, and the reference's."""
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward_fused(model, inputs, **more)
        self._router = outputs.aux_loss if self.aux_loss_enabled else None
        sums = sum_token_outputs(outputs, inputs)
        found = sums | {"label": inputs["label"], "ref_logps": self._reference_of(inputs)}
        if not self.with_kl:
            return found
        if self.model.training:
            return found | {"gone": torch.as_tensor(self._kl).expand_as(sums["logps"])}
        with torch.no_grad():
            return found | {"gone": self._gone(model, inputs)}

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The loss of each row, by its verdict."""
        moved = scores["logps"] - scores["ref_logps"]
        distance = self.distance(scores) if self.with_kl else 0.0
        good = torch.sigmoid(-self.beta * (moved - distance))
        bad = torch.sigmoid(self.beta * (moved - distance))
        desired, undesired = self.desirable_weight * good, self.undesirable_weight * bad
        return LossTerms(torch.where(scores["label"], desired, undesired))

    def distance(self, scores: RowScores) -> Tensor:
        """The estimate of the KL divergence, which is never negative."""
        gone = torch.where(scores["real"], scores["gone"], 0).sum()
        return (gone / scores["real"].sum().clamp(min=1)).clamp(min=0)

    def router_loss(self) -> Tensor | float:
        """The router's loss, for models of experts."""
        return 0.0 if self._router is None else self.router_aux_loss_coef * self._router

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics, of good and of bad replies."""
        rewards = self.beta * (scores["logps"] - scores["ref_logps"])
        found = {"entropy": mean_over_tokens(scores["entropy"], scores["trained"])}
        if self.with_kl:
            found["kl"] = float(self.distance(scores))
        good = scores["label"]
        for name, side in (("chosen", good), ("rejected", ~good)):
            if bool(side.any()):
                found |= {
                    f"rewards/{name}": mean_over_rows(rewards, side),
                    f"logps/{name}": mean_over_rows(scores["logps"], side),
                    f"logits/{name}": mean_over_tokens(
                        scores["logits"][side], scores["trained"][side]
                    ),
                }
        if bool(good.any()) and not bool(good.all()):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def reference_scores(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of a batch: of the rows' replies, and of their partners'."""
        found = {"ref_logps": self._ask_reference(inputs)}
        if self.with_kl:
            found["ref_KL_logps"] = self._ask_reference(_other(inputs))
        return found

    def _reference_of(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["ref_logps"] if self.precompute_ref_logps else self._ask_reference(inputs)

    def _ask_reference(self, inputs: dict[str, Any]) -> Tensor:
        kept = ("input_ids", "attention_mask", "completion_mask")
        model = self.ref_model or self.model
        found, _ = self.compute_ref_log_probs(model, {name: inputs[name] for name in kept})
        return found.float()

    def _gone(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """How much likelier the partners' replies are than they were, by row."""
        other = _other(inputs)
        known = self.precompute_ref_logps
        before = inputs["ref_KL_logps"] if known else self._ask_reference(other)
        return sum_token_outputs(forward_fused(model, other), other)["logps"] - before


def _other(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows with their partners' replies."""
    names = ("input_ids", "attention_mask", "completion_mask")
    return {name: inputs[f"KL_{name}"] for name in names}


@contextmanager
def _unpaired_by_trl(args: Any) -> Iterator[None]:
    """Keep TRL from pairing rows, and so from asking for a fixed order and batches of two rows."""
    asked, args.loss_type = args.loss_type, LOSS_WITHOUT_KL
    yield
    args.loss_type = asked


class KTOMethod(PreferenceMethod):
    """Replies with a verdict; of two replies to one prompt, the better one is good."""

    make = KTOConfig

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `trl.KTOConfig`."""
        args = super().build_arguments(config, machine, folder, has_eval)
        check_reference_settings(config)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.loss_type != LOSS_WITHOUT_KL and step < 2:
            raise UserError(
                "trainer.args.per_device_train_batch_size=1: a step of one row leaves nothing to "
                "estimate the KL term from.\nSet trainer.args.gradient_accumulation_steps=8, say, "
                f"or trainer.args.loss_type={LOSS_WITHOUT_KL}, which has no such term."
            )
        return args

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A causal language model, and its reference where that is one of its own."""
        self.reference = load_reference_model(config, machine)
        return super().load_model(config, machine, prepared)

    def build_trainer(self, given: TrainerInputs) -> LuthierKTOTrainer:
        """TRL's KTOTrainer over replies that are tokens."""
        _advise(given)
        return LuthierKTOTrainer(ref_model=self.reference, **self.common(given))


def _advise(given: TrainerInputs) -> None:
    """Say so where good and bad replies weigh as differently as the paper says they should not.

    Equation 8 of https://huggingface.co/papers/2402.01306: their sums of weights as 1 to 4/3.
    """
    rows = given.prepared.train
    assert isinstance(rows, TokenRows)
    labels = rows.table.column("label")  # type: ignore[attr-defined]
    good = int((labels if rows.index is None else labels[rows.index]).sum())
    bad = len(rows) - good
    args = given.args
    if not good or not bad or not args.distributed_state.is_main_process:
        return
    balance = args.desirable_weight * good / (args.undesirable_weight * bad)
    if not 0.99 <= balance <= 1.34:
        fitting = args.undesirable_weight * bad / good
        console.print_line(
            f"balance   {good:,} good and {bad:,} bad replies; trainer.args.desirable_weight from "
            f"{fitting:.2f} to {fitting * 4 / 3:.2f} would make them count alike"
        )
