"""Trainers of TRL whose model answers prompts, and the prompts as their rows.

The prompts are luthier's own ids, completions end by the chat template's stop tokens, and rewards
read the columns of the rows.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather
from datasets import Dataset
from trl.trainer.utils import RepeatSampler, nanstd

from luthier.config.schema import RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encode_source import EncodedSource
from luthier.data.encoders.prompts import reference_text, split_prompt_and_reply
from luthier.data.prepare import PreparedData
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError
from luthier.infer.dequantize import dequantized_layers
from luthier.infer.generate import patched_output_layer
from luthier.model.device import capture_random_state
from luthier.train.evaluation import unsharded_weights
from luthier.train.methods.encoders import make_chat_encoder
from luthier.train.methods.method import name_eval_sets
from luthier.train.methods.reference_model import copy_adapter_undrawn
from luthier.train.signals import gloo_group
from luthier.train.trainers.base import (
    TrainerMixin,
    keep_weight_precision,
    pause_activation_checkpointing,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object

RESERVED_COLUMNS = frozenset(
    ["prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids",
     "row_location", "template_variables", "trainer_state", "log_extra", "log_metric",
     "environment", "environments", "image", "images"]
)  # fmt: skip
"""Names that TRL itself gives to reward functions, or reads from a row."""


NO_COLUMNS = ("prompt_ids", "row_location", "template_variables")
"""What a row has for the trainer alone; rewards do not see it."""


class PromptDataset:
    """Prompts by number: `prompt` (messages), `prompt_ids`, `reference`, and the row's columns.

    `row_location` is the place of the row, such as `data.jsonl:7`, and `template_variables` are its
    own variables for the chat template. `reference` is the text of the
    reply that the conversation ends with, if the row has no column of this name. Every row has
    every column, null where its source has none.
    """

    def __init__(self, rows: TokenRows, sources: Iterable[EncodedSource]) -> None:
        """`sources` are those whose token rows the table of `rows` joins, in any order."""
        assert isinstance(rows.table, JoinedTable)
        by_table = {id(source.tokens): source for source in sources}
        self._sources = [by_table[id(table)] for table in rows.table.tables]
        self._tokens = rows.table
        self._index = np.arange(len(rows)) if rows.index is None else rows.index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        table_row = int(self._index[number])
        example, row_columns, location = self._read_row(table_row)
        ids = self._tokens.row(table_row)["input_ids"]
        columns: dict[str, Any] = dict.fromkeys(self.names) | {"reference": reference_text(example)}
        columns |= {n: value for n, value in row_columns.items() if n not in RESERVED_COLUMNS}
        return {
            "prompt": split_prompt_and_reply(example)[0],
            "prompt_ids": ids.tolist(),
            "row_location": location,
            "template_variables": example.get("chat_template_kwargs"),
            **columns,
        }

    @cached_property
    def names(self) -> list[str]:
        """The columns of all rows besides the prompt, `reference` first."""
        names = dict.fromkeys(["reference"])
        for table_row in np.unique(self._index):
            names |= dict.fromkeys(self._read_row(int(table_row))[1])
        return [name for name in names if name not in RESERVED_COLUMNS]

    def columns(self) -> dict[str, list[Any]]:
        """Each column over all different rows."""
        numbers = np.unique(self._index, return_index=True)[1]
        rows = [self[int(number)] for number in numbers]
        return {name: [row[name] for row in rows] for name in self.names}

    @cached_property
    def _source_rows(self) -> list[Any]:
        """For each source, the numbers of its rows that make a prompt."""
        return [np.flatnonzero(source.sequences > 0) for source in self._sources]

    def _read_row(self, table_row: int) -> tuple[Any, Mapping[str, Any], str]:
        """The example, the columns and the place of a prompt of the table."""
        starts = [self._tokens.start_of(n) for n in range(len(self._sources))]
        number = int(np.searchsorted(starts, table_row, side="right")) - 1
        source = self._sources[number]
        row = [int(self._source_rows[number][table_row - starts[number]])]
        return source.examples(row)[0], source.columns(row)[0], source.locations(row)[0]


def make_prompt_datasets(prepared: PreparedData) -> tuple[PromptDataset, dict[str, PromptDataset]]:
    """The prompts to train on, and those of each evaluation set by name; a single one has none."""
    assert isinstance(prepared.train, TokenRows)
    sources = list(prepared.sources.values())
    sets = name_eval_sets(prepared.eval)
    return PromptDataset(prepared.train, sources), {
        name: PromptDataset(rows, sources) for name, rows in sets.items()
    }


def stop_token_ids(config: RunConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a reply, by the run's chat template."""
    encoder = make_chat_encoder(config, tokenizer)
    assert encoder is not None, "the prompts have come from it"
    return encoder.stop_token_ids


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, of which each stands once for each of its completions.

    TRL 1.16 draws the order of an epoch behind that of the one before, so a run that is resumed in
    a later epoch would see the first one's again. Here it depends on the seed and the epoch alone.
    """

    epoch = 0

    @classmethod
    def copy_of(cls, sampler: RepeatSampler) -> "PromptSampler":
        """A sampler that repeats prompts as one of TRL's does."""
        return cls(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            state = np.random.SeedSequence([self.seed or 0, self.epoch]).generate_state(1)
            self.generator.manual_seed(int(state[0]))
        return super().__iter__()


class StepStart(NamedTuple):
    """What a step has changed before its weights do, as it was when the step began."""

    step: int
    """The optimizer steps that were taken before."""
    restore_random_state: Callable[[], None]
    measures: dict[str, list[float]]
    """What TRL has measured since the last line of metrics."""
    seen_tokens: float


class OnlineTrainerMixin(TrainerMixin, Base):
    """Stands before a trainer of TRL whose model answers prompts.

    The prompts are luthier's own ids, and what ends a completion are the template's stop tokens.
    Completions are drawn without dropout. Under FSDP2 the weights are gathered once for all tokens.
    Rewards of an evaluation are means over all its completions.
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
        """Take what TRL's trainer takes, with prompts as datasets, those of sets by name.

        `stop_ids` are the tokens that end a completion.
        """
        self._prompt_ids: list[list[int]] = []
        self._eval_set = ""
        self._step_start: StepStart | None = None
        self._eval_rewards: list[torch.Tensor] = []
        with copy_adapter_undrawn(model), keep_weight_precision(model):
            super().__init__(
                model=model,
                # TRL looks at the first row, and takes nothing but a `datasets.Dataset`.
                train_dataset=Dataset.from_dict({"prompt": [""]}),
                eval_dataset=dict(eval_rows) or None,
                **kwargs,
            )
        self.train_dataset = train_rows
        order = self._get_train_sampler()
        if not len(order):
            raise UserError(
                f"dataset: there are {order.num_samples} prompts, and the model answers "
                f"{order.batch_size} at once.\nSet a smaller "
                "trainer.args.per_device_train_batch_size or gradient_accumulation_steps."
            )
        self._refuse_cut_groups(bool(eval_rows))
        self._set_stop_tokens(stop_ids)

    def _refuse_cut_groups(self, evaluates: bool) -> None:
        """Raise UserError where a batch of an evaluation would end within a prompt's completions.

        TRL 1.16 looks at it only where `eval_strategy` is set, and luthier measures in any case.
        """
        size = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        generations = getattr(self, "num_generations_eval", 1)
        if evaluates and size % generations:
            raise UserError(
                "trainer.args.per_device_eval_batch_size: an evaluation takes batches of "
                f"{size} completions on all processes together, which {generations} completions of "
                "each prompt do not divide.\nSet it to a multiple of num_generations_eval (or of "
                "num_generations, where that is not set)."
            )

    def _set_stop_tokens(self, stop_ids: list[int]) -> None:
        """Let these tokens, and no others, end a completion."""
        self.eos_token_ids = stop_ids
        if self.use_vllm:
            # vLLM has settings of its own for a generation.
            kwargs = self.vllm_generation.generation_kwargs or {}
            self.vllm_generation.generation_kwargs = kwargs | {"stop_token_ids": stop_ids}
            return
        # The cache is off in the config of a model that trains, and generation is slow without.
        settings = {"eos_token_id": stop_ids, "use_cache": True}
        self.generation_kwargs |= settings
        self.generation_config.update(**settings)

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        return PromptSampler.copy_of(super()._get_train_sampler(dataset))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer prompts and score the answers; the prompts' ids go past TRL's own encoding."""
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        if self.model.training:
            self._note_step_start(anew=False)
        rows = [{key: row[key] for key in row if key not in NO_COLUMNS} for row in inputs]
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
            if self.is_fsdp_enabled:
                reshards = self.accelerator.state.fsdp_plugin.reshard_after_forward
                stack.enter_context(unsharded_weights(model, reshards))
            stack.enter_context(dequantized_layers(model))
            stack.enter_context(patched_output_layer(model))
            self.model.eval()
            stack.callback(self.model.train, was_training)
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the rewards of an evaluation; TRL calls this in GRPO and RLOO alone.

        A reward that fails in one process stops all of them, with a checkpoint of the steps before.
        """
        mistake: UserError | None = None
        try:
            rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        except UserError as error:
            mistake = error
            # The other processes wait in TRL's exchange of the rewards, so this one takes part.
            rows, device = len(self._prompt_ids), self.accelerator.device
            gather(torch.full((rows, len(self.reward_funcs)), torch.nan, device=device))
        self._stop_if_rewards_failed(mistake)
        if not self.model.training:
            self._eval_rewards.append(rewards.cpu())
        return rewards

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, whose loader draws before its first step."""
        self._note_step_start()
        super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state, which the next step begins with."""
        super()._load_rng_state(checkpoint)
        self._note_step_start()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, between two steps or outside of the training."""
        self._note_step_start()
        return super().evaluate(*args, **kwargs)

    def _note_step_start(self, anew: bool = True) -> None:
        """Note what the step is about to change; without `anew`, unless it was noted already."""
        step = self.state.global_step
        if anew or self._step_start is None or self._step_start.step != step:
            measures = copy.deepcopy(dict(self._metrics["train"]))
            seen_tokens = self.state.num_input_tokens_seen
            self._step_start = StepStart(step, capture_random_state(), measures, seen_tokens)

    def _stop_if_rewards_failed(self, mistake: UserError | None) -> None:
        """Raise UserError in all processes where the rewards failed in one; all call it together.

        The weights are still those of the last step: they are saved, and the run can go on.
        """
        texts = [None if mistake is None else str(mistake)]
        if self.accelerator.num_processes > 1:
            gathered: list[Any] = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, texts[0], gloo_group())
            texts = gathered
        text = next((text for text in texts if text is not None), None)
        if text is not None:
            raise UserError(f"{text}\n{self._save_taken_steps()}") from mistake

    def _save_taken_steps(self) -> str:
        """Take a checkpoint as it would have been behind the last step; say where it is."""
        step, start = self.state.global_step, self._step_start
        if step == 0:
            return "No step was taken yet, so nothing is lost."
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        # Behind the training the best weights may be in place, which are of another step.
        if not folder.is_dir() and (self.is_in_train or not self.args.load_best_model_at_end):
            if start is not None and start.step == step:
                start.restore_random_state()
                self._metrics["train"].clear()
                self._metrics["train"].update(start.measures)
                self.state.num_input_tokens_seen = start.seen_tokens
            self.is_scheduled_save = False
            # The Trainer of transformers has no public way to take a checkpoint within a step.
            self._save_checkpoint(self.model, None)
        return f"The {step} steps before it are saved. Run the same command to resume."

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set, whose name its metrics will have."""
        self._eval_set = kwargs["metric_key_prefix"].removeprefix("eval").removeprefix("_")
        self._eval_rewards.clear()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self._eval_rewards:
            self._average_rewards(len(dataloader.dataset) * self.num_generations_eval)
        return output

    def _average_rewards(self, completions: int) -> None:
        """Put the means over all completions of an evaluation in place of TRL's.

        TRL 1.16 takes means of the batches' means, in which a small last batch counts as much as
        the others, and rows that fill up a batch of several processes count twice.
        """
        rewards = torch.cat(self._eval_rewards)[:completions]
        weighted = (rewards * self.reward_weights).nansum(dim=1)
        weighted[rewards.isnan().all(dim=1)] = torch.nan
        columns = {("reward", "reward_std"): weighted}
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            columns[f"rewards/{name}/mean", f"rewards/{name}/std"] = column
        for (mean_name, std_name), column in columns.items():
            self._metrics["eval"][mean_name] = [torch.nanmean(column).item()]
            self._metrics["eval"][std_name] = [nanstd(column).item()]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the name of the evaluation set in the names of its metrics."""
        # TRL 1.16 has one name for what it measures in all evaluation sets.
        if not self.model.training and self._eval_set:
            means = self._metrics["eval"]
            for name in list(means):
                means[f"{self._eval_set}_{name}"] = means.pop(name)
        super().log(logs, *args, **kwargs)
