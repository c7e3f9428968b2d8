"""Direct preference optimization and its kin, with a reference model: TRL's DPOTrainer.

The losses are those of TRL's DPOTrainer under the same names, as functions of the sums over a
reply's tokens, and return one number for each pair. So a loss can be weighed by pairs over a whole
step, and taken over a whole set at once.
"""

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
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    LossTerms,
    PreferenceTrainerMixin,
    ReferenceMethod,
    RowScores,
    completion_mask,
    mean_over_rows,
    pair_metrics,
    split_pairs,
    sum_token_outputs,
)

SFT_LOSS = "sft"
"""The loss that is a mean over the tokens of the better replies, and no number of a pair."""
SORTING_LOSSES = ("aot", "aot_unpaired")
"""The losses that compare the pairs of a batch with each other, by sorting them."""
_LARGEST_EXPONENT = 80.0
"""The largest number of which float32 holds the exponential."""


@dataclass(frozen=True)
class PairLogRatios:
    """Log-ratios of the two replies of pairs, of the model and the reference, shape (pairs,)."""

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
            return torch.expm1((power * ratio).clamp(max=_LARGEST_EXPONENT)) / power
        return ratio

    def delta(self, pairs: PairLogRatios) -> Tensor:
        """How much more the better reply was raised than the worse one."""
        return self.score(pairs.chosen) - self.score(pairs.rejected)

    def mean_delta(self, pairs: PairLogRatios) -> Tensor:
        """The same by token."""
        chosen = self.score(pairs.chosen) / pairs.chosen_tokens.clamp(min=1)
        return chosen - self.score(pairs.rejected) / pairs.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """DPO, https://huggingface.co/papers/2305.18290"""
    return -logsigmoid(settings.beta * settings.delta(pairs))


