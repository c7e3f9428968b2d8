"""The table of row formats: which columns each needs, and what it makes of them.

A format (`dataset.type`) may be written in several ways; each is a `FormatVariant`. Where the names
of its columns do not say enough, the values do: the `weigh_...` functions look at them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

from luthier.config.schema import SourceConfig
from luthier.data.formats.columns import ColumnMapping, find_value, list_or_empty, parse_flag
from luthier.data.formats.conversations import (
    TEMPLATE_KWARGS,
    TEMPLATE_SWITCHES,
    Example,
    from_alpaca,
    from_messages,
    from_prompt,
    from_prompt_completion,
    from_sharegpt,
)
from luthier.data.formats.image_parts import IMAGES
from luthier.data.formats.labelled import (
    from_classification,
    from_classification_pair,
    from_seq2seq,
    from_tagging,
    from_text,
)
from luthier.data.formats.messages import ROLE_OF_SPEAKER, speaker_key
from luthier.data.formats.preference_rows import (
    from_alpaca_pair,
    from_implicit_pair,
    from_messages_pair,
    from_prompted_pair,
    from_rated_alpaca,
    from_rated_completion,
    from_rated_messages,
)
from luthier.data.rows import Row

SAMPLED_ROWS = 50
"""Rows whose values are looked at."""
FORMAT_VERSION = 6
"""Raise it whenever the same row gives another example: it is part of the cache's keys."""

ExampleType = Literal[
    "conversation", "text", "preference", "unpaired", "classification", "tagging", "seq2seq"
]


class Evidence(IntEnum):
    """How well the values of the columns fit a variant."""

    NO = 0
    MAYBE = 1
    """They fit, and what they would be otherwise fits as well."""
    YES = 2


@dataclass(frozen=True)
class ColumnSample:
    """Rows with equal columns, and which of these columns a variant would read."""

    rows: Sequence[Row]
    source_names: Mapping[str, str]
    """Our names -> the source's."""
    aliased: frozenset[str]
    """Our names that stand for a column of another name which nobody mapped."""
    json_replies: bool = False
    """Whether replies may be objects and lists that are no messages."""

    def values(self, name: str) -> list[Any]:
        """Return the values of a column, by our name, that are not null."""
        column = self.source_names[name]
        values = (find_value(row.fields, column)[1] for row in self.rows[:SAMPLED_ROWS])
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class FormatColumn:
    """One of our columns."""

    name: str
    """Our name."""
    aliases: tuple[str, ...]
    """The names under which datasets have it, our own among them."""


@dataclass(frozen=True)
class FormatVariant:
    """One way to write a row format."""

    type: str
    """What `dataset.type` calls the format."""
    example_type: ExampleType
    needed: tuple[FormatColumn, ...]
    optional: tuple[FormatColumn, ...]
    read: Callable[[Row, ColumnMapping], Example]
    """Makes the example of a row; raises RowError for a row that is not of this format."""
    weigh: Callable[[ColumnSample], Evidence] | None = None
    """What the values of its columns say; None where the names of the columns say enough."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """Our names of all its columns."""
        return tuple(column.name for column in (*self.needed, *self.optional))


def never_detected(sample: ColumnSample) -> Evidence:
    """A prompt alone is never detected: nothing shows that there is to be no reply."""
    return Evidence.NO


def weigh_messages(sample: ColumnSample) -> Evidence:
    """Messages have a role; a column of another name than ours must show it."""
    return _weigh_speakers(sample, "messages", "role")


def weigh_turns(sample: ColumnSample) -> Evidence:
    """ShareGPT's turns have a `from`; a column of another name than ours must show it."""
    return _weigh_speakers(sample, "conversations", "from")


def _weigh_speakers(sample: ColumnSample, name: str, expected_key: str) -> Evidence:
    """The first message in the values decides, by the key that names its speaker."""
    key = next(filter(None, map(speaker_key, sample.values(name))), None)
    # No value shows a speaker. Our own name is believed, so that reading the rows tells what is
    # wrong with them; another name may mean anything.
    if key is None:
        return Evidence.NO if name in sample.aliased else Evidence.YES
    return Evidence.YES if key == expected_key else Evidence.NO


def weigh_prompt_completion(sample: ColumnSample) -> Evidence:
    """Lists and objects in a column of another name than ours must be messages."""
    names = sample.aliased - {"completion"} if sample.json_replies else sample.aliased
    values = [value for name in names for value in sample.values(name)]
    is_other = (isinstance(value, list | dict) and not speaker_key(value) for value in values)
    return Evidence.NO if any(is_other) else Evidence.YES


def weigh_open_messages(sample: ColumnSample) -> Evidence:
    """Messages are the prompt of two replies where they do not all end with a reply themselves."""
    values = sample.values("messages")
    if not any(map(speaker_key, values)):
        return Evidence.NO
    return Evidence.NO if all(map(_ends_with_reply, values)) else Evidence.YES


def _ends_with_reply(value: Any) -> bool:
    """Tell whether the last of some messages or turns is an assistant's."""
    last = (list_or_empty(value) or [None])[-1]
    speaker = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(speaker, str) and ROLE_OF_SPEAKER.get(speaker.lower()) == "assistant"


def weigh_ratings(sample: ColumnSample) -> Evidence:
    """Labels must be ratings; 0 and 1 may be the numbers of two classes as well."""
    labels = sample.values("label")
    if not labels or any(parse_flag(label) is None for label in labels):
        return Evidence.NO
    are_booleans = all(
        isinstance(label, bool) or str(label).lower() in ("true", "false") for label in labels
    )
    # `kto_tag` is LLaMA-Factory's name for a rating, and nobody else's for a class.
    is_kto = sample.source_names["label"].lower() == "kto_tag"
    return Evidence.YES if are_booleans or is_kto else Evidence.MAYBE


def weigh_rated_messages(sample: ColumnSample) -> Evidence:
    """Ratings must stand beside messages or turns."""
    if not any(map(speaker_key, sample.values("messages"))):
        return Evidence.NO
    return weigh_ratings(sample)


def weigh_lists(sample: ColumnSample) -> Evidence:
    """All needed columns must hold lists."""
    values = [value for name in sample.source_names for value in sample.values(name)]
    return Evidence.YES if values and all(map(list_or_empty, values)) else Evidence.NO


_MESSAGES = FormatColumn(
    "messages", ("messages", "conversation", "conversations", "dialogue", "dialog")
)
_TURNS = FormatColumn(
    "conversations", ("conversations", "messages", "conversation", "dialogue", "dialog")
)
_EITHER = FormatColumn("messages", ("messages", "conversations", "conversation"))
PROMPT = FormatColumn("prompt", ("prompt", "question", "query", "input", "instruction"))
COMPLETION = FormatColumn("completion", ("completion", "answer", "response", "output"))
_INSTRUCTION = FormatColumn("instruction", ("instruction",))
_OUTPUT = FormatColumn("output", ("output", "response"))
_RATING = FormatColumn("label", ("label", "kto_tag"))
_TEXT = FormatColumn("text", ("text",))
_SENTENCE = FormatColumn("text", ("text", "sentence"))
_LABEL = FormatColumn("label", ("label", "labels"))
_TOKENS = FormatColumn("tokens", ("tokens", "words"))
_TAGS = FormatColumn("tags", ("tags", "ner_tags", "labels"))
_SOURCE = FormatColumn("source", ("source",))
_TARGET = FormatColumn("target", ("target",))
_PAIR = (FormatColumn("chosen", ("chosen",)), FormatColumn("rejected", ("rejected",)))
_CHAT = (
    FormatColumn("tools", ("tools", "functions")),
    FormatColumn("system", ("system", "system_prompt", "system_message")),
    FormatColumn(IMAGES, (IMAGES, "image")),
    *(FormatColumn(name, (name,)) for name in (TEMPLATE_KWARGS, *sorted(TEMPLATE_SWITCHES))),
)
_ALPACA = (
    FormatColumn("input", ("input", "context")),
    FormatColumn("history", ("history",)),
    *_CHAT,
)

_TEXT_PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""How SNLI, GLUE and their like name the two texts of a pair."""


def _pair_variant(text: str, text_pair: str) -> FormatVariant:
    """Return the variant of two texts with a class, under these names."""
    needed = (FormatColumn("text", (text,)), FormatColumn("text_pair", (text_pair,)), _LABEL)
    return FormatVariant("classification", "classification", needed, (), from_classification_pair)


# The order decides between variants that need the same columns: `instruction` and `output` are
# names of a prompt and a completion too, and mean Alpaca, which stands before those.
FORMAT_VARIANTS: tuple[FormatVariant, ...] = (
    FormatVariant("messages", "conversation", (_MESSAGES,), _CHAT, from_messages, weigh_messages),
    FormatVariant("sharegpt", "conversation", (_TURNS,), _CHAT, from_sharegpt, weigh_turns),
    FormatVariant("alpaca", "conversation", (_INSTRUCTION, _OUTPUT), _ALPACA, from_alpaca),
    FormatVariant(
        "prompt_completion", "conversation", (PROMPT, COMPLETION), _CHAT,
        from_prompt_completion, weigh_prompt_completion,
    ),
    FormatVariant("prompt", "conversation", (PROMPT,), _CHAT, from_prompt, never_detected),
    FormatVariant(
        "preference", "preference", (_EITHER, *_PAIR), _CHAT,
        from_messages_pair, weigh_open_messages,
    ),
    FormatVariant("preference", "preference", (_INSTRUCTION, *_PAIR), _ALPACA, from_alpaca_pair),
    FormatVariant(
        "preference", "preference", (PROMPT, *_PAIR), _CHAT,
        from_prompted_pair, weigh_prompt_completion,
    ),
    FormatVariant("preference", "preference", _PAIR, _CHAT, from_implicit_pair),
    FormatVariant(
        "unpaired", "unpaired", (_EITHER, _RATING), _CHAT,
        from_rated_messages, weigh_rated_messages,
    ),
    FormatVariant(
        "unpaired", "unpaired", (_INSTRUCTION, _OUTPUT, _RATING), _ALPACA,
        from_rated_alpaca, weigh_ratings,
    ),
    FormatVariant(
        "unpaired", "unpaired", (PROMPT, COMPLETION, _RATING), _CHAT,
        from_rated_completion, weigh_ratings,
    ),
    *(_pair_variant(*names) for names in _TEXT_PAIRS),
    FormatVariant("classification", "classification", (_SENTENCE, _LABEL), (), from_classification),
    FormatVariant("tagging", "tagging", (_TOKENS, _TAGS), (), from_tagging, weigh_lists),
    FormatVariant("seq2seq", "seq2seq", (_SOURCE, _TARGET), (), from_seq2seq),
    FormatVariant("text", "text", (_TEXT,), (), from_text),
)  # fmt: skip
"""All of them; of two that need the same columns the first is meant."""


@dataclass(frozen=True)
class DetectionInput:
    """The rows whose format is looked for, and what an error calls them."""

    config: SourceConfig
    rows: Sequence[Row]
    """The first rows of the source."""
    source: str
    """What messages call the source, such as `my.jsonl`."""
    key: str
    """The group of the config, such as `dataset`."""

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the rows, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.fields))


@dataclass(frozen=True)
class FormatMatch:
    """A variant of a format, the columns that it would read, and how well their values fit."""

    variant: FormatVariant
    source_names: dict[str, str]
    """Our names of the needed columns -> the source's."""
    evidence: Evidence
    columns: frozenset[str]
    """All columns that it would read, the optional ones too."""

    @cached_property
    def needed_columns(self) -> frozenset[str]:
        """The columns that it cannot do without."""
        return frozenset(self.source_names.values())

    @property
    def vote(self) -> tuple[int, tuple[str, ...]]:
        """What two matches of different rows have in common where they mean the same reading."""
        return FORMAT_VARIANTS.index(self.variant), tuple(self.source_names.values())
