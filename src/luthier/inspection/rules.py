"""The rules that every sequence must keep, and a sample of conversations against transformers.

A rule counts its cases and keeps the first that break it. Prompts are compared with those of
`apply_chat_template`, and sequences with those of the boundaries that the config did not choose.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from operator import ne
from typing import Any

from jinja2 import TemplateError

from luthier.chat import IGNORED, ChatEncoder, ChatSequence, Reply
from luthier.chat.conversation import fill_empty_content
from luthier.data import Example
from luthier.data.formats.conversations import TEMPLATE_KWARGS, template_inputs
from luthier.data.formats.image_parts import image_parts
from luthier.errors import UserError
from luthier.inspection.readers import ConversationReader, InspectedRow
from luthier.model.model_images import ModelImages
from luthier.model.vision_processor import VisionProcessor


class TransformersPrompts:
    """`apply_chat_template` under the settings of an encoder."""

    def __init__(self, tokenizer: Any, encoder: ChatEncoder, template: str | None) -> None:
        self._tokenizer = tokenizer
        # None leaves the choice between a tokenizer's templates to transformers.
        self._template = None if template is None else encoder.settings()["template"]
        self._variables = encoder.variables
        self._encoder = encoder
        # transformers writes the day it is; a pinned day is compared by way of it.
        self._today = _of_today(tokenizer, encoder)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, added)) or "(?!)")

    def agrees(self, row: Example, message: int, ids: list[int]) -> list[int] | None:
        """The prompt before a message as transformers writes it where it is not `ids`.

        None where it agrees, and where transformers has no prompt to compare with: none before the
        first message, and none for control tokens in a user's text beside tags in a reply's, of
        which it can take only both or neither as text.
        """
        inputs = template_inputs(row)
        tools = inputs.get("tools")
        shown = self._encoder.convert_arguments(row["messages"][:message], tools)
        before = [_plain(each) for each in shown]
        if not before:
            return None
        if self._today is not None:
            pinned = self._encoder.prompt(before, **inputs)
            if pinned != ids:
                return pinned
            ids = self._today.prompt(before, **inputs)
        in_replies = self._holds_controls(m for m in before if m["role"] == "assistant")
        in_prompts = self._holds_controls([*(m for m in before if m["role"] != "assistant"), tools])
        ways = [in_prompts] if not in_replies else [True] if in_prompts else [False, True]
        prompts = [self._prompt(before, inputs, sanitize) for sanitize in ways]
        if ids in prompts or (in_replies and in_prompts):
            return None
        return prompts[0]

    @cached_property
    def _processor(self) -> VisionProcessor | None:
        """What makes the prompts of a model that reads images; None for a model of text alone."""
        images = self._encoder.images
        # One whose processor cannot be had is served for text alone.
        with suppress(UserError):
            return images.processor if isinstance(images, ModelImages) else None
        return None

    def _prompt(self, messages: list[dict[str, Any]], inputs: Any, sanitize: bool) -> list[int]:
        try:
            return self._applied(messages, inputs, sanitize)
        except TemplateError:
            return self._applied(fill_empty_content(messages), inputs, sanitize)

    def _applied(self, messages: list[dict[str, Any]], inputs: Any, sanitize: bool) -> list[int]:
        settings = {
            "tools": inputs.get("tools"),
            "chat_template": self._template,
            "add_generation_prompt": True,
            "sanitize_control_tokens": sanitize,
            **self._variables | inputs.get(TEMPLATE_KWARGS, {}),
        }
        if self._processor is not None:
            return self._processor.encode_prompt(
                self._encoder.convert_content(messages, settings["tools"]), **settings
            )
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, return_dict=False, **settings
        )
        return ids

    def _holds_controls(self, values: Iterable[Any]) -> bool:
        """Whether text somewhere in the values holds an added token."""
        return any(self._controls.search(text) for value in values for text in _texts(value))


def _of_today(tokenizer: Any, encoder: ChatEncoder) -> ChatEncoder | None:
    """The encoder of this day, where that is not the encoder's and a template asks for it."""
    settings, today = encoder.settings(), date.today().isoformat()
    template = settings["template"]
    texts = [template] if isinstance(template, str) else template.values()
    if encoder.date == today or not any("strftime_now" in text for text in texts):
        return None
    return ChatEncoder.from_settings(tokenizer, settings | {"date": today}, encoder.images)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """The message without luthier's own field, and without fields that say nothing."""
    return {key: value for key, value in message.items() if value is not None and key != "train"}


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


EXAMPLES = 3
"""How many places each rule and each finding shows."""


