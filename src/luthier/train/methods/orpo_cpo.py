"""Preference optimisation without a reference: TRL's ORPOTrainer and CPOTrainer (with SimPO)."""

import os
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import PairCollator
from luthier.train.methods.dpo import pair_metrics
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.preference_trainer import (
    FUSED_HEAD_OUTPUTS,
    LossTerms,
    PreferenceMethod,
    PreferenceTrainerMixin,
    RowScores,
    count_pairs,
    forward_fused,
    mean_over_rows,
    mean_over_tokens,
    split_pairs,
    sum_token_outputs,
)

# What is experimental in TRL stays behind luthier's own arguments and tests.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class ReferenceFreeMixin(PreferenceTrainerMixin):
    """Stands before a trainer that scores pairs by the model alone.

    The better replies are also learned as they are: that part of the loss is a mean over their
    tokens, and no other token trains.
    """

    collator_class = PairCollator
    result_metrics = ("rewards/accuracies", "rewards/margins")
    compares_by_token: ClassVar[bool] = True
    """Whether replies are compared by their log-probability by token."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        # TRL computes with whole logits here; its own head for the other methods needs none.
        base: Any = self.model
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        add_fused_lm_head(base, outputs=FUSED_HEAD_OUTPUTS)
        self._router: Tensor | None = None

    def count_items(self, inputs: Any) -> Tensor:
        """The real pairs, and the trained tokens of their better replies."""
        return count_pairs(inputs)

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The log-probabilities of both replies."""
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward_fused(model, inputs, **more)
        self._router = outputs.aux_loss if self.aux_loss_enabled else None
        return split_pairs(sum_token_outputs(outputs, inputs))

    def compared_logps(self, scores: RowScores) -> tuple[Tensor, Tensor]:
        """The log-probabilities that are compared."""
        sides = [
            scores[f"{side}_logps"]
            / (scores[f"{side}_tokens"].clamp(min=1) if self.compares_by_token else 1)
            for side in ("chosen", "rejected")
        ]
        return sides[0], sides[1]

    def pair_losses(self, scores: RowScores) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards of both replies."""
        raise NotImplementedError

    def router_loss(self) -> Tensor | float:
        """The router's loss, for models of experts."""
        return 0.0 if self._router is None else self.aux_loss_coef * self._router

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
        _, chosen, rejected = self.pair_losses(scores)
        logps = self.compared_logps(scores)
        return pair_metrics(scores, chosen, rejected) | {
            "logps/chosen": mean_over_rows(logps[0]),
            "logps/rejected": mean_over_rows(logps[1]),
            "nll_loss": mean_over_tokens(-scores["chosen_logps"], scores["chosen_tokens"]),
        }


class LuthierORPOTrainer(ReferenceFreeMixin, ORPOTrainer):
    """ORPO: the better reply is learned, and made more probable than the worse one by odds."""

    def pair_losses(self, scores: RowScores) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's own loss of the odds, whose sign it turns later."""
        losses, chosen, rejected, *_ = self.odds_ratio_loss(*self.compared_logps(scores))
        return -losses, chosen, rejected

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The odds by pair, and the better replies by token."""
        return LossTerms(self.pair_losses(scores)[0], -scores["chosen_logps"])

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """TRL's metrics."""
        *_, ratios, odds = self.odds_ratio_loss(*self.compared_logps(scores))
        own = {"log_odds_ratio": float(ratios), "log_odds_chosen": float(odds)}
        return super().aggregate_metrics(scores) | own


class LuthierCPOTrainer(ReferenceFreeMixin, CPOTrainer):
    """CPO and SimPO: one reply against the other, and the better one learned if so wished."""

    @property
    def compares_by_token(self) -> bool:  # type: ignore[override]
        """Whether replies are compared by their log-probability by token."""
        return self.loss_type in ("ipo", "simpo")

    def pair_losses(self, scores: RowScores) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's own loss."""
        losses, chosen, rejected = self.cpo_loss(*self.compared_logps(scores))
        return losses, chosen, rejected

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The contrast by pair, and the better replies by token, weighed by `cpo_alpha`."""
        learned = -self.cpo_alpha * scores["chosen_logps"] if self.cpo_alpha else 0.0
        return LossTerms(self.pair_losses(scores)[0], learned)


class ReferenceFreeMethod(PreferenceMethod):
    """A method whose trainer asks for a length, which it uses for rows that are no tokens yet."""

    def own(self, config: RunConfig) -> dict[str, Any]:
        """What the arguments must say besides."""
        return {"max_length": config.chat.max_length or 1024}


class ORPOMethod(ReferenceFreeMethod):
    """Pairs of replies by their odds, without a reference."""

    make = ORPOConfig

    def build_trainer(self, given: TrainerInputs) -> LuthierORPOTrainer:
        """TRL's ORPOTrainer over pairs that are tokens."""
        return LuthierORPOTrainer(**self.common(given))


class CPOMethod(ReferenceFreeMethod):
    """Pairs of replies by their contrast, without a reference; SimPO with `loss_type: simpo`."""

    make = CPOConfig

    def build_trainer(self, given: TrainerInputs) -> LuthierCPOTrainer:
        """TRL's CPOTrainer over pairs that are tokens."""
        return LuthierCPOTrainer(**self.common(given))
