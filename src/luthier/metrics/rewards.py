"""Reward functions for GRPO and RLOO: built in, from metrics, models, or the user's own."""

import asyncio
import inspect
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from luthier.errors import Mistake, UserError, suggest_options
from luthier.errors import format_value as shown
from luthier.metrics.metric import RowMetric
from luthier.metrics.parse import (
    MetricEntry,
    MetricEntryError,
    build_from_entry,
    build_metric,
    check_names,
    explain_missing_package,
    parse_entries,
    unknown_name_error,
)
from luthier.python_code import (
    PYTHON_FORMS,
    PYTHON_PREFIX,
    check_python_path,
    describe_exception,
    load_python_object,
    select_arguments,
    split_python_path,
)

# What a reward is: TRL's reward function with a name, a weight, and its mistakes in words.

Rewards = list[float | None]
"""One number for each completion; None where the reward does not apply to the row."""


class Reward(BaseModel, ABC):
    """A reward function for TRL's GRPO and RLOO trainers; it can be pickled."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    name: str = Field(min_length=1)
    """What it is called in logs."""
    weight: FiniteFloat = 1.0
    """How much it counts in the sum of all rewards."""

    @property
    def __name__(self) -> str:
        """What TRL logs it as."""
        return self.name

    @abstractmethod
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """One reward for each completion; `columns` are those of the dataset, a list each."""


class TextReward(Reward):
    """A reward of the completion's text alone."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The reward of each text."""
        return [self.of(completion_text(completion)) for completion in completions]

    @abstractmethod
    def of(self, text: str) -> float:
        """The reward of one text."""


class MetricReward(Reward):
    """A metric of single replies as a reward: its value for the completion's text."""

    metric: RowMetric
    """What is measured."""
    reference: str = "reference"
    """The column with what the completion is compared with."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The metric of each completion; None where the row's reference is null."""
        texts = [completion_text(completion) for completion in completions]
        if not self.metric.needs_reference:
            return [self.metric.row(text, "") for text in texts]
        references = self.wanted(columns)
        return [
            None if reference is None else self.metric.row(text, reference)
            for text, reference in zip(texts, references, strict=True)
        ]

    def wanted(self, columns: Mapping[str, Any]) -> list[str | None]:
        """The references as text; raises UserError if there is no such column."""
        column = columns.get(self.reference)
        if column is not None:
            return [_as_text(value) for value in column]
        list_columns = [key for key, value in columns.items() if isinstance(value, list)]
        raise UserError(
            f"reward {self.name}: the rows have no column {self.reference!r} to compare with. "
            f"{suggest_options(self.reference, list_columns)} "
            "Name it: {...: {reference: COLUMN}}."
        )


class FunctionReward(Reward):
    """`python:module.function`, called as TRL calls reward functions."""

    path: str
    """Where the function is."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments that it takes."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """What the function returns, checked: one finite number or None for each completion."""
        try:
            returned = load_python_object(self.path)(**self._taken(prompts, completions, columns))
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return read_returned_rewards(returned, self.name, len(completions))

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"reward {self.name}: {self.path} failed: {describe_exception(error)}")

    def _taken(
        self, prompts: list[Any], completions: list[Any], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the function takes of all that is there; raises UserError for what it lacks."""
        there = {"prompts": prompts, "completions": completions, **columns, **self.arguments}
        try:
            return select_arguments(load_python_object(self.path), there, self.path)
        except UserError as error:
            raise UserError(f"reward {self.name}: {error}") from error


