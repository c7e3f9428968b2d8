"""Direct preference optimisation and its kin, with a reference model: TRL's DPOTrainer."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import PairLayout
from luthier.data.prepare import Prepared
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.completions import count_pairs, forward, in_pairs, mask_of, token_sums
from luthier.train.methods.judging import Judging, Scores, Terms, mean, ratio
from luthier.train.methods.method import Ingredients
from luthier.train.methods.pair_losses import AVERAGED, COMPARING, LOSSES, Pairs, Strengths
from luthier.train.methods.preferring import PairMethod
from luthier.train.methods.referring import Referring, check_reference, reference_of


class PairTrainer(Referring, Judging, DPOTrainer):
    """Trains pairs of replies with any of TRL's losses, weighed by pairs."""

    layout = PairLayout
    shown = ("rewards/accuracies", "rewards/margins")
    references = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        given = {field.name: getattr(self.args, field.name) for field in fields(Strengths)}
        self.strengths = Strengths(**given)

    def count(self, inputs: Any) -> Tensor:
        """The real pairs, and the trained tokens of their better replies."""
        return count_pairs(inputs)

    def scores(self, model: Any, inputs: dict[str, Any]) -> Scores:
        """The log-probabilities of both replies, and the reference's."""
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward(model, inputs, **more)
        self._router = outputs.aux_loss if self.aux_loss_enabled else None
        sums = token_sums(outputs, inputs)
        sums["nll"] = -sums["logps"]
        if self.ld_alpha is not None:
            sums["logps"] = self._without_verbosity(outputs, inputs)
        if self.use_weighting:
            sums["weight"] = _likelihood(outputs, inputs, sums["trained"])
        return in_pairs(sums) | self.reference(inputs)

    def terms(self, scores: Scores) -> Terms:
        """The weighted sum of the losses."""
        pairs, weight = _pairs(scores), 1.0
        rows: Tensor | float = 0.0
        tokens: Tensor | float = 0.0
        if self.use_weighting:
            weight = scores["chosen_weight"] * scores["rejected_weight"]
        for name, share in zip(self.loss_types, self.loss_weights, strict=True):
            if name == AVERAGED:
                tokens = tokens + share * scores["chosen_nll"]
            else:
                rows = rows + share * weight * self._loss(name, pairs, scores["real"])
        return Terms(rows, tokens)

    def _loss(self, name: str, pairs: Pairs, real: Tensor) -> Tensor:
        """One loss of each pair."""
        if name not in COMPARING:
            return LOSSES[name](pairs, self.strengths)
        # Pairs that only fill up a batch are compared with none.
        taken = {field.name: getattr(pairs, field.name)[real] for field in fields(Pairs)}
        found = torch.zeros_like(pairs.policy)
        return found.masked_scatter(real, LOSSES[name](replace(pairs, **taken), self.strengths))

    def router_loss(self) -> Tensor | float:
        """The router's loss, for models of experts."""
        return 0.0 if self._router is None else self.router_aux_loss_coef * self._router

    def measures(self, scores: Scores) -> dict[str, float]:
        """TRL's metrics: over pairs, and where they are of tokens, over tokens."""
        pairs = _pairs(scores)
        chosen, rejected = self.beta * pairs.chosen, self.beta * pairs.rejected
        return pair_measures(scores, chosen, rejected) | {
            "logps/chosen": mean(scores["chosen_logps"]),
            "logps/rejected": mean(scores["rejected_logps"]),
        }

    def reference_scores(self, inputs: dict[str, Any]) -> Scores:
        """What the reference says of a batch."""
        kept = ("input_ids", "attention_mask", "completion_mask")
        model = self.ref_model or self.model
        found = self.compute_ref_log_probs(model, {name: inputs[name] for name in kept})
        return {n: part.float() for n, part in zip(self.references, found, strict=True)}

    def _without_verbosity(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Sums in which the tokens that the shorter reply does not have count less.

        LD-DPO, https://huggingface.co/papers/2409.06411
        """
        mask = mask_of(inputs)
        place, lengths = mask.cumsum(dim=1), mask.sum(dim=1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        weights = torch.where(place > shared[:, None], self.ld_alpha, 1.0)
        return (outputs.log_probs[:, -mask.shape[1] :].float() * weights * mask).sum(dim=1)


def pair_measures(scores: Scores, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """The metrics of pairs with these rewards, and of the tokens of their replies."""
    sides = ("chosen", "rejected")
    entropy = sum(scores[f"{side}_entropy"] for side in sides)
    trained = sum(scores[f"{side}_tokens"] for side in sides)
    logits = {
        f"logits/{side}": ratio(scores[f"{side}_logits"], scores[f"{side}_tokens"])
        for side in sides
    }
    return logits | {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean((chosen > rejected).float()),
        "rewards/margins": mean(chosen - rejected),
        "entropy": ratio(torch.as_tensor(entropy), torch.as_tensor(trained)),
        "mean_token_accuracy": ratio(scores["chosen_right"], scores["chosen_tokens"]),
    }


def _likelihood(outputs: Any, inputs: dict[str, Any], trained: Tensor) -> Tensor:
    """How likely the model itself writes each reply, by token, against what it would rather write.

    WPO, https://huggingface.co/papers/2406.11827
    """
    mask = mask_of(inputs)
    width = mask.shape[1]
    with torch.no_grad():
        found = outputs.log_probs[:, -width:].float() - outputs.log_sum_sq_probs[:, -width:].float()
        return ((found * mask).sum(dim=1) / trained.clamp(min=1)).exp()


def _pairs(scores: Scores) -> Pairs:
    chosen, rejected = scores["chosen_logps"], scores["rejected_logps"]
    ref_chosen, ref_rejected = scores["ref_chosen_logps"], scores["ref_rejected_logps"]
    return Pairs(
        chosen=chosen - ref_chosen,
        rejected=rejected - ref_rejected,
        policy=chosen - rejected,
        reference=ref_chosen - ref_rejected,
        chosen_tokens=scores["chosen_tokens"],
        rejected_tokens=scores["rejected_tokens"],
    )


class DPO(PairMethod):
    """Pairs of replies against a reference, with the losses of `trl.DPOConfig.loss_type`."""

    make = DPOConfig

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The `trl.DPOConfig`."""
        args = super().arguments(config, machine, folder, has_eval)
        check_reference(config)
        unknown = [name for name in args.loss_type if name not in (*LOSSES, AVERAGED)]
        if unknown:
            known = ", ".join([*LOSSES, AVERAGED])
            raise UserError(f"trainer.args.loss_type: {unknown[0]} is none of {known}.")
        if args.use_weighting and AVERAGED in args.loss_type:
            raise UserError(
                "trainer.args.use_weighting=true weighs pairs, and the loss sft is a mean over "
                "tokens.\nRemove one of them."
            )
        return args

    def load_model(self, config: RunConfig, machine: Machine, prepared: Prepared) -> Any:
        """A causal language model, and its reference where that is one of its own."""
        self.reference = reference_of(config, machine)
        return super().load_model(config, machine, prepared)

    def trainer(self, given: Ingredients) -> PairTrainer:
        """TRL's DPOTrainer over pairs that are tokens."""
        return PairTrainer(ref_model=self.reference, **self.common(given))
