"""Rewards that lie outside of the config: models and judges, looked at before torch is imported."""

from typing import Any

from luthier.metrics.judge import JudgeReward
from luthier.metrics.rewards import ModelReward, read_reward_settings
from luthier.model.reward_artifact import find_reward_artifact
from luthier.model.weights_hash import find_weight_files, hash_files
from luthier.redaction import remember_secrets


def check_reward_sources(entries: list[Any]) -> None:
    """Raise UserError for a reward model that is not there or is none, and for a missing key.

    The keys of judges are remembered as secrets, so that no message shows them.
    """
    for reward in read_reward_settings(entries):
        if isinstance(reward, ModelReward):
            find_reward_artifact(reward)
        elif isinstance(reward, JudgeReward):
            remember_secrets({"api_key": reward.read_key()})


def hash_reward_models(entries: list[Any]) -> str | None:
    """Return the hash of the weights of all reward models of a list; None where there are none."""
    files = []
    for reward in read_reward_settings(entries):
        if isinstance(reward, ModelReward):
            artifact = find_reward_artifact(reward)
            files += find_weight_files(artifact.base.path, artifact.base.revision)
            files += find_weight_files(str(artifact.adapter), None) if artifact.adapter else []
    return hash_files(files) if files else None
