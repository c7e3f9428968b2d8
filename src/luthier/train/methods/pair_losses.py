"""The losses of direct preference optimisation, one number for each pair of replies.

They are those of TRL's DPOTrainer under the same names, as functions of what a whole batch was
summed up to. So a loss can be weighed by pairs over a step, and taken over a whole set at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

AVERAGED = "sft"
"""The loss that is a mean over the tokens of the better replies, and no number of a pair."""
COMPARING = ("aot", "aot_unpaired")
"""Losses that compare the pairs of a batch with each other."""
_LARGEST = 80.0
"""The largest number of which float32 holds the exponential."""


@dataclass(frozen=True)
class Pairs:
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
class Strengths:
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

    def delta(self, pairs: Pairs) -> Tensor:
        """How much more the better reply was raised than the worse one."""
        return self.score(pairs.chosen) - self.score(pairs.rejected)

    def mean_delta(self, pairs: Pairs) -> Tensor:
        """The same by token."""
        chosen = self.score(pairs.chosen) / pairs.chosen_tokens.clamp(min=1)
        return chosen - self.score(pairs.rejected) / pairs.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: Pairs, by: Strengths) -> Tensor:
    """DPO, https://huggingface.co/papers/2305.18290"""
    return -logsigmoid(by.beta * by.delta(pairs))


def _sigmoid_norm(pairs: Pairs, by: Strengths) -> Tensor:
    """DPO by token, as in Tulu 3, https://huggingface.co/papers/2411.15124"""
    return -logsigmoid(by.beta * by.mean_delta(pairs))


def _hinge(pairs: Pairs, by: Strengths) -> Tensor:
    """SLiC and RSO, https://huggingface.co/papers/2309.06657"""
    return torch.relu(1 - by.beta * by.delta(pairs))


def _ipo(pairs: Pairs, by: Strengths) -> Tensor:
    """IPO, by token as its authors do it, https://huggingface.co/papers/2310.12036"""
    return (by.mean_delta(pairs) - 1 / (2 * by.beta)) ** 2


def _exo_pair(pairs: Pairs, by: Strengths) -> Tensor:
    """EXO: the divergence from what the pair says, https://huggingface.co/papers/2402.00856"""
    logit, wrong = by.beta * by.delta(pairs), by.label_smoothing
    right_log, wrong_log = logsigmoid(logit), logsigmoid(-logit)
    right = right_log.exp() * (right_log - math.log1p(-wrong))
    return right + wrong_log.exp() * (wrong_log - math.log(wrong))


def _nca_pair(pairs: Pairs, by: Strengths) -> Tensor:
    """NCA, https://huggingface.co/papers/2402.05369"""
    chosen, rejected = by.beta * pairs.chosen, by.beta * pairs.rejected
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def _robust(pairs: Pairs, by: Strengths) -> Tensor:
    """Robust DPO, for labels of which some are wrong, https://huggingface.co/papers/2403.00409"""
    logit, wrong = by.beta * by.delta(pairs), by.label_smoothing
    return (wrong * logsigmoid(-logit) - (1 - wrong) * logsigmoid(logit)) / (1 - 2 * wrong)


def _bco_pair(pairs: Pairs, by: Strengths) -> Tensor:
    """BCO on pairs, https://huggingface.co/papers/2404.04656"""
    return -logsigmoid(by.beta * pairs.chosen) - logsigmoid(-by.beta * pairs.rejected)


def _sppo_hard(pairs: Pairs, by: Strengths) -> Tensor:
    """SPPO with sure winners, https://huggingface.co/papers/2405.00675"""
    wanted = 0.5 / by.beta
    return (pairs.chosen - wanted) ** 2 + (pairs.rejected + wanted) ** 2


def _aot(pairs: Pairs, by: Strengths) -> Tensor:
    """AOT: sorted ratios against sorted ratios, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.policy.sort().values - pairs.reference.sort().values, by)


def _aot_unpaired(pairs: Pairs, by: Strengths) -> Tensor:
    """AOT, the better replies against the worse ones, https://huggingface.co/papers/2406.05882"""
    return _smoothed(pairs.chosen.sort().values - pairs.rejected.sort().values, by)


def _smoothed(delta: Tensor, by: Strengths) -> Tensor:
    logit, wrong = by.beta * delta, by.label_smoothing
    return -logsigmoid(logit) * (1 - wrong) - logsigmoid(-logit) * wrong


def _apo_zero(pairs: Pairs, by: Strengths) -> Tensor:
    """APO, for better replies than the model's own, https://huggingface.co/papers/2408.06266"""
    return torch.sigmoid(-by.beta * pairs.chosen) + torch.sigmoid(by.beta * pairs.rejected)


def _apo_down(pairs: Pairs, by: Strengths) -> Tensor:
    """APO, for worse replies than the model's own, https://huggingface.co/papers/2408.06266"""
    apart = by.beta * (pairs.chosen - pairs.rejected)
    return torch.sigmoid(by.beta * pairs.chosen) + torch.sigmoid(-apart)


def _discopop(pairs: Pairs, by: Strengths) -> Tensor:
    """DiscoPOP, a loss that was found by a model, https://huggingface.co/papers/2406.08414"""
    logit = by.beta * by.delta(pairs)
    share = torch.sigmoid(logit / by.discopop_tau)
    return -logsigmoid(logit) * (1 - share) + torch.exp(-logit) * share


LOSSES: dict[str, Callable[[Pairs, Strengths], Tensor]] = {
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