@dataclass
class RuleExample:
    """A place and what is to be seen there; `tokens` are named stretches of them."""

    place: str
    words: str
    tokens: dict[str, str] = field(default_factory=dict)


@dataclass
class Rule:
    """A rule in words, how often it was checked, and where it broke."""

    text: str
    unit: str
    checked: int = 0
    broken: int = 0
    examples: list[RuleExample] = field(default_factory=list)

    def note(self, place: str, wrong: str | None, tokens: dict[str, str] | None = None) -> None:
        """Count one case; `wrong` says what breaks the rule in it."""
        self.checked += 1
        if wrong is None:
            return
        self.broken += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(RuleExample(place, wrong, tokens or {}))


class SequenceRules:
    """What can be told from a sequence alone."""

    def __init__(self, encoder: ChatEncoder, tokenizer: Any, trains_tokens: bool = True) -> None:
        """`trains_tokens`: False where a score of the whole sequence trains in their place."""
        self._stops = set(encoder.stop_token_ids)
        self._bos = tokenizer.bos_token_id
        self.labels = Rule("labels are the token ids or -100", "sequences")
        self.bos = Rule("a sequence begins with at most one BOS", "sequences")
        self.stops = Rule("trained tokens end with a stop token", "replies")
        self._trains_tokens = trains_tokens
        self.all = [self.labels, self.bos, self.stops] if trains_tokens else [self.bos]

    def apply(self, sequence: ChatSequence, place: str) -> None:
        """Check one sequence."""
        ids, labels = sequence.input_ids, sequence.labels
        doubled = self._bos is not None and ids[:2] == [self._bos, self._bos]
        self.bos.note(place, f"it begins with token {self._bos} twice" if doubled else None)
        if not self._trains_tokens:
            return
        self.labels.note(place, _wrong_labels(ids, labels))
        image_starts = {image.start for image in sequence.images}
        for start, stop in trained_runs(labels):
            if stop in image_starts:
                # The reply goes on behind the image, which does not train.
                continue
            last = ids[stop - 1]
            wrong = None if last in self._stops else f"tokens {start} to {stop} end with {last}"
            self.stops.note(place, wrong)


def join_replies(replies: Iterable[Reply]) -> list[Reply]:
    """Return one reply for each message: one that holds images has several stretches."""
    by_message: dict[int, Reply] = {}
    for reply in replies:
        first = by_message.setdefault(reply.message, reply)
        by_message[reply.message] = first._replace(stop=reply.stop)
    return [*by_message.values()]


def trained_runs(labels: list[int]) -> Iterable[tuple[int, int]]:
    """Where each stretch of trained tokens starts and ends."""
    trains = bytes(map(IGNORED.__ne__, labels))
    start = trains.find(1)
    while start >= 0:
        stop = trains.find(0, start)
        stop = len(labels) if stop < 0 else stop
        yield start, stop
        start = trains.find(1, stop)


def _wrong_labels(ids: list[int], labels: list[int]) -> str | None:
    if len(ids) != len(labels):
        return f"{len(ids)} ids and {len(labels)} labels"
    ignored = labels.count(IGNORED)
    if ignored == len(labels):
        return "nothing in it trains"
    # No id is negative, so the ignored ones are among those that differ.
    if sum(map(ne, ids, labels)) == ignored:
        return None
    for position, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, id_):
            return f"token {position} is {id_} and its label {label}"
    return None


_BEFORE, _AFTER = 4, 7


def first_difference(first: list[int], second: list[int]) -> int:
    """The place of the first token that differs."""
    for position, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return position
    return min(len(first), len(second))


def tokens_around(ids: list[int], position: int, text_of: Callable[[int], str]) -> str:
    """The tokens around a place, a mark before each, in one line."""
    begin, end = max(position - _BEFORE, 0), position + _AFTER
    ahead, behind = "… " if begin else "", " …" if end < len(ids) else ""
    joined = "|".join(text_of(id_).replace("\n", "↵") for id_ in ids[begin:end])
    return f"{ahead}{joined}{behind}" if joined else "(ends here)"


COMPARED_TOKENS = 1_000_000
COMPARED_TURNS = 5_000
COMPARED_PIXELS = 200_000_000
"""What is compared of a set before the sample gets thinner: transformers takes seconds for it."""


@dataclass
class BoundaryDifferences:
    """Rows that the other setting of `chat.boundaries` would make other tokens of."""

    chosen: str
    unit: str = "rows"
    """What `rows` counts: rows, or their replies where a row has several."""
    rows: int = 0
    differ: int = 0
    first: RuleExample | None = None


