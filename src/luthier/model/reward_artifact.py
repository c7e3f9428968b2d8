"""Reward models by their path: found, and told from other models, before anything is loaded."""

from pathlib import Path
from typing import Any

from luthier.config.trust import Trust
from luthier.errors import UserError
from luthier.metrics.rewards import ModelReward
from luthier.model.artifact import Artifact, find_artifact
from luthier.model.model_files import (
    ADAPTER_WEIGHTS_FILE,
    MODEL_CONFIG_FILE,
    read_config_file,
    read_labels,
)
from luthier.storage.sizes import read_safetensors_header

_HEADS = ("score", "classifier", "classification_head")
_UNUSED = Trust(typed_keys=frozenset(["dataset", "trainer", "tracker"]))
"""Code that the run of a reward model names below these keys is not run here."""


def find_reward_artifact(reward: ModelReward) -> Artifact:
    """Return the model of a reward; UserError where it is not there, or is no reward model.

    Reads configs and the headers of weight files, and loads nothing.
    """
    artifact = find_artifact(reward.path, reward.base, _UNUSED)
    problem = _describe_other_model(artifact)
    if problem is None:
        return artifact
    raise UserError(
        f"trainer.rewards: {reward.name}: {reward.path} is no reward model: {problem}.\n"
        "A reward model gives a conversation one number: train one with trainer=reward, or take "
        "one whose config.json names a ...ForSequenceClassification with one label."
    )


def _describe_other_model(artifact: Artifact) -> str | None:
    """Return what a model is that is no reward model; None for one that is."""
    method = None if artifact.config is None else artifact.config.trainer.method
    if method is not None and artifact.run is not None and method != "reward":
        return f"it was trained with trainer={method}"
    if artifact.task != "SEQ_CLS":
        does = {"TOKEN_CLS": "it tags words", "SEQ_2_SEQ_LM": "it writes text"}
        return does.get(artifact.task, "it writes text and scores none")
    labels = _count_labels(artifact)
    if labels is not None and labels != 1:
        return f"it is a classifier with {labels} labels"
    return None


def _count_labels(artifact: Artifact) -> int | None:
    """Return how many numbers the head of a classifier gives; None where its files do not say."""
    folder = artifact.folder
    if artifact.adapter is not None:
        labels = read_labels(artifact.adapter)
        if labels is not None:
            return len(labels["id2label"])
        weights = artifact.adapter / ADAPTER_WEIGHTS_FILE
        return _count_head_rows(weights) if weights.is_file() else None
    config = None if folder is None else read_config_file(folder / MODEL_CONFIG_FILE)
    return _labels_of_config(config or {}) if config is not None else None


def _labels_of_config(config: dict[str, Any]) -> int:
    """Return the labels that a config.json has: transformers writes none where there are two."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else int(config.get("num_labels", 2))


def _count_head_rows(weights: Path) -> int | None:
    for name, header in read_safetensors_header(weights).tensors.items():
        *_, layer, kind = ["", *name.split(".")]
        if kind == "weight" and layer in _HEADS:
            return int(header["shape"][0])
    return None
