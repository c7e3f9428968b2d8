"""Reward functions for GRPO and RLOO: built in, from metrics, or the user's own."""

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import Mistake, UserError
from luthier.metrics.entries import Entry, Wrong, build, entries, unknown
from luthier.metrics.functions import PREFIX, load, missing
from luthier.metrics.metric import RowMetric
from luthier.metrics.parse import absent, build_metric, repeated
from luthier.metrics.reward import AsyncReward, MetricReward, OwnReward, Reward
from luthier.metrics.shaping import FormatReward, LengthReward

OF_TEXT: dict[str, type[Reward]] = {"length": LengthReward, "format": FormatReward}
"""The rewards that compare with nothing."""

OF_METRICS = (
    "exact_match",
    "normalised_match",
    "contains",
    "regex",
    "number",
    "json_valid",
    "json_f1",
    "token_f1",
    "rouge1",
    "rouge2",
    "rougeL",
)
"""The metrics that are rewards too: those of single replies, from 0 to 1."""

KEY = "trainer.rewards"

_OURS = ("name", "weight", "reference")


def parse_rewards(given: object, key: str = KEY) -> tuple[list[Reward], list[float]]:
    """The reward functions of a config's list and their weights, as TRL takes them.

    `[{number: {reference: answer}}, {length: {max: 300, weight: 0.2}}, python:my.rewards.polite]`.
    Raises UserError with all mistakes; `key` is where the list stands. A function of the user's
    own is imported here: whether it is async decides how TRL calls it.
    """
    rewards, wrong = _read(given)
    if wrong:
        raise UserError("\n".join(f"{key}: {text}" for text in wrong))
    return [_loaded(reward) for reward in rewards], [reward.weight for reward in rewards]


def check_rewards(given: object, key: str = KEY) -> list[Mistake]:
    """What is wrong with a config's list of rewards; imports nothing."""
    return [Mistake(key, text) for text in _read(given)[1]]


def prepare_rewards(rewards: Sequence[Reward], columns: Mapping[str, Sequence[Any]]) -> None:
    """Look at every row's reference, before a model is trained.

    `columns` are those of the dataset. Raises UserError if a column is missing, or for references
    that a reward cannot compare with.
    """
    for reward in rewards:
        if isinstance(reward, MetricReward) and reward.metric.needs_reference:
            reward.metric.prepare([text for text in reward.wanted(columns) if text is not None])


def try_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[list[float | None]]:
    """Call every reward before training on a few rows with completions that were made up.

    All of equal length, and `columns` with `completion_ids` as the trainer gives them. Returns
    the rewards of each function; raises UserError if one raises, returns NaN or not one number for
    each completion.
    """
    there: dict[str, Any] = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    there |= {name: list(column) for name, column in columns.items()}
    found = []
    for reward in rewards:
        returned = reward(prompts=list(prompts), completions=list(completions), **there)
        found.append(asyncio.run(returned) if inspect.iscoroutine(returned) else returned)
    return found


def _ignore(*_: Any) -> None:
    """What the trainer's log functions do before there is a trainer."""


def _read(given: object) -> tuple[list[Reward], list[str]]:
    rewards: list[Reward] = []
    wrong: list[str] = []
    for entry in entries(given):
        try:
            if isinstance(entry, Wrong):
                raise entry
            rewards.append(_reward(entry))
        except Wrong as found:
            wrong.append(str(found))
    return rewards, wrong + list(repeated([reward.name for reward in rewards]))


def _reward(entry: Entry) -> Reward:
    if entry.name.startswith(PREFIX):
        return _own(entry)
    cls = OF_TEXT.get(entry.name)
    if cls is not None:
        known = list(cls.model_fields)
        return build(cls, entry, {"name": entry.name, **entry.settings}, known)
    if entry.name in OF_METRICS:
        return _of_metric(entry)
    raise unknown(entry.name, [*OF_METRICS, *OF_TEXT], "reward", "python:module.function")


def _of_metric(entry: Entry) -> MetricReward:
    """A metric's settings and the reward's own stand in one mapping."""
    ours = {key: entry.settings[key] for key in _OURS if key in entry.settings}
    theirs = {key: given for key, given in entry.settings.items() if key not in _OURS}
    metric = build_metric(Entry(entry.name, theirs), also=_OURS)
    if without := absent(metric.needed()):
        raise Wrong(f"{entry.name}: {without}")
    assert isinstance(metric, RowMetric)
    return build(MetricReward, entry, {"name": entry.name, "metric": metric} | ours, _OURS)


def _own(entry: Entry) -> OwnReward:
    if problem := missing(entry.name):
        raise Wrong(problem)
    ours = {key: entry.settings[key] for key in ("name", "weight") if key in entry.settings}
    rest = {key: given for key, given in entry.settings.items() if key not in ours}
    name = entry.name.rpartition(".")[2]
    fields = {"name": name, "path": entry.name, "arguments": rest} | ours
    return build(OwnReward, entry, fields, ("name", "weight"))


def _loaded(reward: Reward) -> Reward:
    """A function of the user's own, as what it turns out to be."""
    if isinstance(reward, OwnReward) and inspect.iscoroutinefunction(load(reward.path)):
        return AsyncReward(**dict(reward))
    return reward