class RowSample:
    """Which rows of a source are compared: all, then every second, every fourth, and so on.

    The first rows say little of a long set, and all of them take too long. Once the source's part
    of what may be compared is reached, and then at each further quarter of it, the distance between
    two rows doubles. So the sample goes on to the last row of a source of any length, and is the
    same on every machine.
    """

    def __init__(self, share: float) -> None:
        """`share`: the source's part of what may be compared."""
        self._share = share
        self._left = share
        self._every = 1
        self._rows = 0

    def takes(self) -> bool:
        """Whether the next row is compared."""
        self._rows += 1
        return (self._rows - 1) % self._every == 0

    def spend(self, tokens: int, turns: int, pixels: int = 0) -> None:
        """Say what a comparison took."""
        self._left -= max(
            tokens / COMPARED_TOKENS, turns / COMPARED_TURNS, pixels / COMPARED_PIXELS
        )
        if self._left <= 0:
            self._left = self._share / 4
            self._every *= 2


class PromptComparison:
    """What differs from transformers' prompts, and from the other boundaries."""

    def __init__(self, chosen: str, text_of: Callable[[int], str]) -> None:
        """`chosen`: the config's boundaries; `text_of`: the text of a token."""
        self.prompts = Rule("prompts are those of apply_chat_template", "turns")
        self.boundaries = BoundaryDifferences(chosen)
        self.of = 0
        """How many rows make sequences, of which `boundaries.rows` were compared."""
        self._text_of = text_of

    def compare(
        self,
        reader: ConversationReader,
        reference: TransformersPrompts,
        rows: list[InspectedRow],
        sample: RowSample,
    ) -> None:
        """Compare those of the rows that the sample takes, each before anything is cut."""
        for row in rows:
            if not row.sequences and row.outcome.reason != "too long":
                continue
            self.of += 1
            if sample.takes():
                sequences = reader.uncut_sequences(row)
                self._compare(row, sequences, reader.other_sequences(row))
                for sequence in sequences:
                    sample.spend(*self._compare_prompts(reference, row, sequence))

    def _compare_prompts(
        self, reference: TransformersPrompts, row: InspectedRow, sequence: ChatSequence
    ) -> tuple[int, int, int]:
        """Compare each prompt of a sequence; the tokens, turns and pixels that were compared."""
        for reply in join_replies(sequence.replies):
            ids = sequence.input_ids[: reply.start]
            try:
                other = reference.agrees(row.example, reply.message, ids)
            except Exception as error:  # a template may raise anything
                wrong = f"message {reply.message}: transformers raises: {error}"
                self.prompts.note(row.place, wrong)
                continue
            if other is None:
                self.prompts.note(row.place, None)
                continue
            tokens = self._tokens_at_difference({"luthier": ids, "transformers": other})
            self.prompts.note(row.place, f"the prompt of message {reply.message} differs", tokens)
        turns = len(sequence.replies)
        # A processor processes all images of a row for each of its prompts.
        pixels = sum(
            part["image"]["width"] * part["image"]["height"] for part in image_parts(row.example)
        )
        return sum(reply.start for reply in sequence.replies), turns, turns * pixels

    def _compare(
        self, row: InspectedRow, sequences: list[ChatSequence], others: list[ChatSequence]
    ) -> None:
        boundaries = self.boundaries
        boundaries.rows += 1
        if list(map(_content, sequences)) == list(map(_content, others)):
            return
        boundaries.differ += 1
        if boundaries.first is None:
            boundaries.first = self._first_difference(row, sequences, others)

    def _first_difference(
        self, row: InspectedRow, sequences: list[ChatSequence], others: list[ChatSequence]
    ) -> RuleExample:
        names = ("served", "segments")
        chosen, other = names if self.boundaries.chosen == "served" else names[::-1]
        for first, second in zip(sequences, others, strict=False):
            if first.input_ids != second.input_ids:
                named = {chosen: first.input_ids, other: second.input_ids}
                return RuleExample(
                    row.place, "the tokens differ here", self._tokens_at_difference(named)
                )
        return RuleExample(
            row.place, f"{chosen}: {len(sequences)} sequences, {other}: {len(others)} sequences"
        )

    def _tokens_at_difference(self, named: dict[str, list[int]]) -> dict[str, str]:
        """Both lists of tokens around the place where they part."""
        at = first_difference(*named.values())
        return {name: tokens_around(ids, at, self._text_of) for name, ids in named.items()}


def _content(sequence: ChatSequence) -> tuple[list[int], list]:
    """What a training sees of a sequence: the ids, and which of them train."""
    return sequence.input_ids, sequence.replies
