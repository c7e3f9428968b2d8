"""GRPO and RLOO: the model answers prompts, and learns from the rewards of what it answered."""

from typing import Any

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from luthier.config.schema import RunConfig
from luthier.metrics.rewards import Reward, parse_rewards, prepare_rewards, try_rewards
from luthier.train.methods.method import TrainerInputs, TrainingMethod
from luthier.train.methods.online import (
    OnlineTrainerMixin,
    PromptDataset,
    make_prompt_datasets,
    stop_token_ids,
)
from luthier.train.methods.reward_models import load_reward_models

TRIAL_ROWS = 2
"""The number of rows with which the rewards are tried before training."""


class LuthierGRPOTrainer(OnlineTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer over prompts of luthier's own; its loss says nothing by itself."""

    result_metrics = ("reward",)
    reports_eval_loss = False


class LuthierRLOOTrainer(OnlineTrainerMixin, RLOOTrainer):
    """TRL's RLOOTrainer over prompts of luthier's own; its loss says nothing by itself."""

    result_metrics = ("reward",)
    reports_eval_loss = False


class RewardedMethod(TrainingMethod):
    """Trains on the rewards of completions that the model itself writes."""

    trainer_class: Any

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """The weights of the rewards, and what makes log-probabilities repeatable."""
        args, revision = config.trainer.args, config.model.revision
        required: dict[str, Any] = {
            "reward_weights": parse_rewards(config.trainer.rewards)[1],
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
        rewards = parse_rewards(inputs.config.trainer.rewards)[0]
        rewards = load_reward_models(rewards, inputs.config)
        train, sets = make_prompt_datasets(inputs.prepared)
        _try_rewards(rewards, inputs.tokenizer, train, *sets.values())
        return self.trainer_class(
            stop_ids=stop_token_ids(inputs.config, inputs.tokenizer),
            train_rows=train,
            eval_rows=sets,
            reward_funcs=rewards,
            **inputs.common_arguments(),
        )


class GRPOMethod(RewardedMethod):
    """GRPO, https://arxiv.org/abs/2402.03300: rewards against those of the same prompt's group."""

    arguments_class = GRPOConfig
    trainer_class = LuthierGRPOTrainer


class RLOOMethod(RewardedMethod):
    """RLOO, https://arxiv.org/abs/2402.14740: each reward against the mean of the others."""

    arguments_class = RLOOConfig
    trainer_class = LuthierRLOOTrainer


def _try_rewards(rewards: list[Reward], tokenizer: Any, *datasets: PromptDataset) -> None:
    """Show the rewards every reference, and call them on a few rows with these as completions."""
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
