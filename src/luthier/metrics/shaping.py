"""Rewards of the completion's form: its length, and the tags around its parts."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from luthier.errors import UserError
from luthier.metrics.reward import Reward, Rewards, TextReward, text_of


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
            return [len(text_of(completion).split()) for completion in completions]
        if self.unit == "characters":
            return [len(text_of(completion)) for completion in completions]
        ids = columns.get("completion_ids")
        if ids is None:
            raise UserError(
                f"reward {self.name}: lengths in tokens need completion_ids, which the trainer "
                "did not give. Set unit: words."
            )
        return [len(one) for one in ids]


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
    parts = [rf"<{name}>{inside}</{name}>" for name in names]
    space = r"\s*"
    return re.compile(space + space.join(parts) + (inside if rest else space), re.DOTALL)
