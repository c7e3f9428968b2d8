"""Metrics of tool calls: which tools a reply calls, with which arguments, and whether it should.

A call is right where its name is equal and its arguments are equal as JSON: the order of keys makes
no difference, 1 and 1.0 are equal, and 1, true and "1" are not. The order of the calls of one reply
makes no difference unless `ordered` says so. So does the AST check of the Berkeley Function Calling
Leaderboard (gorilla.cs.berkeley.edu/leaderboard.html, "simple", "multiple" and "parallel"), which
besides ignores the case and the punctuation of texts (`ignore`) and knows several right values.
"""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from luthier.metrics.metric import Metric, MetricScores, Prediction, mean
from luthier.metrics.structured import JsonField, flatten_json
from luthier.metrics.text import IgnoredDifference

_MOST_PERMUTED = 6
"""Calls of one name whose best match is found by trying every one; of more the first best one."""


class ToolCall(NamedTuple):
    """A call as it is compared."""

    name: str
    fields: Counter[JsonField]
    """The values of its arguments, each with its whole path."""

    @property
    def key(self) -> tuple[str, frozenset[tuple[JsonField, int]]]:
        """What is equal for equal calls."""
        return self.name, frozenset(self.fields.items())


class ToolCallMetric(Metric):
    """A metric of the calls of replies to turns that offer tools; other turns are left out."""

    def prepare(self, references: Sequence[str]) -> None:
        """Need nothing: calls are compared, and not references in words."""

    def takes(self, reply: Prediction) -> bool:
        """Whether tools were offered, or the row calls one."""
        return reply.calls is not None

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The metric of the calls, and where it has them the numbers of each reply."""
        return self.compare([self._read(reply) for reply in replies])

    @abstractmethod
    def compare(self, pairs: Sequence[tuple[list[ToolCall], list[ToolCall]]]) -> MetricScores:
        """The metric of pairs of the reply's calls and the row's, at least one."""

    def _read(self, reply: Prediction) -> tuple[list[ToolCall], list[ToolCall]]:
        assert reply.calls is not None  # `takes`
        made, expected = (list(map(self._call, calls)) for calls in reply.calls)
        return made, expected

    def _call(self, call: Mapping[str, Any]) -> ToolCall:
        function = call.get("function", call)
        arguments = read_arguments(function.get("arguments"))
        fields = Counter(flatten_json(arguments, True, self._ignored()))
        return ToolCall(str(function.get("name")), fields)

    def _ignored(self) -> tuple[IgnoredDifference, ...]:
        """Return what makes no difference between two texts of arguments."""
        return ()

    def _means(self, rows: Mapping[str, list[float]]) -> MetricScores:
        """Return numbers that are means over replies."""
        return MetricScores({name: mean(each) for name, each in rows.items()}, dict(rows))


def read_arguments(arguments: Any) -> Any:
    """Return the arguments of a call, also from JSON text of them; None and no text are none."""
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):  # what a model writes may be anything
        return arguments


class _ArgumentMetric(ToolCallMetric):
    """A metric that compares arguments."""

    ignore: tuple[IgnoredDifference, ...] = ()
    """What makes no difference between two texts of arguments."""

    def _ignored(self) -> tuple[IgnoredDifference, ...]:
        return self.ignore


class ToolCallAccuracy(_ArgumentMetric):
    """The share of replies whose calls are those of the row: as many, and each of them right.

    A reply without a call is right where the row has none. Beside it stand the shares of replies
    with the right names (`/name`), with the names in the row's order (`/order`), and with as many
    calls (`/number`).
    """

    ordered: bool = False
    """The calls must come in the row's order."""

    def compare(self, pairs: Sequence[tuple[list[ToolCall], list[ToolCall]]]) -> MetricScores:
        """The shares, and 1 or 0 for each reply."""
        rows: dict[str, list[float]] = {
            name: [] for name in (self.name, *(f"{self.name}/{part}" for part in _PARTS))
        }
        for made, expected in pairs:
            keys = [[call.key for call in calls] for calls in (made, expected)]
            names = [[call.name for call in calls] for calls in (made, expected)]
            is_right = keys[0] == keys[1] if self.ordered else Counter(keys[0]) == Counter(keys[1])
            has_names = Counter(names[0]) == Counter(names[1])
            shares = (is_right, has_names, names[0] == names[1], len(made) == len(expected))
            for each, share in zip(rows.values(), shares, strict=True):
                each.append(float(share))
        return self._means(rows)


_PARTS = ("name", "order", "number")


class ToolNameF1(ToolCallMetric):
    """The mean F1 of the names that are called, each as often as it is called.

    Where neither reply nor row makes a call it is 1.
    """

    def compare(self, pairs: Sequence[tuple[list[ToolCall], list[ToolCall]]]) -> MetricScores:
        """Twice the shared names over all names."""
        names = [[Counter(call.name for call in calls) for calls in pair] for pair in pairs]
        rows = [
            _f1((made & expected).total(), made.total(), expected.total())
            for made, expected in names
        ]
        return self._means({self.name: rows})


class ToolArgumentsF1(_ArgumentMetric):
    """The mean F1 of the arguments, each a value with its whole path in a call of its tool.

    Calls are matched by name, those of one name so that most arguments agree. Arguments of a call
    without a match count as wrong or missing; a call without arguments counts as one. Where neither
    reply nor row makes a call it is 1. `/keys` beside it counts the paths alone.
    """

    def compare(self, pairs: Sequence[tuple[list[ToolCall], list[ToolCall]]]) -> MetricScores:
        """Twice the shared arguments over all arguments."""
        values = [_arguments_f1(*pair) for pair in pairs]
        keys = [_arguments_f1(*(list(map(_without_values, calls)) for calls in p)) for p in pairs]
        return self._means({self.name: values, f"{self.name}/keys": keys})


def _without_values(call: ToolCall) -> ToolCall:
    keys: Counter[JsonField] = Counter()
    for (path, _, _), count in call.fields.items():
        keys[path, "", None] += count
    return ToolCall(call.name, keys)


def _arguments_f1(made: list[ToolCall], expected: list[ToolCall]) -> float:
    shared = sum(
        _shared_fields(
            [call.fields for call in made if call.name == name],
            [call.fields for call in expected if call.name == name],
        )
        for name in {call.name for call in made} & {call.name for call in expected}
    )
    totals = (sum(call.fields.total() for call in calls) for calls in (made, expected))
    return _f1(shared, *totals)


def _shared_fields(made: list[Counter[JsonField]], expected: list[Counter[JsonField]]) -> int:
    """Return how many fields agree in the best match of the calls of one tool."""
    fewer, more = sorted((made, expected), key=len)
    if len(more) <= _MOST_PERMUTED:
        orders: Iterable[Sequence[Counter[JsonField]]] = permutations(more, len(fewer))
        return max(sum(map(_agreeing, fewer, order)) for order in orders)
    shared, rest = 0, list(more)
    for fields in fewer:
        best = max(range(len(rest)), key=lambda n: _agreeing(fields, rest[n]))
        shared += _agreeing(fields, rest.pop(best))
    return shared


def _agreeing(fields: Counter[JsonField], others: Counter[JsonField]) -> int:
    return (fields & others).total()


def _f1(shared: int, made: int, expected: int) -> float:
    return 2 * shared / (made + expected) if made + expected else 1.0


class ToolUseAccuracy(ToolCallMetric):
    """The share of replies that call a tool where the row does, and none where it does not.

    Beside it stand, as in the Berkeley Function Calling Leaderboard, `/relevance`, the share of
    calls made among the rows that make one, and `/irrelevance`, the share of replies without a call
    among the rows that make none. Each is left out where there are no such rows.
    """

    def compare(self, pairs: Sequence[tuple[list[ToolCall], list[ToolCall]]]) -> MetricScores:
        """The shares; those of some rows alone as sums for the bootstrap."""
        import numpy as np

        from luthier.metrics.bootstrap import SumStatistics, mean_of_sums

        rows = [float(bool(made) == bool(expected)) for made, expected in pairs]
        scores = self._means({self.name: rows})
        calls = [bool(expected) for _, expected in pairs]
        for part, is_meant in (("relevance", True), ("irrelevance", False)):
            if is_meant not in calls:
                continue
            counted = np.array([call is is_meant for call in calls], dtype=float)
            statistics = SumStatistics(np.stack([counted * rows, counted], axis=1), mean_of_sums)
            name = f"{self.name}/{part}"
            scores.values[name] = statistics.whole()
            scores.statistics[name] = statistics
        return scores
