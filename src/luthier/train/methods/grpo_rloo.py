"""GRPO and RLOO: the model answers prompts, and learns from the rewards of what it answered."""

from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import nanstd

from luthier.config.schema import RunConfig
from luthier.data.prepare import PreparedData
from luthier.metrics.rewards import Reward, parse_rewards, prepare_rewards, try_rewards
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.online import (
    OnlineTrainerMixin,
    PromptDataset,
    make_prompt_datasets,
    stop_token_ids,
)

TRIAL_ROWS = 2
"""Rows with which the rewards are tried before training."""


class RewardedTrainerMixin(OnlineTrainerMixin):
    """Stands before a trainer of TRL that rewards answers: its loss says nothing by itself.

    The rewards of an evaluation are means over all its completions. TRL's are means of the batches'
    means, in which a small last batch counts as much as the others, and rows that fill up a batch
    of several processes count twice.
    """

    result_metrics = ("reward",)
    reports_eval_loss = False

    def __init__(self, **kwargs: Any) -> None:
        """Take what `Prompted` takes."""
        self._rewards: list[torch.Tensor] = []
        super().__init__(**kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and put the means over all completions in place of TRL's."""
        self._rewards.clear()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        completions = len(dataloader.dataset) * self.num_generations_eval
        rewards = torch.cat(self._rewards)[:completions]
        weighted = (rewards * self.reward_weights).nansum(dim=1)
        weighted[rewards.isnan().all(dim=1)] = torch.nan
        columns = {("reward", "reward_std"): weighted}
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            columns[f"rewards/{name}/mean", f"rewards/{name}/std"] = column
        for (mean, spread), column in columns.items():
            self._metrics["eval"][mean] = [torch.nanmean(column).item()]
            self._metrics["eval"][spread] = [nanstd(column).item()]
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        if not self.model.training:
            self._rewards.append(rewards.cpu())
        return rewards


class LuthierGRPOTrainer(RewardedTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer over prompts of luthier's own."""


class LuthierRLOOTrainer(RewardedTrainerMixin, RLOOTrainer):
    """TRL's RLOOTrainer over prompts of luthier's own."""


class RewardedMethod:
    """Trains on the rewards of completions that the model itself writes."""

    make_arguments: Any
    make_trainer: Any

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `trl.GRPOConfig` or `trl.RLOOConfig`."""
        weights = parse_rewards(config.trainer.rewards)[1]
        own: dict[str, Any] = {
            "reward_weights": weights,
            "remove_unused_columns": False,
            # Dropout would make the log-probabilities of the same text differ from call to call.
            "disable_dropout": config.trainer.args.disable_dropout is not False,
        }
        revision = config.model.revision
        if config.trainer.args.beta != 0 and not config.lora.is_enabled and revision is not None:
            # TRL loads the model once more, to compare with.
            own["model_init_kwargs"] = {"revision": revision}
        return build_trainer_arguments(self.make_arguments, config, machine, folder, has_eval, own)

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A causal language model."""
        return load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled
        )

    def build_trainer(self, given: TrainerInputs) -> Any:
        """TRL's trainer; every reward has been tried on a few rows and seen every reference."""
        rewards = parse_rewards(given.config.trainer.rewards)[0]
        train, sets = make_prompt_datasets(given.prepared)
        _try(rewards, given.tokenizer, train, *sets.values())
        return self.make_trainer(
            model=given.model,
            stop_ids=stop_token_ids(given.config, given.tokenizer),
            train_rows=train,
            eval_rows=sets,
            reward_funcs=rewards,
            args=given.args,
            processing_class=given.tokenizer,
            callbacks=given.callbacks,
        )


class GRPOMethod(RewardedMethod):
    """GRPO, https://arxiv.org/abs/2402.03300: rewards against those of the same prompt's group."""

    make_arguments = GRPOConfig
    make_trainer = LuthierGRPOTrainer


class RLOOMethod(RewardedMethod):
    """RLOO, https://arxiv.org/abs/2402.14740: each reward against the mean of the others."""

    make_arguments = RLOOConfig
    make_trainer = LuthierRLOOTrainer


def _try(rewards: list[Reward], tokenizer: Any, *sides: PromptDataset) -> None:
    """Show the rewards every reference, and call them on a few rows with these as completions."""
    for rows in sides:
        prepare_rewards(rewards, rows.columns())
    first = [sides[0][number] for number in range(min(TRIAL_ROWS, len(sides[0])))]
    columns = {name: [row[name] for row in first] for name in sides[0].names}
    texts = [row["reference"] if isinstance(row["reference"], str) else "" for row in first]
    columns["completion_ids"] = [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    try_rewards(rewards, [row["prompt"] for row in first], completions, columns)
