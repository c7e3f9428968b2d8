"""Replies that are judged, as token ids behind the ids of their prompt.

Each reply is encoded as a conversation of its own, by the chat encoder: the prompt's ids are those
that generation starts from, and what trains is what the model would have to write, up to and with
the stop token. All replies of an example must stand behind the same ids.

Every token row has the columns `trained` (how many tokens train), `length` (the tokens of its
longest sequence) and `tokens` (those of all), and `images` (those of the prompt) for a model that
sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, NamedTuple

from luthier.chat import ChatError, ChatSequence
from luthier.chat.conversation import read_conversation
from luthier.chat.images import IMAGE_PART, ImageExpander
from luthier.chat.pipeline import drop_front, turn_starts
from luthier.data.encoders.chat import (
    IMAGES_COLUMN,
    ConversationEncoder,
    EncodedRows,
    RowOutcome,
    RowProblem,
    image_digests,
    row_outcome,
)
from luthier.data.formats import Example
from luthier.data.formats.conversations import template_inputs

Messages = list[dict[str, Any]]


class EncodedReply(NamedTuple):
    """A reply behind its prompt."""

    ids: list[int]
    """Up to and with its last trained token."""
    spans: list[int]
    """Where each trained stretch of `ids` starts and stops, one after the other: a reply of several
    turns has text between them that is not the model's."""
    sequence: ChatSequence
    """The conversation from its first token to its last, as the template writes it."""

    @property
    def whole(self) -> list[int]:
        """The ids of the conversation."""
        return self.sequence.input_ids

    @property
    def trained(self) -> int:
        """How many tokens train."""
        return sum(self.spans[1::2]) - sum(self.spans[::2])


@dataclass
class ComparedReplies:
    """The replies of an example, or why it has none."""

    prompt: list[int] = field(default_factory=list)
    replies: list[EncodedReply] = field(default_factory=list)
    problem: RowProblem | None = None
    """What is wrong with it, also where it is kept."""
    images: bytes = b""
    """The SHA-256 of each image of the prompt, one behind the other."""
    prompt_messages: list[int] | None = None
    """The numbers of the prompt's messages that were kept to fit the length; None for all."""

    def __bool__(self) -> bool:
        return bool(self.replies)

    def outcome(self, rows: int) -> RowOutcome:
        """Return what becomes of the example, which makes so many token rows."""
        # No turn of a prompt trains, so none is lost.
        cut_turns = None if self.prompt_messages is None else 0
        return row_outcome(rows, self.problem, cut_turns)


