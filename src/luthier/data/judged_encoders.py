"""Token rows of replies that are judged: two of one prompt, or one with a verdict.

Every row has the columns `trained` (how many tokens train), `length` (the tokens of its longest
sequence) and `tokens` (those of all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from luthier.data.encoders import EncodedRows
from luthier.data.judged import Judged, ReplyEncoder
from luthier.data.shapes import Example

Values = dict[str, Any]
PAIR = ("chosen", "rejected")


class JudgedEncoder:
    """What the encoders share. It pickles."""

    kind: ClassVar[str]
    names: ClassVar[Sequence[str]]
    """Where the replies stand in an example."""
    whole: ClassVar[bool] = False
    """Whether rows hold whole conversations."""

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        """`settings`: those of `luthier.chat.ChatEncoder`."""
        self._given = (tokenizer, settings)
        self._replies = ReplyEncoder(tokenizer, settings, self.names, self.whole)

    def settings(self) -> dict[str, Any]:
        """All that decides the rows besides the tokenizer, for JSON."""
        return self._replies.settings() | {"kind": self.kind}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode some examples.

        Raises ChatError, with the example's number, for one that is neither dropped nor kept.
        """
        judged = self._replies.encode(examples)
        made = [
            self.rows(example, one) if one else []
            for example, one in zip(examples, judged, strict=True)
        ]
        return EncodedRows(
            _columns(values for rows in made for values in rows),
            [*map(len, made)],
            {number: one.problem for number, one in enumerate(judged) if one.problem},
            # No turn of a prompt trains, so none is lost.
            {number: 0 for number, one in enumerate(judged) if one.is_cut},
        )

    def rows(self, example: Example, judged: Judged) -> list[Values]:
        """The rows that an example makes: one value for each column."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), self._given


class PreferenceEncoder(JudgedEncoder):
    """Two replies to one prompt, the better one first.

    Columns: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `chosen_spans` and `rejected_spans`:
    where the trained stretches of a reply start and stop.
    """

    kind = "preference"
    names = PAIR

    def rows(self, example: Example, judged: Judged) -> list[Values]:
        """One row."""
        lengths = [len(judged.prompt) + len(reply.ids) for reply in judged.replies]
        values: Values = {"prompt_ids": judged.prompt}
        for name, reply in zip(self.names, judged.replies, strict=True):
            values |= {f"{name}_ids": reply.ids, f"{name}_spans": reply.spans}
        trained = sum(reply.trained for reply in judged.replies)
        return [values | _sizes(trained, lengths)]


class UnpairedEncoder(JudgedEncoder):
    """A reply and whether it is a good one.

    Columns: `prompt_ids`, `completion_ids`, `completion_spans` (where its trained stretches start
    and stop) and `label`, 1 for a good one and 0 for a bad one.
    """

    kind = "unpaired"
    names: ClassVar[Sequence[str]] = ("completion",)

    def rows(self, example: Example, judged: Judged) -> list[Values]:
        """One row for each reply."""
        return [
            {
                "prompt_ids": judged.prompt,
                "completion_ids": reply.ids,
                "completion_spans": reply.spans,
                "label": int(good),
                **_sizes(reply.trained, [len(judged.prompt) + len(reply.ids)]),
            }
            for reply, good in zip(judged.replies, self.verdicts(example), strict=True)
        ]

    def verdicts(self, example: Example) -> list[bool]:
        """Whether each reply is a good one."""
        return [example["label"]]


class UnpairingEncoder(UnpairedEncoder):
    """The rows of `UnpairedEncoder` from two replies to one prompt: a good one and a bad one."""

    kind = "unpaired from preference"
    names = PAIR

    def verdicts(self, example: Example) -> list[bool]:
        """The better one is good."""
        return [True, False]


class RewardEncoder(JudgedEncoder):
    """Two whole conversations, the better one first.

    Columns: `chosen_ids` and `rejected_ids`, as the template writes each from its start to its end;
    `trained` is 1, for the score of one against that of the other.
    """

    kind = "reward"
    names = PAIR
    whole = True

    def rows(self, example: Example, judged: Judged) -> list[Values]:
        """One row."""
        whole = [reply.whole for reply in judged.replies]
        named = {f"{name}_ids": ids for name, ids in zip(self.names, whole, strict=True)}
        return [named | _sizes(1, [*map(len, whole)])]


def _sizes(trained: int, lengths: list[int]) -> Values:
    return {"trained": trained, "length": max(lengths), "tokens": sum(lengths)}


def _columns(rows: Iterable[Values]) -> dict[str, Any]:
    """The values of all rows by column."""
    columns: dict[str, Any] = {"trained": []}
    for values in rows:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns
