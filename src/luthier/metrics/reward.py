"""What a reward is: TRL's reward function with a name, a weight, and its mistakes in words."""

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from luthier.errors import UserError, choice
from luthier.errors import value as shown
from luthier.metrics.functions import described, load
from luthier.metrics.metric import RowMetric

Rewards = list[float | None]
"""One number for each completion; None where the reward does not apply to the row."""


class Reward(BaseModel, ABC):
    """A reward function for TRL's GRPO and RLOO trainers; it can be pickled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        return [self.of(text_of(completion)) for completion in completions]

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
        texts = [text_of(completion) for completion in completions]
        if not self.metric.needs_reference:
            return [self.metric.row(text, "") for text in texts]
        wanted = self.wanted(columns)
        return [
            None if reference is None else self.metric.row(text, reference)
            for text, reference in zip(texts, wanted, strict=True)
        ]

    def wanted(self, columns: Mapping[str, Any]) -> list[str | None]:
        """The references as text; raises UserError if there is no such column."""
        column = columns.get(self.reference)
        if column is not None:
            return [_as_text(value) for value in column]
        known = [key for key, value in columns.items() if isinstance(value, list)]
        raise UserError(
            f"reward {self.name}: the rows have no column {self.reference!r} to compare with. "
            f"{choice(self.reference, known)} Name it: {{...: {{reference: COLUMN}}}}."
        )


class OwnReward(Reward):
    """`python:module.function`, called as TRL calls reward functions."""

    path: str
    """Where the function is."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments that it takes."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """What the function returns, checked: one finite number or None for each completion."""
        try:
            returned = load(self.path)(**self._taken(prompts, completions, columns))
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return checked(returned, self.name, len(completions))

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"reward {self.name}: {self.path} failed: {described(error)}")

    def _taken(
        self, prompts: list[Any], completions: list[Any], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the function takes of all that is there; raises UserError for what it lacks."""
        there = {"prompts": prompts, "completions": completions, **columns, **self.arguments}
        parameters = inspect.signature(load(self.path)).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            there = {p.name: there[p.name] for p in parameters if p.name in there}
        lacking = [p.name for p in parameters if _is_required(p) and p.name not in there]
        if lacking:
            known = sorted({"prompts", "completions", *columns})
            raise UserError(
                f"reward {self.name}: {self.path} needs {', '.join(lacking)}, and there is no such "
                f"column or setting. There are: {', '.join(known)}."
            )
        return there


class AsyncReward(OwnReward):
    """An `async def` of the user's own: TRL awaits several of them side by side."""

    async def __call__(  # type: ignore[override]
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Rewards:
        """What the function returns, checked as above."""
        try:
            returned = await load(self.path)(**self._taken(prompts, completions, columns))
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return checked(returned, self.name, len(completions))


def checked(returned: Any, name: str, count: int) -> Rewards:
    """Rewards as plain numbers; raises UserError for too few, too many, NaN and no numbers."""
    if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
        raise UserError(
            f"reward {name}: it returned {shown(returned)}, and must return a list with a "
            "number for each completion."
        )
    rewards = [None if one is None else _number(one, n, name) for n, one in enumerate(returned)]
    if len(rewards) != count:
        raise UserError(
            f"reward {name}: it returned {len(rewards)} numbers for {count} completions."
        )
    return rewards


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its last message by the assistant."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1].get("content") if said else None
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _as_text(value: Any) -> str | None:
    """A cell of the reference column as text; what is neither text nor null as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


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
