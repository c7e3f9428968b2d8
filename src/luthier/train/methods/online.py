"""Prompts as rows of a trainer that has its model answer them, with the columns for rewards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encode_source import EncodedSource
from luthier.data.encoders.prompts import reference_text, split_prompt_and_reply
from luthier.data.prepare import PreparedData
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError
from luthier.infer.dequantize import dequantized_layers
from luthier.infer.generate import patched_output_layer
from luthier.train.evaluation import unsharded_weights
from luthier.train.methods.encoders import make_chat_encoder
from luthier.train.trainers.base import (
    TrainerMixin,
    keep_weight_precision,
    pause_activation_checkpointing,
)

RESERVED_COLUMNS = frozenset(
    ["prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids",
     "trainer_state", "log_extra", "log_metric", "environment", "environments", "image", "images"]
)  # fmt: skip
"""Names that TRL itself gives to reward functions, or reads from a row."""


class PromptDataset:
    """Prompts by number: `prompt` (messages), `prompt_ids`, `reference`, and the row's columns.

    `reference` is the text of the reply that the conversation ends with, if the row has no column
    of this name. Every row has every column, null where its source has none.
    """

    def __init__(self, rows: TokenRows, parts: Iterable[EncodedSource]) -> None:
        """`parts`: those whose token rows the table joins, in any order."""
        assert isinstance(rows.table, JoinedTable)
        by_table = {id(part.tokens): part for part in parts}
        self._parts = [by_table[id(table)] for table in rows.table.tables]
        self._tokens = rows.table
        count = len(rows)
        self._index = np.arange(count) if rows.index is None else rows.index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        example, own = self._row(int(self._index[number]))
        ids = self._tokens.row(int(self._index[number]))["input_ids"]
        columns: dict[str, Any] = dict.fromkeys(self.names) | {"reference": reference_text(example)}
        columns |= {name: value for name, value in own.items() if name not in RESERVED_COLUMNS}
        return {"prompt": split_prompt_and_reply(example)[0], "prompt_ids": ids.tolist(), **columns}

    @cached_property
    def names(self) -> list[str]:
        """The columns of all rows besides the prompt, `reference` first."""
        found = dict.fromkeys(["reference"])
        for number in np.unique(self._index):
            found |= dict.fromkeys(self._row(int(number))[1])
        return [name for name in found if name not in RESERVED_COLUMNS]

    def columns(self) -> dict[str, list[Any]]:
        """Each column over all different rows."""
        numbers = np.unique(self._index, return_index=True)[1]
        rows = [self[int(number)] for number in numbers]
        return {name: [row[name] for row in rows] for name in self.names}

    @cached_property
    def _numbers(self) -> list[Any]:
        """For each part, the rows that make a prompt."""
        return [np.flatnonzero(part.sequences > 0) for part in self._parts]

    def _row(self, number: int) -> tuple[Any, Mapping[str, Any]]:
        """The example and the columns of a prompt of the table."""
        starts = [self._tokens.start_of(n) for n in range(len(self._parts))]
        table = int(np.searchsorted(starts, number, side="right")) - 1
        row = [int(self._numbers[table][number - starts[table]])]
        part = self._parts[table]
        return part.examples(row)[0], part.columns(row)[0]


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, of which each stands once for each of its completions.

    TRL draws the order of an epoch behind that of the one before, so a run that goes on in a later
    epoch would see the first one's again. Here it depends on the seed and the epoch alone.
    """

    epoch = 0

    @classmethod
    def like(cls, other: RepeatSampler) -> "PromptSampler":
        """One that repeats prompts as TRL's own does."""
        return cls(
            other.data_source,
            mini_repeat_count=other.mini_repeat_count,
            batch_size=other.batch_size,
            repeat_count=other.repeat_count,
            shuffle=other.shuffle,
            seed=other.seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            state = np.random.SeedSequence([self.seed or 0, self.epoch]).generate_state(1)
            self.generator.manual_seed(int(state[0]))
        return super().__iter__()


def stop_token_ids(config: RunConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a reply, by the run's chat template."""
    encoder = make_chat_encoder(config, tokenizer)
    assert encoder is not None, "the prompts have come from it"
    return encoder.stop_token_ids


def make_prompt_datasets(prepared: PreparedData) -> tuple[PromptDataset, dict[str, PromptDataset]]:
    """The prompts to train on, and those of each evaluation set by name; the only one has none."""
    assert isinstance(prepared.train, TokenRows)
    parts = list(prepared.sources.values())
    sets = {name: PromptDataset(rows, parts) for name, rows in prepared.eval.items()}
    if len(sets) == 1:
        sets = {"": next(iter(sets.values()))}
    return PromptDataset(prepared.train, parts), sets


# What TRL's trainers share whose model answers prompts: ids, stop tokens, order, whole weights.

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object


class OnlineTrainerMixin(TrainerMixin, Base):
    """Stands before a trainer of TRL whose model answers prompts.

    The prompts are luthier's own ids, and what ends a completion are the template's stop tokens.
    Completions are drawn without dropout. Under FSDP2 the weights are gathered once for all tokens.
    """

    def __init__(
        self,
        *,
        model: Any,
        stop_ids: list[int],
        train_rows: PromptDataset,
        eval_rows: Mapping[str, PromptDataset],
        **kwargs: Any,
    ) -> None:
        """Take what TRL's trainer takes, with `PromptRows` as datasets, those of sets by name.

        `stop_ids`: the tokens that end a completion.
        """
        self._prompt_ids: list[list[int]] = []
        self._set = ""
        with keep_weight_precision(model):
            super().__init__(
                model=model,
                # TRL takes no other kind of dataset.
                train_dataset=Dataset.from_dict({"prompt": [""]}),
                eval_dataset=dict(eval_rows) or None,
                **kwargs,
            )
        self.train_dataset = train_rows
        self._refuse_too_few()
        self._stop_at(stop_ids)

    def _refuse_too_few(self) -> None:
        """Stop where no step could ever be filled."""
        order = self._get_train_sampler()
        if not len(order):
            raise UserError(
                f"dataset: there are {order.num_samples} prompts, and the model answers "
                f"{order.batch_size} at once.\nSet a smaller "
                "trainer.args.per_device_train_batch_size or gradient_accumulation_steps."
            )

    def _stop_at(self, stop_ids: list[int]) -> None:
        """Let these tokens, and no others, end a completion."""
        self.eos_token_ids = stop_ids
        if self.use_vllm:
            given = self.vllm_generation.generation_kwargs or {}
            self.vllm_generation.generation_kwargs = given | {"stop_token_ids": stop_ids}
            return
        own = {"eos_token_id": stop_ids, "use_cache": True}
        self.generation_kwargs |= own
        self.generation_config.update(**own)

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        return PromptSampler.like(super()._get_train_sampler(dataset))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer prompts and score the answers; the prompts' ids go past TRL's own encoding."""
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        rows = [{key: row[key] for key in row if key != "prompt_ids"} for row in inputs]
        with pause_activation_checkpointing(self.model):
            return super()._generate_and_score_completions(rows)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that the chat encoder made; neither images nor other fields."""
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        model: Any = self.accelerator.unwrap_model(self.model)
        was_training = self.model.training
        with ExitStack() as stack:
            if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2:
                reshards = self.accelerator.state.fsdp_plugin.reshard_after_forward
                stack.enter_context(unsharded_weights(model, reshards))
            stack.enter_context(dequantized_layers(model))
            stack.enter_context(patched_output_layer(model))
            self.model.eval()
            stack.callback(self.model.train, was_training)
            return super()._generate_single_turn(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set, whose name its measures will have."""
        self._set = kwargs["metric_key_prefix"].removeprefix("eval").removeprefix("_")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; TRL has one name for what it measures in all evaluation sets."""
        if not self.model.training and self._set:
            means = self._metrics["eval"]
            for name in list(means):
                means[f"{self._set}_{name}"] = means.pop(name)
        super().log(logs, start_time)
