"""Direct preference optimisation and its kin, with a reference model: TRL's DPOTrainer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import PairCollator
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    LossTerms,
    PreferenceMethod,
    PreferenceTrainerMixin,
    RowScores,
    completion_mask,
    count_pairs,
    forward_fused,
    mean_over_rows,
    mean_over_tokens,
    split_pairs,
    sum_token_outputs,
)
from luthier.train.methods.reference_model import (
    Referring,
    check_reference_settings,
    load_reference_model,
)

# The losses of direct preference optimisation, one number for each pair of replies.
#
# They are those of TRL's DPOTrainer under the same names, as functions of what a whole batch
# was summed up to. So a loss can be weighed by pairs over a step, and taken over a whole set at
# once.

SFT_LOSS = "sft"
"""The loss that is a mean over the tokens of the better replies, and no number of a pair."""
SORTING_LOSSES = ("aot", "aot_unpaired")
"""Losses that compare the pairs of a batch with each other."""
_LARGEST = 80.0
"""The largest number of which float32 holds the exponential."""


@dataclass(frozen=True)
class PairLogRatios:
    """What the model and the reference say of pairs; each has the shape (pairs,)."""

    chosen: Tensor
    """The log-probability of the better reply, less the reference's."""
    rejected: Tensor
    """The same for the worse one."""
    policy: Tensor
    """The log-probability of the better reply less that of the worse one."""
    reference: Tensor
    """The same for the reference."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True)
class PairLossSettings:
    """The settings of the losses, by the names that `trl.DPOConfig` gives them."""

    beta: float
    label_smoothing: float
    discopop_tau: float
    f_divergence_type: str
    f_alpha_divergence_coef: float

    def score(self, ratio: Tensor) -> Tensor:
        """The derivative of the divergence at a likelihood ratio whose logarithm is given.

        f-DPO, https://huggingface.co/papers/2309.16240
        """
        power = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "forward_kl":
            return 1 - torch.exp(-ratio)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + logsigmoid(ratio)
        if self.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
            return torch.expm1((power * ratio).clamp(max=_LARGEST)) / power
        return ratio

    def delta(self, pairs: PairLogRatios) -> Tensor:
        """How much more the better reply was raised than the worse one."""
        return self.score(pairs.chosen) - self.score(pairs.rejected)

    def mean_delta(self, pairs: PairLogRatios) -> Tensor:
        """The same by token."""
        chosen = self.score(pairs.chosen) / pairs.chosen_tokens.clamp(min=1)
        return chosen - self.score(pairs.rejected) / pairs.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """DPO, https://huggingface.co/papers/2305.18290"""
    return -logsigmoid(by.beta * by.delta(pairs))


