"""Preference optimisation without a reference: TRL's ORPOTrainer and CPOTrainer (with SimPO)."""

import os
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import PairLayout
from luthier.train.methods.base import TrainerInputs
from luthier.train.methods.dpo import pair_measures
from luthier.train.methods.preference import (
    OUTPUTS,
    Judging,
    PairMethod,
    Scores,
    Terms,
    count_pairs,
    forward,
    in_pairs,
    mean,
    ratio,
    token_sums,
)

# What is experimental in TRL stays behind luthier's own arguments and tests.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Alone(Judging):
    """Stands before a trainer that scores pairs by the model alone.

    The better replies are also learned as they are: that part of the loss is a mean over their
    tokens, and no other token trains.
    """

    layout = PairLayout
    shown = ("rewards/accuracies", "rewards/margins")
    by_token: ClassVar[bool] = True
    """Whether replies are compared by their log-probability by token."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        # TRL computes with whole logits here; its own head for the other methods needs none.
        base: Any = self.model
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        add_fused_lm_head(base, outputs=OUTPUTS)
        self._router: Tensor | None = None

    def count(self, inputs: Any) -> Tensor:
        """The real pairs, and the trained tokens of their better replies."""
        return count_pairs(inputs)

    def scores(self, model: Any, inputs: dict[str, Any]) -> Scores:
        """The log-probabilities of both replies."""
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward(model, inputs, **more)
        self._router = outputs.aux_loss if self.aux_loss_enabled else None
        return in_pairs(token_sums(outputs, inputs))

    def compared(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """The log-probabilities that are compared."""
        sides = [
            scores[f"{side}_logps"]
            / (scores[f"{side}_tokens"].clamp(min=1) if self.by_token else 1)
            for side in ("chosen", "rejected")
        ]
        return sides[0], sides[1]

    def judged(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards of both replies."""
        raise NotImplementedError

    def router_loss(self) -> Tensor | float:
        """The router's loss, for models of experts."""
        return 0.0 if self._router is None else self.aux_loss_coef * self._router

    def measures(self, scores: Scores) -> dict[str, float]:
        """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
        _, chosen, rejected = self.judged(scores)
        logps = self.compared(scores)
        return pair_measures(scores, chosen, rejected) | {
            "logps/chosen": mean(logps[0]),
            "logps/rejected": mean(logps[1]),
            "nll_loss": ratio(-scores["chosen_logps"], scores["chosen_tokens"]),
        }


class OddsTrainer(Alone, ORPOTrainer):
    """ORPO: the better reply is learned, and made more probable than the worse one by odds."""

    def judged(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's own loss of the odds, whose sign it turns later."""
        losses, chosen, rejected, *_ = self.odds_ratio_loss(*self.compared(scores))
        return -losses, chosen, rejected

    def terms(self, scores: Scores) -> Terms:
        """The odds by pair, and the better replies by token."""
        return Terms(self.judged(scores)[0], -scores["chosen_logps"])

    def measures(self, scores: Scores) -> dict[str, float]:
        """TRL's metrics."""
        *_, ratios, odds = self.odds_ratio_loss(*self.compared(scores))
        own = {"log_odds_ratio": float(ratios), "log_odds_chosen": float(odds)}
        return super().measures(scores) | own


class ContrastTrainer(Alone, CPOTrainer):
    """CPO and SimPO: one reply against the other, and the better one learned if so wished."""

    @property
    def by_token(self) -> bool:  # type: ignore[override]
        """Whether replies are compared by their log-probability by token."""
        return self.loss_type in ("ipo", "simpo")

    def judged(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's own loss."""
        losses, chosen, rejected = self.cpo_loss(*self.compared(scores))
        return losses, chosen, rejected

    def terms(self, scores: Scores) -> Terms:
        """The contrast by pair, and the better replies by token, weighed by `cpo_alpha`."""
        learned = -self.cpo_alpha * scores["chosen_logps"] if self.cpo_alpha else 0.0
        return Terms(self.judged(scores)[0], learned)


class AloneMethod(PairMethod):
    """A method whose trainer asks for a length, which it uses for rows that are no tokens yet."""

    def own(self, config: RunConfig) -> dict[str, Any]:
        """What the arguments must say besides."""
        return {"max_length": config.chat.max_length or 1024}


class ORPO(AloneMethod):
    """Pairs of replies by their odds, without a reference."""

    make = ORPOConfig

    def trainer(self, given: TrainerInputs) -> OddsTrainer:
        """TRL's ORPOTrainer over pairs that are tokens."""
        return OddsTrainer(**self.common(given))


class CPO(AloneMethod):
    """Pairs of replies by their contrast, without a reference; SimPO with `loss_type: simpo`."""

    make = CPOConfig

    def trainer(self, given: TrainerInputs) -> ContrastTrainer:
        """TRL's CPOTrainer over pairs that are tokens."""
        return ContrastTrainer(**self.common(given))
