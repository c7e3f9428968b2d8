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
from luthier.data.batching.preference_collators import RewardCollator
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.tokenizer import PADDING_NAMES
from luthier.train.methods.heads import load_task_config
from luthier.train.methods.method import TrainerInputs, load_trained_model
from luthier.train.methods.preference_trainer import (
    LossTerms,
    PreferenceMethod,
    PreferenceTrainerMixin,
    RowScores,
    count_rows,
    mean_over_rows,
)

CHECKED_ROWS = 1000
"""The rows of each set whose last tokens are read, to choose a padding token that is none of them.
"""


class RewardMethod(PreferenceMethod):
    """Pairs of whole conversations, and a model with one number as its output."""

    arguments_class = RewardConfig

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return a model with one number as its output: its own head, or a new one by the seed."""
        load_task_config(config.model, "SEQ_CLS", "reward", "a model that can score a text")
        set_seed(config.seed)
        with suppress_seqcls_warning():
            return load_trained_model(config, machine, "SEQ_CLS", num_labels=1)

    def build_trainer(self, inputs: TrainerInputs) -> "LuthierRewardTrainer":
        """Return TRL's RewardTrainer over conversations that are tokens."""
        tokenizer = inputs.tokenizer
        pad_token_id = choose_padding_token(tokenizer, inputs.prepared)
        # It is saved with the model, which finds the end of a conversation by it.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
        return LuthierRewardTrainer(**inputs.table_arguments())


def choose_padding_token(tokenizer: Any, prepared: PreparedData) -> int:
    """A token that no row ends with: models read the score at the last token that is not this one.

    The tokenizer's own where it will do; UserError if there is none.
    """
    # The first name in this order that the tokenizer has and no row ends with.
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
        for number in islice(rows.different, CHECKED_ROWS):
            row = rows.table.row(int(number))
            yield from (int(row[name][-1]) for name in ("chosen_ids", "rejected_ids"))


class LuthierRewardTrainer(PreferenceTrainerMixin, RewardTrainer):
    """Trains a model to give the better of two conversations the higher number."""

    collator_class = RewardCollator
    result_metrics = ("accuracy", "margin")

    def count_items(self, inputs: Any) -> Tensor:
        """The real pairs of a batch; no part of the loss is by token."""
        return count_rows(inputs)

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """The rewards of both conversations."""
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        rewards = model(**model_inputs, use_cache=False).logits.squeeze(-1).float()
        chosen, rejected = rewards.chunk(2)
        lengths = inputs["attention_mask"].sum(dim=1).float().chunk(2)
        return {"chosen": chosen, "rejected": rejected, "tokens": lengths[0] + lengths[1]}

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The loss of Bradley and Terry, and rewards around zero if so configured."""
        chosen, rejected = scores["chosen"], scores["rejected"]
        loss = -logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return LossTerms(loss)

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """How many pairs are in the right order, and the rewards."""
        chosen, rejected = scores["chosen"], scores["rejected"]
        rewards = torch.cat([chosen, rejected])
        return {
            "accuracy": mean_over_rows((chosen > rejected).float()),
            "margin": mean_over_rows(chosen - rejected),
            "min_reward": float(rewards.min()),
            "mean_reward": mean_over_rows(rewards),
            "max_reward": float(rewards.max()),
        }
