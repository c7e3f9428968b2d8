"""The forms in which rows come: which columns each needs, and what it makes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from luthier.data.formats.columns import Columns, as_list, inside
from luthier.data.formats.conversations import (
    Example,
    from_alpaca,
    from_messages,
    from_prompt,
    from_prompt_completion,
    from_sharegpt,
)
from luthier.data.formats.labelled import (
    from_classification,
    from_classified_pair,
    from_seq2seq,
    from_tagging,
    from_text,
)
from luthier.data.formats.messages import ROLES, spelling
from luthier.data.formats.preference import (
    from_alpaca_pair,
    from_implicit_pair,
    from_judged_alpaca,
    from_judged_completion,
    from_judged_messages,
    from_messages_pair,
    from_prompted_pair,
    verdict,
)
from luthier.data.rows import Row

# What the values of a column say about a row's format, where its name alone does not.

SEEN = 50
"""Rows whose values are looked at."""


class Evidence(IntEnum):
    """How well the values of the columns fit a form."""

    NO = 0
    MAYBE = 1
    """They fit, and what they would be otherwise fits as well."""
    YES = 2


@dataclass(frozen=True)
class Sample:
    """Rows with equal columns, and which of these columns a form would read."""

    rows: Sequence[Row]
    names: Mapping[str, str]
    """Our names -> the source's."""
    aliased: frozenset[str]
    """Our names that stand for a column of another name which nobody mapped."""

    def values(self, ours: str) -> list[Any]:
        """The values of a column that are not null."""
        column = self.names[ours]
        found = (inside(row.fields, column)[1] for row in self.rows[:SEEN])
        return [value for value in found if value is not None]


def certain(sample: Sample) -> Evidence:
    """The names of the columns say enough."""
    return Evidence.YES


def named_only(sample: Sample) -> Evidence:
    """Nothing shows that there is to be no more: the config has to say so."""
    return Evidence.NO


def messages(sample: Sample) -> Evidence:
    """Items with a role; a column of another name than ours must show them."""
    return _spelling(sample, "messages", "role")


def turns(sample: Sample) -> Evidence:
    """Items with from; a column of another name than ours must show them."""
    return _spelling(sample, "conversations", "from")


def _spelling(sample: Sample, ours: str, key: str) -> Evidence:
    found = next(filter(None, map(spelling, sample.values(ours))), None)
    if found is None:
        return Evidence.NO if ours in sample.aliased else Evidence.YES
    return Evidence.YES if found == key else Evidence.NO


def spoken(sample: Sample) -> Evidence:
    """Prompt and completion: lists in a column of another name must be messages."""
    held = [value for ours in sample.aliased for value in sample.values(ours)]
    strange = (isinstance(value, list | dict) and not spelling(value) for value in held)
    return Evidence.NO if any(strange) else Evidence.YES


def open_messages(sample: Sample) -> Evidence:
    """Messages that are the prompt of two replies: they do not end with a reply themselves."""
    values = sample.values("messages")
    if not any(map(spelling, values)):
        return Evidence.NO
    return Evidence.NO if all(map(_ends_with_reply, values)) else Evidence.YES


def _ends_with_reply(value: Any) -> bool:
    last = (as_list(value) or [None])[-1]
    speaker = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(speaker, str) and ROLES.get(speaker.lower()) == "assistant"


def judged(sample: Sample) -> Evidence:
    """Labels that are verdicts; 0 and 1 may be the numbers of two classes as well."""
    labels = sample.values("label")
    if not labels or any(verdict(label) is None for label in labels):
        return Evidence.NO
    said = all(
        isinstance(label, bool) or str(label).lower() in ("true", "false") for label in labels
    )
    return Evidence.YES if said or sample.names["label"] == "kto_tag" else Evidence.MAYBE


def judged_messages(sample: Sample) -> Evidence:
    """Verdicts beside messages of either spelling."""
    if not any(map(spelling, sample.values("messages"))):
        return Evidence.NO
    return judged(sample)


def lists(sample: Sample) -> Evidence:
    """Lists in all needed columns."""
    seen = [value for ours in sample.names for value in sample.values(ours)]
    return Evidence.YES if seen and all(map(as_list, seen)) else Evidence.NO


ExampleType = Literal[
    "conversation", "text", "preference", "unpaired", "classification", "tagging", "seq2seq"
]
VERSION = 2
"""Changes whenever the same row would give another example."""