class AsyncFunctionReward(FunctionReward):
    """An `async def` of the user's own: TRL awaits several of them side by side."""

    async def __call__(  # type: ignore[override]
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Rewards:
        """What the function returns, checked as above."""
        try:
            returned = await load_python_object(self.path)(
                **self._taken(prompts, completions, columns)
            )
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return read_returned_rewards(returned, self.name, len(completions))


class ModelReward(Reward):
    """`{model: PATH}`: the score that a reward model gives the whole conversation.

    These are its settings; the training loads the model (`luthier.train.methods.reward_models`).
    """

    path: str = Field(min_length=1)
    """A run of `trainer=reward`, an adapter, a model's folder, or a name on the hub."""
    base: str | None = None
    """Where the base of an adapter is now; None for the one that it names."""
    device: Literal["auto", "cuda", "mps", "cpu"] | None = None
    """Where it computes; None for the device of the model that trains."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Its number format; None for the one that it was trained in."""
    quantization: Literal["trained", "none", "nf4", "int8"] = "trained"
    """How its weights are packed."""
    batch_size: PositiveInt = 8
    """How many conversations it reads at once."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """Raise an error: the settings alone score nothing."""
        raise NotImplementedError(f"reward {self.name}: {self.path} is not loaded")


class EnvironmentReward(Reward):
    """What each completion's own environment says of it: its `get_reward`."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The reward of each environment; None where it has none to give."""
        returned = []
        for environment in columns["environments"]:
            try:
                reward = environment.get_reward()
                if inspect.isawaitable(reward):
                    reward = _finish(reward)
            except Exception as error:
                raise UserError(
                    f"reward {self.name}: get_reward failed: {describe_exception(error)}"
                ) from error
            returned.append(reward)
        return read_returned_rewards(returned, self.name, len(completions))


def _finish(awaitable: Any) -> Any:
    """Return what an `async` function gives, from a thread: a notebook's own has a loop already."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def read_returned_rewards(returned: Any, name: str, count: int) -> Rewards:
    """Rewards as plain numbers; raises UserError for too few, too many, NaN and no numbers."""
    if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
        raise UserError(
            f"reward {name}: it returned {shown(returned)}, and must return a list with a "
            "number for each completion."
        )
    rewards = [
        None if reward is None else _number(reward, n, name) for n, reward in enumerate(returned)
    ]
    if len(rewards) != count:
        raise UserError(
            f"reward {name}: it returned {len(rewards)} numbers for {count} completions."
        )
    return rewards


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its last message by the assistant."""
    if isinstance(completion, str):
        return completion
    replies = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = replies[-1].get("content") if replies else None
    if isinstance(content, list):
        return "".join(segment.get("text", "") for segment in content)
    return content or ""


def _as_text(value: Any) -> str | None:
    """A cell of the reference column as text; what is neither text nor null as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(value: Any, row: int, name: str) -> float:
    """A reward as a float; tensors and arrays of one number are numbers too."""
    try:
        number = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if math.isfinite(number):
        return number
    raise UserError(
        f"reward {name}: the reward of completion {row} is {shown(value)}. Return a finite "
        "number, or None where the reward does not apply."
    )


# Rewards of the completion's form: its length, and the tags around its parts.


class LengthReward(Reward):
    """From 0 for the right length down to -1, in proportion to what is too much or too little."""

    target: PositiveInt | None = None
    """The right length; shorter and longer ones lose alike."""
    max: PositiveInt | None = None
    """The longest that loses nothing."""
    slack: PositiveInt | None = None
    """How far beside it -1 is reached; null: as far as `target` or `max` itself."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted; words are what white space separates."""

    @model_validator(mode="after")
    def _has_one_bound(self) -> Self:
        if (self.target is None) == (self.max is None):
            raise ValueError("set either target or max, such as {length: {max: 200}}.")
        return self

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The reward of each completion's length."""
        return [self.of(length) for length in self._lengths(completions, columns)]

    def of(self, length: int) -> float:
        """The reward of one length."""
        bound = self.target or self.max or 0
        beside = abs(length - bound) if self.target else max(length - bound, 0)
        return 0.0 - min(beside / (self.slack or bound), 1.0)

    def _lengths(self, completions: list[Any], columns: dict[str, Any]) -> list[int]:
        if self.unit == "words":
            return [len(completion_text(completion).split()) for completion in completions]
        if self.unit == "characters":
            return [len(completion_text(completion)) for completion in completions]
        ids = columns.get("completion_ids")
        if ids is None:
            raise UserError(
                f"reward {self.name}: lengths in tokens need completion_ids, which the trainer "
                "did not give. Set unit: words."
            )
        return [len(completion_ids) for completion_ids in ids]


class FormatReward(TextReward):
    """1 for a completion that is made of these tags, each once and in this order; else 0.

    `<think>...</think><answer>...</answer>`, with white space between at most.
    """

    tags: tuple[str, ...] = Field(default=("think", "answer"), min_length=1)
    """The tags, without brackets."""
    opened: bool = False
    """The prompt ends with the first opening tag, as those of some reasoning models do."""
    rest: bool = False
    """Text may follow the last tag."""

    def of(self, text: str) -> float:
        """The reward of one text."""
        text = f"<{self.tags[0]}>{text}" if self.opened else text
        return float(_format(self.tags, self.rest).fullmatch(text) is not None)


@cache
def _format(tags: Sequence[str], rest: bool) -> re.Pattern[str]:
    """The pattern of a text that is made of these tags; none of them may stand in between."""
    names = [re.escape(tag) for tag in tags]
    inside = rf"(?:(?!</?(?:{'|'.join(names)})>).)*"
    tag_patterns = [rf"<{name}>{inside}</{name}>" for name in names]
    space = r"\s*"
    return re.compile(space + space.join(tag_patterns) + (inside if rest else space), re.DOTALL)


TEXT_REWARDS: dict[str, type[Reward]] = {"length": LengthReward, "format": FormatReward}
"""The rewards that compare with nothing."""

METRIC_REWARDS = (
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

REWARDS_KEY = "trainer.rewards"

_SHORT_FORMS = {"judge": "address", "model": "path"}
"""Entries that are one mapping, `{judge: http://..., model: NAME}` and `{model: PATH}` -> the
setting that the value behind the entry's name is. A judge has a model, too, so it comes first."""

_OURS = ("name", "weight", "reference")


def parse_rewards(entries: object, key: str = REWARDS_KEY) -> tuple[list[Reward], list[float]]:
    """The reward functions of a config's list and their weights, as TRL takes them.

    `[{number: {reference: answer}}, {length: {max: 300, weight: 0.2}}, python:my.rewards.polite]`.
    Raises UserError with all mistakes; `key` is where the list stands. A function of the user's
    own is imported here: whether it is async decides how TRL calls it.
    """
    rewards, wrong = _read(entries)
    if wrong:
        raise UserError("\n".join(f"{key}: {text}" for text in wrong))
    return [_loaded(reward) for reward in rewards], [reward.weight for reward in rewards]


def read_reward_settings(entries: object) -> list[Reward]:
    """The rewards of a valid list as settings: no function is imported and no model loaded."""
    return _read(entries)[0]


def check_rewards(entries: object, key: str = REWARDS_KEY) -> list[Mistake]:
    """What is wrong with a config's list of rewards; imports nothing."""
    return [Mistake(key, text) for text in _read(entries)[1]]


def prepare_rewards(rewards: Sequence[Reward], columns: Mapping[str, Sequence[Any]]) -> None:
    """Look at every row's reference, before a model is trained.

    `columns` are those of the dataset. Raises UserError if a column is missing, or for references
    that a reward cannot compare with.
    """
    from luthier.metrics.judge import JudgeReward

    for reward in rewards:
        if isinstance(reward, MetricReward) and reward.metric.needs_reference:
            reward.metric.prepare([text for text in reward.wanted(columns) if text is not None])
        elif isinstance(reward, JudgeReward):
            reward.check_columns(columns)


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
    rewards_by_function = []
    for reward in rewards:
        returned = reward(prompts=list(prompts), completions=list(completions), **there)
        if inspect.iscoroutine(returned):
            # In a thread of its own: in a notebook this one has an event loop that runs already.
            with ThreadPoolExecutor(1) as thread:
                returned = thread.submit(asyncio.run, returned).result()
        rewards_by_function.append(returned)
    return rewards_by_function


def _ignore(*_: Any) -> None:
    """What the trainer's log functions do before there is a trainer."""


def _read(entries: object) -> tuple[list[Reward], list[str]]:
    rewards: list[Reward] = []
    wrong: list[str] = []
    for entry in parse_entries(_expand_short_forms(entries)):
        try:
            if isinstance(entry, MetricEntryError):
                raise entry
            rewards.append(_reward(entry))
        except MetricEntryError as found:
            wrong.append(str(found))
    return rewards, wrong + list(check_names([reward.name for reward in rewards]))


def _expand_short_forms(entries: object) -> object:
    """Return the list with `{model: PATH, weight: 2}` as `{model: {path: PATH, weight: 2}}`."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return entries
    return [_expand_short_form(item) for item in entries]


def _expand_short_form(item: object) -> object:
    if not isinstance(item, Mapping):
        return item
    for name, setting in _SHORT_FORMS.items():
        if isinstance(item.get(name), str):
            rest = {key: value for key, value in item.items() if key != name}
            return {name: {setting: item[name], **rest}}
    return item


def _reward(entry: MetricEntry) -> Reward:
    if entry.name.startswith(PYTHON_PREFIX):
        return _own(entry)
    if entry.name == "model":
        fields = list(ModelReward.model_fields)
        return build_from_entry(ModelReward, entry, {"name": "model", **entry.settings}, fields)
    if entry.name == "judge":
        from luthier.metrics.judge import JudgeReward

        fields = list(JudgeReward.model_fields)
        return build_from_entry(JudgeReward, entry, {"name": "judge", **entry.settings}, fields)
    cls = TEXT_REWARDS.get(entry.name)
    if cls is not None:
        field_names = list(cls.model_fields)
        return build_from_entry(cls, entry, {"name": entry.name, **entry.settings}, field_names)
    if entry.name in METRIC_REWARDS:
        return _of_metric(entry)
    names = [*METRIC_REWARDS, *TEXT_REWARDS, *_SHORT_FORMS]
    raise unknown_name_error(entry.name, names, "reward", PYTHON_FORMS)


def _of_metric(entry: MetricEntry) -> MetricReward:
    """A metric's settings and the reward's own stand in one mapping."""
    ours = {key: entry.settings[key] for key in _OURS if key in entry.settings}
    theirs = {key: setting for key, setting in entry.settings.items() if key not in _OURS}
    metric = build_metric(MetricEntry(entry.name, theirs), also=_OURS)
    if without := explain_missing_package(metric.needed()):
        raise MetricEntryError(f"{entry.name}: {without}")
    assert isinstance(metric, RowMetric)
    return build_from_entry(
        MetricReward, entry, {"name": entry.name, "metric": metric} | ours, _OURS
    )


def _own(entry: MetricEntry) -> FunctionReward:
    if problem := check_python_path(entry.name):
        raise MetricEntryError(problem)
    ours = {key: entry.settings[key] for key in ("name", "weight") if key in entry.settings}
    rest = {key: setting for key, setting in entry.settings.items() if key not in ours}
    fields = {
        "name": split_python_path(entry.name).name,
        "path": entry.name,
        "arguments": rest,
    } | ours
    return build_from_entry(FunctionReward, entry, fields, ("name", "weight"))


def _loaded(reward: Reward) -> Reward:
    """A function of the user's own, as what it turns out to be."""
    if isinstance(reward, FunctionReward) and inspect.iscoroutinefunction(
        load_python_object(reward.path)
    ):
        return AsyncFunctionReward(**dict(reward))
    return reward
