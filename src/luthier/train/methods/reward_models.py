"""Reward models as rewards: loaded beside the model that trains, frozen, with their own template.

A reward model reads whole conversations as it did in its training: its own tokenizer and template,
encoded by luthier's chat encoder. Each process has one copy on its device, not sharded.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import PrivateAttr
from torch.nn.utils.rnn import pad_sequence

from luthier.chat import ChatError
from luthier.config.schema import RunConfig
from luthier.data.encoders.preference import ReplyEncoder
from luthier.errors import UserError
from luthier.infer.dequantize import dequantized_layers
from luthier.infer.llm import parse_weight_precision, read_load_options
from luthier.metrics.rewards import ModelReward, Reward, Rewards
from luthier.model.artifact import build_chat_encoder
from luthier.model.device import preserve_random_state
from luthier.model.reward_artifact import find_reward_artifact

_REPLY = "completion"


class LoadedModelReward(ModelReward):
    """A reward model that is loaded."""

    _scorer: "RewardModel" = PrivateAttr()

    @classmethod
    def load(cls, settings: ModelReward, config: RunConfig) -> "LoadedModelReward":
        """Return the reward with its model on the device of a run; UserError where it cannot be."""
        loaded = cls(**dict(settings))
        loaded._scorer = RewardModel(settings, config)
        return loaded

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The score of each conversation; UserError for one that the model cannot read."""
        tools = columns.get("tools") or [None] * len(prompts)
        return [*self._scorer.score(prompts, completions, tools)]


class RewardModel:
    """A frozen reward model with its tokenizer and its chat encoder."""

    def __init__(self, settings: ModelReward, config: RunConfig) -> None:
        """Load it; draws no random number that the training would have drawn."""
        self._settings = settings
        artifact = find_reward_artifact(settings)
        fields = {"device": settings.device or config.model.device, "dtype": settings.dtype}
        # The packing of rows, for which a run may have an attention of its own, is training's.
        fields |= {"attention": "auto"}
        packing = parse_weight_precision(settings.quantization)
        with preserve_random_state(), _load_whole():
            options = read_load_options(artifact, {k: v for k, v in fields.items() if v})
            self.model = options.model(packing, {"num_labels": 1})
        if artifact.adapter is None and self.model.new_layers:
            raise UserError(
                f"trainer.rewards: {settings.name}: {settings.path} is no reward model: its files "
                f"have no weights for {self.model.new_layers[0]}, which would be random."
            )
        self.tokenizer = options.tokenizer
        # transformers reads the score at the last token that is not this one.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int | None = positions
        chat = build_chat_encoder(artifact, self.tokenizer).settings()
        # What it reads in the training is scored as it is, or refused: nothing is cut or left out.
        strict = {"max_length": None, "on_long": "error", "on_lost": "error", "train_on": "all"}
        self._encoder = ReplyEncoder(
            self.tokenizer, chat | strict | {"empty_replies": "train"}, (_REPLY,), whole=True
        )

    def encode(
        self, prompts: Sequence[Any], completions: Sequence[Any], tools: Sequence[Any]
    ) -> list[list[int]]:
        """The ids of each conversation, as the model's template writes it to its end."""
        examples = [
            {"prompt": _messages(prompt, "user"), _REPLY: _messages(reply, "assistant")}
            | ({"tools": row_tools} if row_tools else {})
            for prompt, reply, row_tools in zip(prompts, completions, tools, strict=True)
        ]
        try:
            encoded = self._encoder.encode(examples)
        except ChatError as error:
            raise self._unreadable(error.row or 0, error.description) from error
        rows = []
        for number, replies in enumerate(encoded):
            if not replies:
                description = replies.problem[1] if replies.problem else "it has no tokens"
                raise self._unreadable(number, description)
            ids = replies.replies[0].whole
            if self._positions is not None and len(ids) > self._positions:
                reason = f"it has {len(ids):,} tokens, and the model reads {self._positions:,}"
                raise self._unreadable(number, reason)
            rows.append(ids)
        return rows

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], tools: Sequence[Any]
    ) -> list[float]:
        """The score of each conversation, the longest ones computed together."""
        rows = self.encode(prompts, completions, tools)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        scores = [0.0] * len(rows)
        size, pad = self._settings.batch_size, int(self.tokenizer.pad_token_id)
        with torch.inference_mode(), dequantized_layers(self.model):
            for start in range(0, len(order), size):
                numbers = order[start : start + size]
                ids = [torch.tensor(rows[number]) for number in numbers]
                mask = [torch.ones(len(row), dtype=torch.long) for row in ids]
                batch = {
                    "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                    "attention_mask": pad_sequence(mask, batch_first=True),
                }
                moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
                logits = self.model(**moved, use_cache=False).logits[:, 0].float()
                for number, score in zip(numbers, logits.tolist(), strict=True):
                    scores[number] = score
        return scores

    def _unreadable(self, number: int, reason: str) -> UserError:
        return UserError(
            f"reward {self._settings.name}: {self._settings.path} cannot score completion "
            f"{number}: {reason}."
        )


def load_reward_models(rewards: Sequence[Reward], config: RunConfig) -> list[Reward]:
    """Return the rewards, those by models loaded; UserError where one cannot be."""
    return [
        LoadedModelReward.load(reward, config) if isinstance(reward, ModelReward) else reward
        for reward in rewards
    ]


def _messages(text: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


@contextmanager
def _load_whole() -> Iterator[None]:
    """Load whole weights in each process, also where the model that trains is sharded.

    transformers 5.23 splits every model that is loaded under ZeRO-3, and under FSDP with
    `cpu_ram_efficient_loading` leaves all but the first process with empty weights: both wait for a
    wrapper that a model which only scores never gets.
    """
    from transformers.integrations import deepspeed

    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before, sharding = os.environ.get(variable), deepspeed._hf_deepspeed_config_weak_ref
    if before is not None:
        os.environ[variable] = "false"
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding
        if before is not None:
            os.environ[variable] = before