class ReplyEncoder:
    """Encodes the replies of examples: those that stand under `names`, such as `chosen`."""

    def __init__(
        self,
        tokenizer: Any,
        settings: dict[str, Any],
        names: Sequence[str],
        whole: bool = False,
        images: ImageExpander | None = None,
    ) -> None:
        """`settings`: those of `luthier.chat.ChatEncoder`; `max_length` counts prompt and reply,
        and with `whole` all that the template writes. Without `whole`, the prompts of the replies
        must be the same. `images`: as `ConversationEncoder` takes it."""
        limit, settings = settings["max_length"], settings | {"max_length": None}
        self._conversations = ConversationEncoder(tokenizer, settings, images)
        self._limit: int | None = limit
        self._on_long: str = settings["on_long"]
        self._names = tuple(names)
        self._whole = whole

    @cached_property
    def _chat(self) -> Any:
        return self._conversations.chat

    def settings(self) -> dict[str, Any]:
        """All that decides the ids besides the tokenizer, for JSON."""
        reply_settings = {"max_length": self._limit, "on_long": self._on_long, "whole": self._whole}
        return self._conversations.settings() | reply_settings

    def encode(self, examples: Sequence[Example]) -> list[ComparedReplies]:
        """The replies of each example.

        Raises ChatError, with the example's number, for one that the settings do not allow to drop
        or keep.
        """
        results = []
        for number, (example, compared) in enumerate(
            zip(examples, self._compare(examples), strict=True)
        ):
            if compared and self._is_long(compared):
                compared = self._fitted(example, compared, number)
            if not compared and compared.problem and self._stops_at(compared.problem[0]):
                reason, description = compared.problem
                raise ChatError(description, reason=reason, row=number)
            results.append(compared)
        return results

    def conversations(self, example: Example) -> list[dict[str, Any]]:
        """The conversation with each reply of an example, in which nothing else trains."""
        train_on = self._chat.train_on
        roles = {"assistant"} if isinstance(train_on, str) else set(train_on)
        return [_conversation(example, name, roles) for name in self._names]

    def _compare(self, examples: Sequence[Example]) -> Iterator[ComparedReplies]:
        """The replies of each example, however long."""
        count = len(self._names)
        conversations = [
            conversation for example in examples for conversation in self.conversations(example)
        ]
        try:
            batch = self._chat.encode_batch(conversations)
        except ChatError as error:
            number, side = divmod(error.row or 0, count)
            description = f"{self._names[side]}: {error.description}"
            raise ChatError(description, reason=error.reason, row=number) from error
        # The first report of a row is kept: both replies may have the same thing wrong.
        reports = {error.row: error for error in reversed(batch.reports)}
        for start in range(0, len(conversations), count):
            rows = batch.rows[start : start + count]
            reports_of_row = [reports.get(start + side) for side in range(count)]
            yield self._one(examples[start // count], rows, reports_of_row)

    def _one(
        self,
        example: Example,
        rows: list[list[ChatSequence]],
        reports: Sequence[ChatError | None],
    ) -> ComparedReplies:
        """The replies of an example, whose conversations make these sequences."""
        problem = None
        for name, sequences, report in zip(self._names, rows, reports, strict=True):
            if report is not None:
                problem = problem or (report.reason, f"{name}: {report.description}")
            if not sequences:
                return ComparedReplies(problem=problem)
            if len(sequences) > 1 and not self._whole:
                return ComparedReplies(problem=_rewritten_reply_problem(name))
        last = [sequences[-1] for sequences in rows]
        starts = [sequence.replies[0].start for sequence in last]
        prompts = [sequence.input_ids[:start] for sequence, start in zip(last, starts, strict=True)]
        if any(prompt != prompts[0] for prompt in prompts) and not self._whole:
            return ComparedReplies(problem=_different_prompts_problem(self._names))
        for name, sequence, start in zip(self._names, last, starts, strict=True):
            if any(image.start >= start for image in sequence.images):
                return ComparedReplies(problem=_image_in_reply_problem(name))
        images = {image_digests(example, sequence) for sequence in last}
        # The tokens of two images of one size are the same.
        if len(images) > 1:
            return ComparedReplies(problem=_different_prompts_problem(self._names))
        return ComparedReplies(prompts[0], [*map(_reply, last)], problem, images.pop())

    def _stops_at(self, reason: str) -> bool:
        if reason == "too long":
            return self._on_long == "error"
        if reason == "empty reply":
            return self._chat.empty_replies == "error"
        return reason != "nothing to train" and self._chat.on_lost != "drop"

    def _is_long(self, compared: ComparedReplies) -> bool:
        return self._limit is not None and self._length(compared) > self._limit

    def _length(self, compared: ComparedReplies) -> int:
        """Tokens of the longest sequence."""
        if self._whole:
            return max(len(reply.whole) for reply in compared.replies)
        return len(compared.prompt) + max(len(reply.ids) for reply in compared.replies)

    def _fitted(self, example: Example, compared: ComparedReplies, number: int) -> ComparedReplies:
        """The example with as few turns less at the front of its prompt as make it fit."""
        description = (
            f"it has {self._length(compared)} tokens, and chat.max_length is {self._limit}"
        )
        if self._on_long != "turns":
            return ComparedReplies(problem=("too long", description))
        best = ComparedReplies(
            problem=("too long", f"{description}; no whole turns of its prompt can be removed")
        )
        kept_messages = _shorten_prompt(example)
        low, high = 0, len(kept_messages)
        while low < high:
            middle = (low + high) // 2
            prompt = [example["prompt"][message] for message in kept_messages[middle]]
            try:
                (tried,) = self._compare([{**example, "prompt": prompt}])
            except ChatError as error:
                raise error.in_row(number) from error
            if tried and not self._is_long(tried):
                best, high = tried, middle
                best.prompt_messages = kept_messages[middle]
            else:
                low = middle + 1
        return best


def _conversation(example: Mapping[str, Any], name: str, roles: set[str]) -> dict[str, Any]:
    """The conversation with this reply, in which the prompt's turns of these roles do not train."""
    prompt: Messages = example["prompt"]
    context = [
        {**message, "train": False} if message["role"] in roles else message for message in prompt
    ]
    return {"messages": [*context, *example[name]], **template_inputs(example)}


def _reply(sequence: ChatSequence) -> EncodedReply:
    begin, stop = sequence.replies[0].start, sequence.replies[-1].stop
    spans = [place - begin for _, *places in sequence.replies for place in places]
    return EncodedReply(sequence.input_ids[begin:stop], spans, sequence)


def _shorten_prompt(example: Mapping[str, Any]) -> list[list[int]]:
    """The messages of the prompt without its first turn, without its first two, ..., by number.

    A user's turn stays.
    """
    prompt: Messages = example["prompt"]
    conversation = read_conversation(prompt, image_part=IMAGE_PART)
    starts = turn_starts(conversation, len(prompt))
    return [[*drop_front(conversation, start).numbers] for start in starts]


def _rewritten_reply_problem(name: str) -> RowProblem:
    description = (
        f"{name}: the template writes its turns in another way once later ones follow, so they "
        "have no single prompt. Leave the last turn as the reply, and the others as the prompt"
    )
    return "template rewrites the reply", description


def _image_in_reply_problem(name: str) -> RowProblem:
    description = (
        f"{name} holds an image, and models reply with text only. Make the turns up to the "
        "image part of the prompt"
    )
    return "image in a reply", description


def _different_prompts_problem(names: Sequence[str]) -> RowProblem:
    description = (
        f"the template writes the prompt of {' and '.join(names)} in different ways, so the "
        "replies do not answer the same. Where a reply has turns of its own before the one that "
        "trains, make them part of the prompt"
    )
    return "different prompts", description


Values = dict[str, Any]
CHOSEN_AND_REJECTED = ("chosen", "rejected")


class PreferenceRowEncoder(ABC):
    """What the encoders share. It pickles."""

    kind: ClassVar[str]
    names: ClassVar[Sequence[str]]
    """Where the replies stand in an example."""
    whole: ClassVar[bool] = False
    """Whether rows hold whole conversations."""

    def __init__(
        self, tokenizer: Any, settings: dict[str, Any], images: ImageExpander | None = None
    ) -> None:
        """`settings`: those of `luthier.chat.ChatEncoder`; `images`: what the model's processor
        makes of images, None for a model of text alone."""
        self._given = (tokenizer, settings, images)
        self._has_images = images is not None
        self._replies = ReplyEncoder(tokenizer, settings, self.names, self.whole, images)

    def settings(self) -> dict[str, Any]:
        """All that decides the rows besides the tokenizer, for JSON."""
        return self._replies.settings() | {"kind": self.kind}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode some examples.

        Raises ChatError, with the example's number, for one that is neither dropped nor kept.
        """
        compared = self.compare(examples)
        rows = [
            self.rows(example, replies) if replies else []
            for example, replies in zip(examples, compared, strict=True)
        ]
        if self._has_images:
            for replies, values_of_rows in zip(compared, rows, strict=True):
                for values in values_of_rows:
                    values[IMAGES_COLUMN] = replies.images
        return EncodedRows(
            _columns(chain.from_iterable(rows)),
            [replies.outcome(len(values)) for values, replies in zip(rows, compared, strict=True)],
        )

    def compare(self, examples: Sequence[Example]) -> list[ComparedReplies]:
        """The replies of each example, cut as configured; ChatError as `encode` raises it."""
        return self._replies.encode(examples)

    def conversations(self, example: Example) -> list[dict[str, Any]]:
        """The conversation with each reply of an example, in the order of `names`."""
        return self._replies.conversations(example)

    @abstractmethod
    def rows(self, example: Example, compared: ComparedReplies) -> list[Values]:
        """The rows that an example makes: one value for each column."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), self._given


class PreferenceEncoder(PreferenceRowEncoder):
    """Two replies to one prompt, the better one first.

    Columns: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `chosen_spans` and `rejected_spans`:
    where the trained stretches of a reply start and stop.
    """

    kind = "preference"
    names = CHOSEN_AND_REJECTED

    def rows(self, example: Example, compared: ComparedReplies) -> list[Values]:
        """One row."""
        lengths = [len(compared.prompt) + len(reply.ids) for reply in compared.replies]
        values: Values = {"prompt_ids": compared.prompt}
        for name, reply in zip(self.names, compared.replies, strict=True):
            values |= {f"{name}_ids": reply.ids, f"{name}_spans": reply.spans}
        trained = sum(reply.trained for reply in compared.replies)
        return [values | _sizes(trained, lengths)]


class UnpairedEncoder(PreferenceRowEncoder):
    """A reply and whether it is a good one.

    Columns: `prompt_ids`, `completion_ids`, `completion_spans` (where its trained stretches start
    and stop) and `label`, 1 for a good one and 0 for a bad one.
    """

    kind = "unpaired"
    names: ClassVar[Sequence[str]] = ("completion",)

    def rows(self, example: Example, compared: ComparedReplies) -> list[Values]:
        """One row for each reply."""
        return [
            {
                "prompt_ids": compared.prompt,
                "completion_ids": reply.ids,
                "completion_spans": reply.spans,
                "label": int(good),
                **_sizes(reply.trained, [len(compared.prompt) + len(reply.ids)]),
            }
            for reply, good in zip(compared.replies, self.verdicts(example), strict=True)
        ]

    def verdicts(self, example: Example) -> list[bool]:
        """Whether each reply is a good one."""
        return [example["label"]]


class PairSplittingEncoder(UnpairedEncoder):
    """The rows of `UnpairedEncoder` from two replies to one prompt: a good one and a bad one."""

    kind = "unpaired from preference"
    names = CHOSEN_AND_REJECTED

    def verdicts(self, example: Example) -> list[bool]:
        """The better one is good."""
        return [True, False]


class RewardEncoder(PreferenceRowEncoder):
    """Two whole conversations, the better one first.

    Columns: `chosen_ids` and `rejected_ids`, as the template writes each from its start to its end;
    `trained` is 1, for the score of one against that of the other.
    """

    kind = "reward"
    names = CHOSEN_AND_REJECTED
    whole = True

    def rows(self, example: Example, compared: ComparedReplies) -> list[Values]:
        """One row."""
        whole = [reply.whole for reply in compared.replies]
        named = {f"{name}_ids": ids for name, ids in zip(self.names, whole, strict=True)}
        return [named | _sizes(1, [*map(len, whole)])]


PREFERENCE_ENCODERS: Mapping[tuple[str, str], type[PreferenceRowEncoder]] = {
    ("dpo", "preference"): PreferenceEncoder,
    ("orpo", "preference"): PreferenceEncoder,
    ("cpo", "preference"): PreferenceEncoder,
    ("kto", "preference"): PairSplittingEncoder,
    ("kto", "unpaired"): UnpairedEncoder,
    ("reward", "preference"): RewardEncoder,
}
"""The encoder of each method of preferences and type of examples."""


def _sizes(trained: int, lengths: list[int]) -> Values:
    return {"trained": trained, "length": max(lengths), "tokens": sum(lengths)}


def _columns(rows: Iterable[Values]) -> dict[str, Any]:
    """The values of all rows by column."""
    columns: dict[str, Any] = {"trained": []}
    for values in rows:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns
