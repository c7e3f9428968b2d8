"""What the rows of a source are like, before there is a recipe: counts, lengths, oddities."""

import hashlib
import heapq
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from luthier.chat.roles import ROLES, find_nearest_role
from luthier.config.schema import SourceConfig
from luthier.data.examples import BadRows, OpenedSource, open_examples
from luthier.data.formats.conversations import Example
from luthier.data.formats.image_parts import TYPED_PLACEHOLDER, image_parts

MOST_ROWS = 100_000
"""Rows that are looked at; the first ones of a larger source."""
_LONGEST = 200
_SAMPLED = 400
"""Rows whose texts are kept to be counted in tokens: the longest ones, and the first ones."""
_MESSAGE_TOKENS, _ROW_TOKENS = 8, 16
"""What a chat template writes around a message and a row, for an estimate."""


@dataclass
class RowSurvey:
    """Counts of a source's rows; places are those of the first rows that are so."""

    opened: OpenedSource
    rows: int = 0
    is_all: bool = True
    """False where only the first rows were looked at."""
    bad: BadRows = field(default_factory=BadRows)
    empty: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    """Roles that no server knows -> how many rows have them."""
    role_places: dict[str, str] = field(default_factory=dict)
    images: int = 0
    placeholders: int = 0
    """Rows without images whose texts hold `<image>`."""
    systems: int = 0
    tools: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    turns: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    long_texts: list[tuple[int, int, str, int]] = field(default_factory=list)
    """Characters, row number, text and messages of the longest rows."""
    first_texts: list[tuple[str, int]] = field(default_factory=list)

    @property
    def example_type(self) -> str:
        """What the rows are, such as `conversation`."""
        return self.opened.row_format.example_type

    @property
    def usable(self) -> int:
        """The rows that a run with the recipe's settings would read."""
        return self.rows - len(self.empty) - len(self.repeated)

    def median(self, values: list[int]) -> int:
        """Return the middle of some counts; 0 where there are none."""
        return int(statistics.median(values)) if values else 0


def survey_rows(config: SourceConfig) -> RowSurvey:
    """Open a source and look at its rows; UserError where it cannot be read or shows no format.

    Texts that hold `<image>` for each image of their row are read as such.
    """
    survey = _survey(config)
    typed = [row for row in survey.bad.rows if "image_placeholder" in row.problem]
    if not typed or config.image_placeholder is not None:
        return survey
    return _survey(config.model_copy(update={"image_placeholder": TYPED_PLACEHOLDER}))


def _survey(config: SourceConfig) -> RowSurvey:
    opened = open_examples(config, "dataset")
    survey = RowSurvey(opened)
    seen: set[bytes] = set()
    rows = opened.source.rows()
    examples = opened.examples(survey.bad, islice(rows, MOST_ROWS), fetch=False)
    for located in examples:
        survey.rows += 1
        _look_at(survey, located.example, located.where, seen)
    survey.is_all = next(rows, None) is None
    return survey


def _look_at(survey: RowSurvey, example: Example, where: str, seen: set[bytes]) -> None:
    digest = hashlib.sha256(json.dumps(example, sort_keys=True, default=str).encode()).digest()
    if digest in seen:
        survey.repeated.append(where)
        return
    seen.add(digest)
    if any(not reply.strip() for reply in _replies(example)):
        survey.empty.append(where)
    messages = [m for key in ("messages", "prompt") for m in _messages(example.get(key))]
    for role in {str(message.get("role")) for message in messages} - {*ROLES}:
        survey.roles[role] += 1
        survey.role_places.setdefault(role, where)
    survey.systems += any(m.get("role") in ("system", "developer") for m in messages)
    survey.tools += bool(example.get("tools"))
    has_images = next(iter(image_parts(example)), None) is not None
    survey.images += has_images
    text = "\n".join(_texts(example))
    if not has_images and TYPED_PLACEHOLDER in text:
        survey.placeholders += 1
    for label in _labels(example):
        survey.labels[label] += 1
    survey.turns.append(sum(m.get("role") == "assistant" for m in messages))
    survey.characters.append(len(text))
    entry = (len(text), survey.rows, text, len(messages))
    if len(survey.long_texts) < _LONGEST:
        heapq.heappush(survey.long_texts, entry)
    else:
        heapq.heappushpop(survey.long_texts, entry)
    if len(survey.first_texts) < _SAMPLED:
        survey.first_texts.append((text, len(messages)))


def _messages(value: Any) -> list[Mapping[str, Any]]:
    return [m for m in value if isinstance(m, Mapping)] if isinstance(value, list) else []


def _replies(example: Example) -> Iterator[str]:
    """Yield the texts that a model would learn to write."""
    for message in _messages(example.get("messages")):
        if message.get("role") == "assistant" and not _says_otherwise(message):
            yield _content(message)
    for key in ("chosen", "rejected", "completion"):
        replies = _messages(example.get(key))
        if replies and not _says_otherwise(replies[-1]):
            yield _content(replies[-1])
    for key in ("target", "text"):
        if isinstance(example.get(key), str):
            yield example[key]


def _says_otherwise(message: Mapping[str, Any]) -> bool:
    """Return whether a message is a call or a thought, which is no empty reply."""
    keys = ("tool_calls", "reasoning_content", "reasoning", "thinking")
    return any(message.get(key) for key in keys)


def _content(message: Mapping[str, Any]) -> str:
    return "\n".join(_texts(message.get("content")))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of an example that a template could show."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if key not in ("role", "type", "image", "label"):
                yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)


def _labels(example: Example) -> list[str]:
    """Return the classes, tags or verdicts of a row."""
    if "tags" in example:
        return sorted({str(tag) for tag in example["tags"]})
    label = example.get("label")
    if label is None:
        return []
    return [str(each) for each in label] if isinstance(label, list) else [str(label)]


@dataclass(frozen=True)
class TokenLengths:
    """How long rows are in tokens, estimated from their texts."""

    median: int
    longest: int
    per_character: float
    """Tokens for each character, in the longest rows."""


def measure_tokens(survey: RowSurvey, tokenizer: Any) -> TokenLengths:
    """Count the tokens of the longest and of the first rows, with room for the chat template."""
    long = [(text, messages) for _, _, text, messages in survey.long_texts]
    counts = [_count(tokenizer, text, n) for text, n in long]
    first = [_count(tokenizer, text, n) for text, n in survey.first_texts]
    characters = max(sum(len(text) for text, _ in long), 1)
    return TokenLengths(
        int(statistics.median(first)) if first else 0,
        max(counts, default=0),
        sum(counts) / characters,
    )


def _count(tokenizer: Any, text: str, messages: int) -> int:
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens + _MESSAGE_TOKENS * messages + _ROW_TOKENS


def describe_roles(survey: RowSurvey) -> list[str]:
    """Return a line for each role that no server knows, with what it most likely means."""
    lines = []
    for role, count in survey.roles.most_common(5):
        near = find_nearest_role(role)
        meant = f"; `{near}` is most likely meant" if near else ""
        rows = "1 row has" if count == 1 else f"{count:,} rows have"
        lines.append(f"{rows} the role {role!r} ({survey.role_places[role]}){meant}.")
    return lines