@dataclass(frozen=True)
class Slot:
    """One of our columns, and the names under which datasets have it."""

    ours: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class FormatVariant:
    """One way to write a row format."""

    type: str
    example_type: ExampleType
    needs: tuple[Slot, ...]
    optional: tuple[Slot, ...]
    read: Callable[[Row, Columns], Example]
    judge: Callable[[Sample], Evidence] = certain
    """What the values of its columns say."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Our names of all its columns."""
        return tuple(slot.ours for slot in (*self.needs, *self.optional))


_MESSAGES = Slot("messages", ("messages", "conversation", "conversations", "dialogue", "dialog"))
_TURNS = Slot("conversations", ("conversations", "messages", "conversation", "dialogue", "dialog"))
_EITHER = Slot("messages", ("messages", "conversations", "conversation"))
PROMPT = Slot("prompt", ("prompt", "question", "query", "input", "instruction"))
COMPLETION = Slot("completion", ("completion", "answer", "response", "output"))
_INSTRUCTION = Slot("instruction", ("instruction",))
_OUTPUT = Slot("output", ("output", "response"))
_VERDICT = Slot("label", ("label", "kto_tag"))
_TEXT = Slot("text", ("text",))
_LABEL = Slot("label", ("label", "labels"))
_PAIR = (Slot("chosen", ("chosen",)), Slot("rejected", ("rejected",)))
_CHAT = (
    Slot("tools", ("tools", "functions")),
    Slot("system", ("system", "system_prompt", "system_message")),
)
_ALPACA = (Slot("input", ("input", "context")), Slot("history", ("history",)), *_CHAT)

_TEXT_PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""How SNLI, GLUE and their like name the two texts of a pair."""


def _classified_pair(text: str, text_pair: str) -> FormatVariant:
    """The form of two texts with a class, under these names."""
    needs = (Slot("text", (text,)), Slot("text_pair", (text_pair,)), _LABEL)
    return FormatVariant("classification", "classification", needs, (), from_classified_pair)


FORMAT_VARIANTS: tuple[FormatVariant, ...] = (
    FormatVariant("messages", "conversation", (_MESSAGES,), _CHAT, from_messages, messages),
    FormatVariant("sharegpt", "conversation", (_TURNS,), _CHAT, from_sharegpt, turns),
    FormatVariant("alpaca", "conversation", (_INSTRUCTION, _OUTPUT), _ALPACA, from_alpaca),
    FormatVariant(
        "prompt_completion", "conversation", (PROMPT, COMPLETION), _CHAT,
        from_prompt_completion, spoken,
    ),
    FormatVariant("prompt", "conversation", (PROMPT,), _CHAT, from_prompt, named_only),
    FormatVariant(
        "preference", "preference", (_EITHER, *_PAIR), _CHAT,
        from_messages_pair, open_messages,
    ),
    FormatVariant("preference", "preference", (_INSTRUCTION, *_PAIR), _ALPACA, from_alpaca_pair),
    FormatVariant("preference", "preference", (PROMPT, *_PAIR), _CHAT, from_prompted_pair, spoken),
    FormatVariant("preference", "preference", _PAIR, _CHAT, from_implicit_pair),
    FormatVariant(
        "unpaired", "unpaired", (_EITHER, _VERDICT), _CHAT,
        from_judged_messages, judged_messages,
    ),
    FormatVariant(
        "unpaired", "unpaired", (_INSTRUCTION, _OUTPUT, _VERDICT), _ALPACA,
        from_judged_alpaca, judged,
    ),
    FormatVariant(
        "unpaired", "unpaired", (PROMPT, COMPLETION, _VERDICT), _CHAT,
        from_judged_completion, judged,
    ),
    *(_classified_pair(*names) for names in _TEXT_PAIRS),
    FormatVariant(
        "classification", "classification", (Slot("text", ("text", "sentence")), _LABEL), (),
        from_classification,
    ),
    FormatVariant(
        "tagging", "tagging",
        (Slot("tokens", ("tokens", "words")), Slot("tags", ("tags", "ner_tags", "labels"))), (),
        from_tagging, lists,
    ),
    FormatVariant(
        "seq2seq", "seq2seq", (Slot("source", ("source",)), Slot("target", ("target",))), (),
        from_seq2seq,
    ),
    FormatVariant("text", "text", (_TEXT,), (), from_text),
)  # fmt: skip
"""All of them; of two that need the same columns the first is meant."""