def _sigmoid_norm(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """DPO by token, as in Tulu 3, https://huggingface.co/papers/2411.15124"""
    return -logsigmoid(by.beta * by.mean_delta(pairs))


def _hinge(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """SLiC and RSO, https://huggingface.co/papers/2309.06657"""
    return torch.relu(1 - by.beta * by.delta(pairs))


def _ipo(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """IPO, by token as its authors do it, https://huggingface.co/papers/2310.12036"""
    return (by.mean_delta(pairs) - 1 / (2 * by.beta)) ** 2


def _exo_pair(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """EXO: the divergence from what the pair says, https://huggingface.co/papers/2402.00856"""
    logit, wrong = by.beta * by.delta(pairs), by.label_smoothing
    right_log, wrong_log = logsigmoid(logit), logsigmoid(-logit)
    right = right_log.exp() * (right_log - math.log1p(-wrong))
    return right + wrong_log.exp() * (wrong_log - math.log(wrong))


def _nca_pair(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """NCA, https://huggingface.co/papers/2402.05369"""
    chosen, rejected = by.beta * pairs.chosen, by.beta * pairs.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def _robust(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """Robust DPO, for labels of which some are wrong, https://huggingface.co/papers/2403.00409"""
    logit, wrong = by.beta * by.delta(pairs), by.label_smoothing
    return (wrong * logsigmoid(-logit) - (1 - wrong) * logsigmoid(logit)) / (1 - 2 * wrong)


def _bco_pair(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """BCO on pairs, https://huggingface.co/papers/2404.04656"""
    return -logsigmoid(by.beta * pairs.chosen) - logsigmoid(-by.beta * pairs.rejected)


def _sppo_hard(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """SPPO with sure winners, https://huggingface.co/papers/2405.00675"""
    wanted = 0.5 / by.beta
    return (pairs.chosen - wanted) ** 2 + (pairs.rejected + wanted) ** 2


def _aot(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """AOT: sorted ratios against sorted ratios, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.policy.sort().values - pairs.reference.sort().values, by)


def _aot_unpaired(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """AOT, the better replies against the worse ones, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.chosen.sort().values - pairs.rejected.sort().values, by)


def _smoothed(delta: Tensor, by: PairLossSettings) -> Tensor:
    logit, wrong = by.beta * delta, by.label_smoothing
    return -logsigmoid(logit) * (1 - wrong) - logsigmoid(-logit) * wrong


def _apo_zero(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """APO, for better replies than the model's own, https://huggingface.co/papers/2408.06266"""
    return torch.sigmoid(-by.beta * pairs.chosen) + torch.sigmoid(by.beta * pairs.rejected)


def _apo_down(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """APO, for worse replies than the model's own, https://huggingface.co/papers/2408.06266"""
    apart = by.beta * (pairs.chosen - pairs.rejected)
    return torch.sigmoid(by.beta * pairs.chosen) + torch.sigmoid(-apart)


def _discopop(pairs: PairLogRatios, by: PairLossSettings) -> Tensor:
    """DiscoPOP, a loss that was found by a model, https://huggingface.co/papers/2406.08414"""
    logit = by.beta * by.delta(pairs)
    share = torch.sigmoid(logit / by.discopop_tau)
    return -logsigmoid(logit) * (1 - share) + torch.exp(-logit) * share


PAIR_LOSSES: dict[str, Callable[[PairLogRatios, PairLossSettings], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""Each loss of a pair by its name in `trainer.args.loss_type`."""


class LuthierDPOTrainer(Referring, PreferenceTrainerMixin, DPOTrainer):
    """Trains pairs of replies with any of TRL's losses, weighed by pairs."""

    collator_class = PairCollator
    result_metrics = ("rewards/accuracies", "rewards/margins")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        given = {field.name: getattr(self.args, field.name) for field in fields(PairLossSettings)}
        self.strengths = PairLossSettings(**given)

    def count_items(self, inputs: Any) -> Tensor:
        """The real pairs, and the trained tokens of their better replies."""
        return count_pairs(inputs)

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities of both replies, and the reference's."""
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward_fused(model, inputs, **more)
        self._router = outputs.aux_loss if self.aux_loss_enabled else None
        sums = sum_token_outputs(outputs, inputs)
        sums["nll"] = -sums["logps"]
        if self.ld_alpha is not None:
            sums["logps"] = self._without_verbosity(outputs, inputs)
        if self.use_weighting:
            sums["weight"] = _likelihood(outputs, inputs, sums["trained"])
        return split_pairs(sums) | self.reference(inputs)

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The weighted sum of the losses."""
        pairs, weight = _pairs(scores), 1.0
        rows: Tensor | float = 0.0
        tokens: Tensor | float = 0.0
        if self.use_weighting:
            weight = scores["chosen_weight"] * scores["rejected_weight"]
        for name, share in zip(self.loss_types, self.loss_weights, strict=True):
            if name == SFT_LOSS:
                tokens = tokens + share * scores["chosen_nll"]
            else:
                rows = rows + share * weight * self._loss(name, pairs, scores["real"])
        return LossTerms(rows, tokens)

    def _loss(self, name: str, pairs: PairLogRatios, real: Tensor) -> Tensor:
        """One loss of each pair."""
        if name not in SORTING_LOSSES:
            return PAIR_LOSSES[name](pairs, self.strengths)
        # Pairs that only fill up a batch are compared with none.
        taken = {field.name: getattr(pairs, field.name)[real] for field in fields(PairLogRatios)}
        found = torch.zeros_like(pairs.policy)
        return found.masked_scatter(
            real, PAIR_LOSSES[name](replace(pairs, **taken), self.strengths)
        )

    def router_loss(self) -> Tensor | float:
        """The router's loss, for models of experts."""
        return 0.0 if self._router is None else self.router_aux_loss_coef * self._router

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
        pairs = _pairs(scores)
        chosen, rejected = self.beta * pairs.chosen, self.beta * pairs.rejected
        return pair_metrics(scores, chosen, rejected) | {
            "logps/chosen": mean_over_rows(scores["chosen_logps"]),
            "logps/rejected": mean_over_rows(scores["rejected_logps"]),
        }

    def reference_scores(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of a batch."""
        kept = ("input_ids", "attention_mask", "completion_mask")
        model = self.ref_model or self.model
        found = self.compute_ref_log_probs(model, {name: inputs[name] for name in kept})
        return {n: part.float() for n, part in zip(self.reference_columns, found, strict=True)}

    def _without_verbosity(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Sums in which the tokens that the shorter reply does not have count less.

        LD-DPO, https://huggingface.co/papers/2409.06411
        """
        mask = completion_mask(inputs)
        place, lengths = mask.cumsum(dim=1), mask.sum(dim=1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        weights = torch.where(place > shared[:, None], self.ld_alpha, 1.0)
        return (outputs.log_probs[:, -mask.shape[1] :].float() * weights * mask).sum(dim=1)


def pair_metrics(scores: RowScores, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """The metrics of pairs with these rewards, and of the tokens of their replies."""
    sides = ("chosen", "rejected")
    entropy = sum(scores[f"{side}_entropy"] for side in sides)
    trained = sum(scores[f"{side}_tokens"] for side in sides)
    logits = {
        f"logits/{side}": mean_over_tokens(scores[f"{side}_logits"], scores[f"{side}_tokens"])
        for side in sides
    }
    return logits | {
        "rewards/chosen": mean_over_rows(chosen),
        "rewards/rejected": mean_over_rows(rejected),
        "rewards/accuracies": mean_over_rows((chosen > rejected).float()),
        "rewards/margins": mean_over_rows(chosen - rejected),
        "entropy": mean_over_tokens(torch.as_tensor(entropy), torch.as_tensor(trained)),
        "mean_token_accuracy": mean_over_tokens(scores["chosen_right"], scores["chosen_tokens"]),
    }


def _likelihood(outputs: Any, inputs: dict[str, Any], trained: Tensor) -> Tensor:
    """How likely the model itself writes each reply, by token, against what it would rather write.

    WPO, https://huggingface.co/papers/2406.11827
    """
    mask = completion_mask(inputs)
    width = mask.shape[1]
    with torch.no_grad():
        found = outputs.log_probs[:, -width:].float() - outputs.log_sum_sq_probs[:, -width:].float()
        return ((found * mask).sum(dim=1) / trained.clamp(min=1)).exp()


def _pairs(scores: RowScores) -> PairLogRatios:
    chosen, rejected = scores["chosen_logps"], scores["rejected_logps"]
    ref_chosen, ref_rejected = scores["ref_chosen_logps"], scores["ref_rejected_logps"]
    return PairLogRatios(
        chosen=chosen - ref_chosen,
        rejected=rejected - ref_rejected,
        policy=chosen - rejected,
        reference=ref_chosen - ref_rejected,
        chosen_tokens=scores["chosen_tokens"],
        rejected_tokens=scores["rejected_tokens"],
    )


class DPOMethod(PreferenceMethod):
    """Pairs of replies against a reference, with the losses of `trl.DPOConfig.loss_type`."""

    make = DPOConfig

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `trl.DPOConfig`."""
        args = super().build_arguments(config, machine, folder, has_eval)
        check_reference_settings(config)
        unknown = [name for name in args.loss_type if name not in (*PAIR_LOSSES, SFT_LOSS)]
        if unknown:
            known = ", ".join([*PAIR_LOSSES, SFT_LOSS])
            raise UserError(f"trainer.args.loss_type: {unknown[0]} is none of {known}.")
        if args.use_weighting and SFT_LOSS in args.loss_type:
            raise UserError(
                "trainer.args.use_weighting=true weighs pairs, and the loss sft is a mean over "
                "tokens.\nRemove one of them."
            )
        return args

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A causal language model, and its reference where that is one of its own."""
        self.reference = load_reference_model(config, machine)
        return super().load_model(config, machine, prepared)

    def build_trainer(self, given: TrainerInputs) -> LuthierDPOTrainer:
        """TRL's DPOTrainer over pairs that are tokens."""
        return LuthierDPOTrainer(ref_model=self.reference, **self.common(given))
