"""Reward models: one number for a conversation, learned from pairs: TRL's RewardTrainer."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import set_seed
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import suppress_seqcls_warning

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import WholeLayout
from luthier.data.batching.rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.model.tokenizer import PADDING_NAMES
from luthier.train.methods.base import TrainerInputs
from luthier.train.methods.heads import model_config
from luthier.train.methods.preference import Judging, PairMethod, Scores, Terms, mean

LOOKED_AT = 1000
"""Rows whose last tokens are looked at, to choose a padding token that is none of them."""


class ScoreTrainer(Judging, RewardTrainer):
    """Trains a model to give the better of two conversations the higher number."""

    layout = WholeLayout
    shown = ("accuracy", "margin")

    def count(self, inputs: Any) -> Tensor:
        """The real pairs of a batch."""
        real = inputs["real"].sum()
        return torch.stack([real, torch.zeros_like(real)]).float()

    def scores(self, model: Any, inputs: dict[str, Any]) -> Scores:
        """The rewards of both conversations."""
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        rewards = model(**kept, use_cache=False).logits.squeeze(-1).float()
        chosen, rejected = rewards.chunk(2)
        read = inputs["attention_mask"].sum(dim=1).float().chunk(2)
        return {"chosen": chosen, "rejected": rejected, "tokens": read[0] + read[1]}

    def terms(self, scores: Scores) -> Terms:
        """The loss of Bradley and Terry, and rewards around zero if so wished."""
        chosen, rejected = scores["chosen"], scores["rejected"]
        loss = -logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return Terms(loss)

    def measures(self, scores: Scores) -> dict[str, float]:
        """How many pairs are in the right order, and the rewards."""
        chosen, rejected = scores["chosen"], scores["rejected"]
        rewards = torch.cat([chosen, rejected])
        return {
            "accuracy": mean((chosen > rejected).float()),
            "margin": mean(chosen - rejected),
            "min_reward": float(rewards.min()),
            "mean_reward": mean(rewards),
            "max_reward": float(rewards.max()),
        }


class Reward(PairMethod):
    """Pairs of whole conversations, and a model with one number as its output."""

    make = RewardConfig

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A model with one number as its output: its own such head, or a new one from the seed."""
        model_config(config.model, "SEQ_CLS", "reward", "a model that can score a text")
        set_seed(config.seed)
        with suppress_seqcls_warning():
            return load_model(
                config.model,
                config.quantization,
                machine,
                full=not config.lora,
                task="SEQ_CLS",
                num_labels=1,
            )

    def trainer(self, given: TrainerInputs) -> ScoreTrainer:
        """TRL's RewardTrainer over conversations that are tokens."""
        pad = given.tokenizer.convert_ids_to_tokens(padding(given.tokenizer, given.prepared))
        # It is saved with the model, which finds the end of a conversation by it.
        given.tokenizer.pad_token = pad
        return ScoreTrainer(**self.common(given))


def padding(tokenizer: Any, prepared: PreparedData) -> int:
    """A token that no row ends with: models read the score at the last token that is not this one.

    The tokenizer's own where it will do; UserError if there is none.
    """
    vocabulary = tokenizer.get_vocab()
    names = [tokenizer.pad_token, *PADDING_NAMES, tokenizer.unk_token, tokenizer.bos_token]
    ends = {tokenizer.eos_token_id, *_last_tokens(prepared)}
    for name in names:
        if name in vocabulary and vocabulary[name] not in ends:
            return int(vocabulary[name])
    raise UserError(
        "Every token that could stand for padding also ends a conversation, and a model finds a "
        "conversation's end by it.\nName another one: pad_token in tokenizer_config.json."
    )


def _last_tokens(prepared: PreparedData) -> Iterator[int]:
    """The last tokens of some rows."""
    assert isinstance(prepared.train, TokenRows)
    for rows in (prepared.train, *prepared.eval.values()):
        for number in islice(rows.different, LOOKED_AT):
            row = rows.table.row(int(number))
            yield from (int(row[name][-1]) for name in ("chosen_ids", "rejected_ids"))