def _sigmoid_norm(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """DPO by token, as in Tulu 3, https://huggingface.co/papers/2411.15124"""
    return -logsigmoid(settings.beta * settings.mean_delta(pairs))


def _hinge(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """SLiC and RSO, https://huggingface.co/papers/2309.06657"""
    return torch.relu(1 - settings.beta * settings.delta(pairs))


def _ipo(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """IPO, by token as its authors do it, https://huggingface.co/papers/2310.12036"""
    return (settings.mean_delta(pairs) - 1 / (2 * settings.beta)) ** 2


def _exo_pair(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """EXO: the divergence from what the pair says, https://huggingface.co/papers/2402.00856"""
    logit, wrong = settings.beta * settings.delta(pairs), settings.label_smoothing
    right_log, wrong_log = logsigmoid(logit), logsigmoid(-logit)
    right = right_log.exp() * (right_log - math.log1p(-wrong))
    return right + wrong_log.exp() * (wrong_log - math.log(wrong))


def _nca_pair(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """NCA, https://huggingface.co/papers/2402.05369"""
    chosen, rejected = settings.beta * pairs.chosen, settings.beta * pairs.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def _robust(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """Robust DPO, for labels of which some are wrong, https://huggingface.co/papers/2403.00409"""
    logit, wrong = settings.beta * settings.delta(pairs), settings.label_smoothing
    return (wrong * logsigmoid(-logit) - (1 - wrong) * logsigmoid(logit)) / (1 - 2 * wrong)


def _bco_pair(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """BCO on pairs, https://huggingface.co/papers/2404.04656"""
    return -logsigmoid(settings.beta * pairs.chosen) - logsigmoid(-settings.beta * pairs.rejected)


def _sppo_hard(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """SPPO with sure winners, https://huggingface.co/papers/2405.00675"""
    target = 0.5 / settings.beta
    return (pairs.chosen - target) ** 2 + (pairs.rejected + target) ** 2


def _aot(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """AOT: sorted ratios against sorted ratios, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.policy.sort().values - pairs.reference.sort().values, settings)


def _aot_unpaired(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """AOT, the better replies against the worse ones, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.chosen.sort().values - pairs.rejected.sort().values, settings)


def _smoothed(delta: Tensor, settings: PairLossSettings) -> Tensor:
    logit, wrong = settings.beta * delta, settings.label_smoothing
    return -logsigmoid(logit) * (1 - wrong) - logsigmoid(-logit) * wrong


def _apo_zero(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """APO, for better replies than the model's own, https://huggingface.co/papers/2408.06266"""
    return torch.sigmoid(-settings.beta * pairs.chosen) + torch.sigmoid(
        settings.beta * pairs.rejected
    )


def _apo_down(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """APO, for worse replies than the model's own, https://huggingface.co/papers/2408.06266"""
    apart = settings.beta * (pairs.chosen - pairs.rejected)
    return torch.sigmoid(settings.beta * pairs.chosen) + torch.sigmoid(-apart)


def _discopop(pairs: PairLogRatios, settings: PairLossSettings) -> Tensor:
    """DiscoPOP, a loss that was found by a model, https://huggingface.co/papers/2406.08414"""
    logit = settings.beta * settings.delta(pairs)
    share = torch.sigmoid(logit / settings.discopop_tau)
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


class DPOMethod(ReferenceMethod):
    """Pairs of replies against a reference, with the losses of `trl.DPOConfig.loss_type`."""

    arguments_class = DPOConfig

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """Return the `trl.DPOConfig`."""
        args = super().build_arguments(config, machine, folder, has_eval)
        names = (*PAIR_LOSSES, SFT_LOSS)
        unknown = [name for name in args.loss_type if name not in names]
        if unknown:
            raise UserError(f"trainer.args.loss_type: {unknown[0]} is none of {', '.join(names)}.")
        if args.use_weighting and SFT_LOSS in args.loss_type:
            raise UserError(
                "trainer.args.use_weighting=true weighs pairs, and the loss sft is a mean over "
                "tokens.\nRemove one of them."
            )
        return args

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierDPOTrainer":
        """Return TRL's DPOTrainer over pairs that are tokens."""
        return LuthierDPOTrainer(ref_model=self.reference_model, **inputs.table_arguments())


class LuthierDPOTrainer(PreferenceTrainerMixin, DPOTrainer):
    """Trains pairs of replies with any of TRL's losses, weighed by pairs."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        names = [field.name for field in fields(PairLossSettings)]
        self.loss_settings = PairLossSettings(**{name: getattr(self.args, name) for name in names})

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities of both replies, and the reference's."""
        outputs = self.forward_with_router(model, inputs)
        sums = sum_token_outputs(outputs, inputs)
        # The loss `sft` takes the plain sums, also where LD-DPO weighs the tokens.
        sums["nll"] = -sums["logps"]
        if self.ld_alpha is not None:
            sums["logps"] = self._sum_weighted_logps(outputs, inputs)
        if self.use_weighting:
            sums["weight"] = _wpo_weights(outputs, inputs, sums["trained"])
        if self.precompute_ref_logps:
            return split_pairs(sums) | {name: inputs[name] for name in self.reference_columns}
        return split_pairs(sums) | self.score_reference(inputs)

    def score_reference(self, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities that the reference gives to both replies."""
        names = ("input_ids", "attention_mask", "completion_mask")
        model = self.ref_model or self.model
        model_inputs = {name: inputs[name] for name in names} | inputs.get("image_inputs", {})
        logps = self.compute_ref_log_probs(model, model_inputs)
        columns = zip(self.reference_columns, logps, strict=True)
        return {name: values.float() for name, values in columns}

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The weighted sum of the losses."""
        pairs, pair_weights = _log_ratios(scores), 1.0
        rows: Tensor | float = 0.0
        tokens: Tensor | float = 0.0
        if self.use_weighting:
            pair_weights = scores["chosen_weight"] * scores["rejected_weight"]
        for name, loss_weight in zip(self.loss_types, self.loss_weights, strict=True):
            if name == SFT_LOSS:
                tokens = tokens + loss_weight * scores["chosen_nll"]
            else:
                losses = self._pair_losses(name, pairs, scores["real"])
                rows = rows + loss_weight * pair_weights * losses
        return LossTerms(rows, tokens)

    def _pair_losses(self, name: str, pairs: PairLogRatios, real: Tensor) -> Tensor:
        """The loss of this name for each pair; 0 for pairs that sorting losses leave out."""
        if name not in SORTING_LOSSES:
            return PAIR_LOSSES[name](pairs, self.loss_settings)
        # Pairs that only fill up a batch are compared with none.
        real_columns = {f.name: getattr(pairs, f.name)[real] for f in fields(PairLogRatios)}
        losses = PAIR_LOSSES[name](replace(pairs, **real_columns), self.loss_settings)
        return torch.zeros_like(pairs.policy).masked_scatter(real, losses)

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
        pairs = _log_ratios(scores)
        return pair_metrics(scores, self.beta * pairs.chosen, self.beta * pairs.rejected) | {
            "logps/chosen": mean_over_rows(scores["chosen_logps"]),
            "logps/rejected": mean_over_rows(scores["rejected_logps"]),
        }

    def _sum_weighted_logps(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Sums in which the tokens that the shorter reply does not have count less.

        LD-DPO, https://huggingface.co/papers/2409.06411
        """
        mask = completion_mask(inputs)
        positions, lengths = mask.cumsum(dim=1), mask.sum(dim=1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        weights = torch.where(positions > shared[:, None], self.ld_alpha, 1.0)
        return (outputs.log_probs[:, -mask.shape[1] :].float() * weights * mask).sum(dim=1)


def _wpo_weights(outputs: Any, inputs: dict[str, Any], trained: Tensor) -> Tensor:
    """How likely the model itself writes each reply, by token, against what it would rather write.

    WPO, https://huggingface.co/papers/2406.11827
    """
    mask = completion_mask(inputs)
    width = mask.shape[1]
    with torch.no_grad():
        expected = outputs.log_sum_sq_probs[:, -width:].float()
        excess = outputs.log_probs[:, -width:].float() - expected
        return ((excess * mask).sum(dim=1) / trained.clamp(min=1)).exp()


def _log_ratios(scores: RowScores) -> PairLogRatios:
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
