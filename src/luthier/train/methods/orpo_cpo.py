"""Preference optimization without a reference: TRL's ORPOTrainer and CPOTrainer (with SimPO)."""

import os
from typing import Any

from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from luthier.config.schema import RunConfig
from luthier.model.fused_head import use_head_log_probs
from luthier.train.methods.labelled import base_model
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    FUSED_HEAD_OUTPUTS,
    LossTerms,
    PreferenceMethod,
    PreferenceTrainerMixin,
    RowScores,
    mean_over_rows,
    mean_over_tokens,
    pair_metrics,
)

# TRL 1.16 warns at each start that these trainers are experimental. They stay behind luthier's own
# arguments and tests.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class ReferenceFreeMethod(PreferenceMethod):
    """A method whose trainer requires a length, which it uses for rows that are no tokens yet."""

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """The length of the config, or any other: rows come as tokens, and are cut already."""
        return super().required_arguments(config) | {"max_length": config.chat.max_length or 1024}


class ORPOMethod(ReferenceFreeMethod):
    """Pairs of replies by their odds, without a reference."""

    arguments_class = ORPOConfig

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierORPOTrainer":
        """Return TRL's ORPOTrainer over pairs that are tokens."""
        return LuthierORPOTrainer(**inputs.table_arguments())


class CPOMethod(ReferenceFreeMethod):
    """Pairs of replies by their contrast, without a reference; SimPO with `loss_type: simpo`."""

    arguments_class = CPOConfig

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierCPOTrainer":
        """Return TRL's CPOTrainer over pairs that are tokens."""
        return LuthierCPOTrainer(**inputs.table_arguments())


class ReferenceFreeMixin(PreferenceTrainerMixin):
    """Gives the model TRL's fused head, and leaves the router's loss off.

    Both trainers of TRL 1.16 compute with whole logits, and take that loss from the model's config.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        """Take what the trainer takes."""
        super().__init__(model, **kwargs)
        add_fused_lm_head(base_model(self.model), outputs=FUSED_HEAD_OUTPUTS)
        use_head_log_probs(self.model)
        self.aux_loss_enabled = False


class LuthierORPOTrainer(ReferenceFreeMixin, ORPOTrainer):
    """ORPO: the better reply is learned, and made more probable than the worse one by odds.

    The loss of the odds is a mean over pairs, that of the better replies over their tokens.
    """

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The odds by pair, and the better replies by token."""
        # TRL returns the negative of the loss here, and turns its sign later.
        losses, *_ = self.odds_ratio_loss(*_mean_logps(scores))
        return LossTerms(-losses, -scores["chosen_logps"])

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics."""
        logps = _mean_logps(scores)
        _, chosen, rejected, log_odds_ratio, log_odds_chosen = self.odds_ratio_loss(*logps)
        return _reference_free_metrics(scores, logps, chosen, rejected) | {
            "log_odds_ratio": float(log_odds_ratio),
            "log_odds_chosen": float(log_odds_chosen),
        }


class LuthierCPOTrainer(ReferenceFreeMixin, CPOTrainer):
    """CPO and SimPO: one reply against the other, and the better one learned if so configured.

    The loss of the contrast is a mean over pairs, that of the better replies over their tokens.
    """

    def _compared_logps(self, scores: RowScores) -> tuple[Tensor, Tensor]:
        """The log-probabilities that the loss compares: by token for IPO and SimPO."""
        if self.loss_type in ("ipo", "simpo"):
            return _mean_logps(scores)
        return scores["chosen_logps"], scores["rejected_logps"]

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The contrast by pair, and the better replies by token, weighed by `cpo_alpha`."""
        losses, *_ = self.cpo_loss(*self._compared_logps(scores))
        learned = -self.cpo_alpha * scores["chosen_logps"] if self.cpo_alpha else 0.0
        return LossTerms(losses, learned)

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics."""
        logps = self._compared_logps(scores)
        _, chosen, rejected = self.cpo_loss(*logps)
        return _reference_free_metrics(scores, logps, chosen, rejected)


def _mean_logps(scores: RowScores) -> tuple[Tensor, Tensor]:
    """The log-probability by token of the better and of the worse reply."""
    # Clamped, as a reply may have no token that trains.
    chosen = scores["chosen_logps"] / scores["chosen_tokens"].clamp(min=1)
    return chosen, scores["rejected_logps"] / scores["rejected_tokens"].clamp(min=1)


def _reference_free_metrics(
    scores: RowScores,
    logps: tuple[Tensor, Tensor],
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
) -> dict[str, float]:
    """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
    return pair_metrics(scores, chosen_rewards, rejected_rewards) | {
        "logps/chosen": mean_over_rows(logps[0]),
        "logps/rejected": mean_over_rows(logps[1]),
        "nll_loss": mean_over_tokens(-scores["chosen_logps"], scores["chosen_tokens"]),
    }
