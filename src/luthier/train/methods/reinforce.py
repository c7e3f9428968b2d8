"""GRPO and RLOO: the model answers prompts, and learns from the rewards of what it answered."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from luthier.chat import ChatEncoder
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders import RowEncoder
from luthier.data.prepare import Prepared
from luthier.errors import UserError
from luthier.infer.generate import dense_head
from luthier.infer.unpacked import unpacked
from luthier.metrics.reward import Reward
from luthier.metrics.rewards import parse_rewards, prepare_rewards, try_rewards
from luthier.model.encoder import make_encoder
from luthier.model.machine import Machine
from luthier.model.weights import load_model
from luthier.train.arguments import trainer_arguments
from luthier.train.gathered import unsharded
from luthier.train.methods.method import Ingredients
from luthier.train.methods.prompted import PromptRows, PromptSampler, prompt_encoder, prompt_rows
from luthier.train.methods.shared import Exact, precision_kept, recomputing_paused

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object

TRIED = 2
"""Rows with which the rewards are tried before training."""


class Prompted(Exact, Base):
    """Stands before a trainer of TRL whose model answers prompts.

    The prompts are luthier's own ids, and what ends a completion are the template's stop tokens.
    Completions are drawn without dropout. Under FSDP2 the weights are gathered once for all tokens.
    """

    shown = ("reward",)
    loss_shown = False

    def __init__(
        self,
        *,
        model: Any,
        encoder: ChatEncoder,
        train_rows: PromptRows,
        eval_rows: Mapping[str, PromptRows],
        **kwargs: Any,
    ) -> None:
        """Take what TRL's trainer takes, with `PromptRows` as datasets, those of sets by name."""
        self._prompt_ids: list[list[int]] = []
        self._set = ""
        with precision_kept(model):
            super().__init__(
                model=model,
                # TRL takes no other kind of dataset.
                train_dataset=Dataset.from_dict({"prompt": [""]}),
                eval_dataset=dict(eval_rows) or None,
                **kwargs,
            )
        self.train_dataset = train_rows
        self._refuse_too_few()
        self._stop_at(encoder.stop_token_ids)

    def _refuse_too_few(self) -> None:
        """Stop where no step could ever be filled."""
        needed = self.args.generation_batch_size // self.num_generations
        if len(self.train_dataset) < needed:
            raise UserError(
                f"dataset: there are {len(self.train_dataset)} prompts, and completions are drawn "
                f"for {needed} at once ({self.args.generation_batch_size} completions, "
                f"{self.num_generations} of each).\nSet a smaller "
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
        args, rows = self.args, self.train_dataset if dataset is None else dataset
        return PromptSampler(
            rows,
            mini_repeat_count=self.num_generations,
            batch_size=args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer prompts and score the answers; the prompts' ids go past TRL's own encoding."""
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        rows = [{key: row[key] for key in row if key != "prompt_ids"} for row in inputs]
        with recomputing_paused(self.model):
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
                stack.enter_context(unsharded(model, reshards))
            stack.enter_context(unpacked(model))
            stack.enter_context(dense_head(model))
            self.model.eval()
            stack.callback(self.model.train, was_training)
            return super()._generate_single_turn(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set, whose name the means of the rewards will have."""
        self._set = kwargs["metric_key_prefix"].removeprefix("eval").removeprefix("_")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the rewards, too: TRL has one name for them in all evaluation sets."""
        if not self.model.training and self._set:
            means = self._metrics["eval"]
            for name in list(means):
                means[f"{self._set}_{name}"] = means.pop(name)
        super().log(logs, start_time)


class GroupTrainer(Prompted, GRPOTrainer):
    """TRL's GRPOTrainer over prompts of luthier's own."""


class LeaveOneOutTrainer(Prompted, RLOOTrainer):
    """TRL's RLOOTrainer over prompts of luthier's own."""


class Reinforce:
    """Trains on the rewards of completions that the model itself writes."""

    make_arguments: Any
    make_trainer: Any

    def encoder(
        self, config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
    ) -> RowEncoder:
        """Conversations up to their last reply."""
        return prompt_encoder(config, tokenizer, _longest_completion(config, self.make_arguments))

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The `trl.GRPOConfig` or `trl.RLOOConfig`."""
        weights = parse_rewards(config.trainer.rewards)[1]
        own: dict[str, Any] = {
            "reward_weights": weights,
            "remove_unused_columns": False,
            # Dropout would make the log-probabilities of the same text differ from call to call.
            "disable_dropout": config.trainer.args.get("disable_dropout", True),
        }
        revision = config.model.revision
        if config.trainer.args.get("beta", 1) and not config.lora and revision is not None:
            # TRL loads the model once more, to compare with.
            own["model_init_kwargs"] = {"revision": revision}
        return trainer_arguments(self.make_arguments, config, machine, folder, has_eval, own)

    def load_model(self, config: RunConfig, machine: Machine, prepared: Prepared) -> Any:
        """A causal language model."""
        return load_model(config.model, config.quantization, machine, full=not config.lora)

    def trainer(self, given: Ingredients) -> Any:
        """TRL's trainer; every reward has been tried on a few rows and seen every reference."""
        rewards = parse_rewards(given.config.trainer.rewards)[0]
        train, sets = prompt_rows(given.prepared)
        _try(rewards, given.tokenizer, train, *sets.values())
        return self.make_trainer(
            model=given.model,
            encoder=make_encoder(given.config, given.tokenizer),
            train_rows=train,
            eval_rows=sets,
            reward_funcs=rewards,
            args=given.args,
            processing_class=given.tokenizer,
            callbacks=given.callbacks,
        )


class GroupRelative(Reinforce):
    """GRPO, https://arxiv.org/abs/2402.03300: rewards against those of the same prompt's group."""

    make_arguments = GRPOConfig
    make_trainer = GroupTrainer


class LeaveOneOut(Reinforce):
    """RLOO, https://arxiv.org/abs/2402.14740: each reward against the mean of the others."""

    make_arguments = RLOOConfig
    make_trainer = LeaveOneOutTrainer


def _longest_completion(config: RunConfig, make: Any) -> int | None:
    default = make.__dataclass_fields__["max_completion_length"].default
    longest: int | None = config.trainer.args.get("max_completion_length", default)
    return longest


def _try(rewards: list[Reward], tokenizer: Any, *sides: PromptRows) -> None:
    """Show the rewards every reference, and call them on a few rows with these as completions."""
    for rows in sides:
        prepare_rewards(rewards, rows.columns())
    first = [sides[0][number] for number in range(min(TRIED, len(sides[0])))]
    columns = {name: [row[name] for row in first] for name in sides[0].names}
    texts = [row["reference"] if isinstance(row["reference"], str) else "" for row in first]
    columns["completion_ids"] = [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    try_rewards(rewards, [row["prompt"] for row in first], completions, columns)
