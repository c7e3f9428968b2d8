"""GRPO and RLOO: the model answers prompts, and learns from the rewards of what it answered."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import pad

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.metrics.rewards import (
    EnvironmentReward,
    Reward,
    parse_rewards,
    prepare_rewards,
    try_rewards,
)
from luthier.record.checkpoints import ROLLOUTS_FILE
from luthier.storage.atomic import append_jsonl
from luthier.train.methods.encoders import make_turn_encoder
from luthier.train.methods.method import TrainerInputs, TrainingMethod
from luthier.train.methods.online import (
    OnlineTrainerMixin,
    PromptDataset,
    make_prompt_datasets,
    stop_token_ids,
)
from luthier.train.methods.reward_models import load_reward_models
from luthier.train.methods.rollouts import Rollout, RolloutRunner, TurnEncoder
from luthier.train.methods.sampled_weights import SampledLogps, check_sampled_weights
from luthier.train.methods.tools import ToolBox, load_tools

TRIAL_ROWS = 2
"""The number of rows with which the rewards are tried before training."""


class RolloutTrainerMixin(OnlineTrainerMixin):
    """Lets the model of GRPO or RLOO call tools, over several turns, and records what it did.

    TRL 1.16 has a loop of its own in GRPO alone: it encodes tools' results behind a made-up
    conversation, with a chat template of TRL's own where the model's rewrites history. Here a
    completion takes all its turns within one call of `_generate_single_turn`.
    """

    result_metrics = ("reward",)
    reports_eval_loss = False
    rollout_log: Path | None = None
    """The file to which completions are written; None writes none."""
    num_generations: int
    num_generations_eval: int
    _turn_arguments: tuple[Any, ...]
    """What TRL's generation takes besides the ids: no images, no further fields of prompts."""

    def __init__(
        self, *, runner: RolloutRunner | None = None, recorded_rollouts: int = 0, **kwargs: Any
    ) -> None:
        """`runner`: what answers prompts over several turns; None is one turn without tools.

        `recorded_rollouts` is how many completions of each step are written to the log.
        """
        super().__init__(**kwargs)
        self._runner = runner
        self._recorded_rollouts = recorded_rollouts
        self._rollouts: list[Rollout] = []
        self._sampled: SampledLogps | None = None
        if runner is not None:
            runner.max_length = self._longest_row()

    def _longest_row(self) -> int | None:
        """Return the most tokens that the model, or the server that generates, can read."""
        if self.use_vllm and self.vllm_mode == "colocate":
            return int(self.vllm_generation.llm.llm_engine.model_config.max_model_len)
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Begin a rollout for each prompt, in its own environment; answer, score and record."""
        if self._runner is not None:
            mistake = None
            try:
                self._rollouts = self._runner.start(inputs)
            except UserError as error:
                mistake = error
            self._stop_if_rewards_failed(mistake)
            inputs = [
                row
                | {"prompt": rollout.prompt, "prompt_ids": rollout.prompt_ids}
                | ({} if rollout.environment is None else {"environments": rollout.environment})
                for row, rollout in zip(inputs, self._rollouts, strict=True)
            ]
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._recorded_rollouts and self.accelerator.is_main_process:
            self._record_rollouts()
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Return what the model wrote in all turns of each rollout, from the weights that train."""
        self._sampled = None
        output = self._generate_turns(prompt_ids, *args, **kwargs)
        if self._sampled is not None:
            check_sampled_weights(self, self._sampled)
        return output

    def _generate_turns(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self._runner is None:
            return self._generate_turn(prompt_ids, *args, **kwargs)
        # Every rollout has a history of its own, and perhaps a prompt: nothing is drawn together.
        with self._one_generation_each():
            self._runner.complete(
                self._rollouts,
                lambda ids: self._generate_turn(ids, *self._turn_arguments),
                self._share_most,
            )
        self._log_tools()
        sampled = [rollout.sampled_ids for rollout in self._rollouts]
        return self._as_generated(sampled, [rollout.sampled_logps for rollout in self._rollouts])

    def _one_generation_each(self) -> AbstractContextManager[None]:
        """Let every prompt be answered by itself within the block."""
        raise NotImplementedError

    def _generate_turn(self, prompt_ids: list[list[int]], *args: Any) -> Any:
        """Return what TRL's trainer generates; for a rollout, ids and log-probabilities."""
        raise NotImplementedError

    def _as_generated(self, ids: list[list[int]], logps: list[list[float]]) -> Any:
        """Return what the model sampled as TRL's `_generate_single_turn` returns it."""
        raise NotImplementedError

    def _share_most(self, count: int) -> int:
        counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
        return int(counts.max())

    def _log_tools(self) -> None:
        """Log how often tools were called, as TRL does, and why rollouts ended at a call."""
        ends = [sum(each.end == end for each in self._rollouts) for end in _ENDS]
        calls = sum(rollout.calls for rollout in self._rollouts)
        failures = sum(rollout.failures for rollout in self._rollouts)
        local = torch.tensor(
            [len(self._rollouts), calls, failures, *ends], device=self.accelerator.device
        )
        rows, calls, failures, *ends = self.accelerator.gather(local[None]).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["tools/call_frequency"].append(calls / rows)
        metrics["tools/failure_frequency"].append(failures / max(calls, 1))
        for end, count in zip(_ENDS, ends, strict=True):
            metrics[f"tools/{_ENDS[end]}"].append(count / rows)

    def _record_rollouts(self) -> None:
        """Append the first completions of this step to the log, with their rewards."""
        assert self.rollout_log is not None
        logs, count = self._logs, self._recorded_rollouts
        ends = [rollout.end for rollout in self._rollouts]
        rows = [
            {
                "step": self.state.global_step + 1,
                "prompt": logs["prompt"][number],
                "completion": logs["completion"][number],
                "rewards": {name: values[number] for name, values in logs["rewards"].items()},
                "advantage": logs["advantages"][number],
                **({"end": ends[number] or "stopped"} if number < len(ends) else {}),
            }
            for number in range(min(count, len(logs["prompt"])))
        ]
        append_jsonl(self.rollout_log, rows)


_ENDS = {
    "cut": "cut_frequency", "no room": "no_room_frequency", "turns": "turn_limit_frequency",
    "rewritten": "rewritten_frequency",
}  # fmt: skip
"""Why a rollout ended before the model stopped by itself -> the name of its share in logs."""


class LuthierGRPOTrainer(RolloutTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer over prompts of luthier's own; its loss says nothing by itself."""

    _turn_arguments = (None, {}, 1)

    def _one_generation_each(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _generate_turn(self, prompt_ids: list[list[int]], *args: Any) -> Any:
        ids, logps = super(RolloutTrainerMixin, self)._generate_single_turn(prompt_ids, *args)
        if logps is not None and self._sampled is None:
            self._sampled = SampledLogps(prompt_ids, ids, logps)
        return ids, logps

    def _as_generated(self, ids: list[list[int]], logps: list[list[float]]) -> Any:
        return ids, logps if self.use_vllm else None

    def _generate(self, prompts: list[Any]) -> Any:
        """Put the results of tools back between the turns that TRL has counted."""
        output = super()._generate(prompts)
        if self._runner is None:
            return output
        prompt_ids, _, _, _, _, extra, images, tool_images = output
        rollouts = self._rollouts
        return (
            prompt_ids,
            [rollout.ids for rollout in rollouts],
            [rollout.is_sampled for rollout in rollouts],
            [rollout.messages for rollout in rollouts],
            [rollout.logps for rollout in rollouts] if self.use_vllm else None,
            extra,
            images,
            tool_images,
        )


class LuthierRLOOTrainer(RolloutTrainerMixin, RLOOTrainer):
    """TRL's RLOOTrainer over prompts of luthier's own; its loss says nothing by itself.

    TRL 1.16's has no tools: what they said is taken out of its sums here.
    """

    _turn_arguments = (None, {})
    _tool_mask: torch.Tensor | None = None
    """(rows, tokens): 1 for tokens of the model and for padding; None where no tool has spoken."""

    @contextmanager
    def _one_generation_each(self) -> Iterator[None]:
        # TRL 1.16's RLOO asks vLLM for a group's completions together, by these numbers.
        counts = self.num_generations, self.num_generations_eval
        self.num_generations = self.num_generations_eval = 1
        try:
            yield
        finally:
            self.num_generations, self.num_generations_eval = counts

    def _generate_turn(self, prompt_ids: list[list[int]], *args: Any) -> Any:
        with self._catch_sampled_logps(prompt_ids):
            ids = super(RolloutTrainerMixin, self)._generate_single_turn(prompt_ids, *args)
        return ids if self._runner is None else (ids, None)

    @contextmanager
    def _catch_sampled_logps(self, prompt_ids: list[list[int]]) -> Iterator[None]:
        """Keep what vLLM says of the first turn's log-probabilities, which TRL's RLOO drops."""
        if not self.use_vllm or self._sampled is not None:
            yield
            return
        engine = self.vllm_generation
        generate = engine.generate

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            logps = [[token[0] for token in row] for row in output[2]]
            self._sampled = SampledLogps(prompt_ids, output[1], logps)
            return output

        engine.generate = keep
        try:
            yield
        finally:
            engine.generate = generate

    def _as_generated(self, ids: list[list[int]], logps: list[list[float]]) -> Any:
        return ids

    def _generate(self, prompts: list[Any]) -> Any:
        """Put the results of tools back between the turns that TRL has counted."""
        output = super()._generate(prompts)
        if self._runner is None:
            return output
        masks = [torch.tensor(rollout.is_sampled) for rollout in self._rollouts]
        self._tool_mask = pad(
            masks, padding_value=1, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        ).to(self.accelerator.device)
        rollouts = self._rollouts
        return output[0], [each.ids for each in rollouts], [each.messages for each in rollouts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Leave tools' results out of the sums, and hand the mask on to the loss."""
        output = super()._generate_and_score_completions(inputs)
        mask, self._tool_mask = self._tool_mask, None
        if mask is not None:
            output["tool_mask"] = mask
            metrics = self._metrics["train" if self.model.training else "eval"]
            if metrics["kl"]:
                # A mean over all tokens, of which those of tools count zero.
                counts = torch.stack([output["completion_mask"], output["completion_mask"] * mask])
                all_tokens, own_tokens = self.accelerator.reduce(counts.sum((1, 2)).float())
                metrics["kl"][-1] *= (all_tokens / own_tokens.clamp(min=1)).item()
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Let the model read what tools said, and count its log-probability as zero."""
        mask = self._tool_mask
        if mask is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        # In the loss the completion's mask lacks the results of tools.
        attention_mask = attention_mask.clone()
        attention_mask[:, -logits_to_keep:] |= 1 - mask
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        return logps * mask, entropies, aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        mask = inputs.get("tool_mask")
        if mask is None:
            return super()._compute_loss(model, inputs)
        self._tool_mask = mask
        try:
            own = inputs["completion_mask"] * mask
            return super()._compute_loss(model, inputs | {"completion_mask": own})
        finally:
            self._tool_mask = None


class RewardedMethod(TrainingMethod):
    """Trains on the rewards of completions that the model itself writes."""

    trainer_class: Any

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """The weights of the rewards, and what makes log-probabilities repeatable."""
        args, revision = config.trainer.args, config.model.revision
        required: dict[str, Any] = {
            "reward_weights": [reward.weight for reward in _all_rewards(config)],
            "remove_unused_columns": False,
            # Dropout would make the log-probabilities of the same text differ from call to call.
            "disable_dropout": args.disable_dropout is not False,
        }
        if args.beta != 0 and not config.lora.is_enabled and revision is not None:
            # TRL loads the model once more, to compare with.
            required["model_init_kwargs"] = {"revision": revision}
        return required

    def build_trainer(self, inputs: TrainerInputs) -> Any:
        """Return TRL's trainer, whose rewards were tried on a few rows and saw all references."""
        config, tokenizer = inputs.config, inputs.tokenizer
        rewards = load_reward_models(_all_rewards(config), config)
        train, sets = make_prompt_datasets(inputs.prepared)
        _try_rewards(rewards, tokenizer, train, *sets.values())
        stop_ids = stop_token_ids(config, tokenizer)
        toolbox = load_tools(config)
        runner = None
        if toolbox is not None:
            runner = _make_runner(config, toolbox, tokenizer, stop_ids)
            # Once with the first row, so that a `reset` that cannot work ends the run here.
            runner.start([train[0]])
        trainer = self.trainer_class(
            stop_ids=stop_ids,
            train_rows=train,
            eval_rows=sets,
            reward_funcs=rewards,
            runner=runner,
            recorded_rollouts=config.trainer.rollouts.record,
            **inputs.common_arguments(),
        )
        trainer.rollout_log = Path(config.output_dir) / ROLLOUTS_FILE
        return trainer


class GRPOMethod(RewardedMethod):
    """GRPO, https://arxiv.org/abs/2402.03300: rewards against those of the same prompt's group."""

    arguments_class = GRPOConfig
    trainer_class = LuthierGRPOTrainer


class RLOOMethod(RewardedMethod):
    """RLOO, https://arxiv.org/abs/2402.14740: each reward against the mean of the others."""

    arguments_class = RLOOConfig
    trainer_class = LuthierRLOOTrainer


def _all_rewards(config: RunConfig) -> list[Reward]:
    """The rewards that a run names, and that of its environment where this scores itself.

    Raises UserError where there is neither.
    """
    rewards = list(parse_rewards(config.trainer.rewards)[0])
    toolbox = load_tools(config)
    if toolbox is not None and toolbox.environment is not None and toolbox.has_reward:
        rewards.append(EnvironmentReward(name=toolbox.environment.__name__))
    if not rewards:
        raise UserError(
            f"trainer.rewards: there are none, and {config.trainer.environment} has no method "
            "`get_reward`. Add one of both."
        )
    return rewards


def _make_runner(
    config: RunConfig, toolbox: ToolBox, tokenizer: Any, stop_ids: list[int]
) -> RolloutRunner:
    """Return what answers prompts over several turns, once the chat template has been tried."""
    turns = TurnEncoder(make_turn_encoder(config, tokenizer), toolbox.schemas)
    if toolbox.schemas:
        turns.check_template(stop_ids)
    settings, longest = config.trainer.rollouts, config.trainer.args.max_completion_length
    return RolloutRunner(
        toolbox,
        turns,
        stop_ids,
        max_completion_length=GRPOConfig.max_completion_length if longest is None else longest,
        max_turns=settings.max_turns,
        time_limit=settings.tool_timeout,
    )


def _try_rewards(rewards: list[Reward], tokenizer: Any, *datasets: PromptDataset) -> None:
    """Show the rewards every reference, and call them on a few rows with these as completions."""
    rewards = [reward for reward in rewards if not isinstance(reward, EnvironmentReward)]
    for rows in datasets:
        prepare_rewards(rewards, rows.columns())
    train = datasets[0]
    first = [train[number] for number in range(min(TRIAL_ROWS, len(train)))]
    columns = {name: [row[name] for row in first] for name in train.names}
    texts = [row["reference"] if isinstance(row["reference"], str) else "" for row in first]
    columns["completion_ids"] = [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    try_rewards(rewards, [row["prompt"] for row in first], completions, columns)
