"""Rows as they train, one by one: no row stops the others, and each says what becomes of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from luthier.chat import (
    IGNORED,
    ChatEncoder,
    ChatError,
    ChatSequence,
    ImageExpander,
    Reply,
    Segment,
)
from luthier.chat.encoder import LOSSY_REASONS, ChatPromptEncoder, OnEmpty
from luthier.chat.types import ImageSpan
from luthier.config.methods import METHODS
from luthier.config.schema import ChatSettings, RunConfig
from luthier.data import Example
from luthier.data.encoders.chat import (
    RowOutcome,
    RowState,
    batch_outcomes,
    check_no_images,
    find_empty_text,
    row_outcome,
    window_outcome,
)
from luthier.data.encoders.plain_text import TextWindow, WindowEncoder
from luthier.data.encoders.preference import (
    PREFERENCE_ENCODERS,
    ComparedReplies,
    PairSplittingEncoder,
    PreferenceRowEncoder,
    UnpairedEncoder,
)
from luthier.data.encoders.prompts import encode_prompt, max_prompt_tokens
from luthier.data.encoders.tasks import (
    ClassificationEncoder,
    Seq2SeqEncoder,
    TaggingEncoder,
    TaskEncoder,
)
from luthier.data.examples import LocatedExample, OpenedSource
from luthier.data.formats.conversations import template_inputs
from luthier.data.formats.image_parts import image_parts
from luthier.errors import UserError
from luthier.model.model_images import find_model_images
from luthier.model.positions import bounded_length


def shorten_location(text: str) -> str:
    """Return a row's place as one would type it from the working directory."""
    return text.removeprefix(f"{Path.cwd()}/")


TIED = "chosen and rejected are the same tokens"
"""What is to be said of a pair that holds no preference for a training."""


class RowPart(NamedTuple):
    """A stretch of a row that is displayed by itself: a prompt, a reply, a text with its label."""

    name: str
    sequence: ChatSequence
    behind: int = 0
    """How many tokens stand before it in its sequence, which another part displays."""
    is_padded: bool = True
    """Whether a batch pads it: it ends a sequence."""
    tags: Sequence[str | None] = ()
    """The tag of each token, None for a token without one; empty where no row has tags."""
    remark: str = ""
    """What trains in place of its tokens."""


class TokenRowSize(NamedTuple):
    """How large a token row is, as a training counts it."""

    length: int
    """Tokens of its longest sequence."""
    tokens: int
    """Those of all its sequences."""
    trained: int
    """The tokens that train, or what trains in their place, such as labels."""
    images: int = 0
    image_tokens: int = 0
    """The tokens that stand for images in all its sequences."""


@dataclass
class InspectedRow:
    """One row: where it stands, what it makes, and what becomes of it."""

    place: str
    example: Example
    outcome: RowOutcome
    sequences: list[ChatSequence] = field(default_factory=list)
    """What trains of a conversation or a text, cut as configured; nothing where it does not fit."""
    sizes: list[TokenRowSize] = field(default_factory=list)
    """The size of each token row that it makes."""
    parts: list[RowPart] = field(default_factory=list)
    """What is displayed of a row of any other type."""
    replies: list["InspectedRow"] = field(default_factory=list)
    """The conversation with each reply of a preference."""
    labels: list[str] = field(default_factory=list)
    """The labels that train: verdicts, classes, or tags of words."""
    is_tied: bool = False
    """Whether a better and a worse reply are the same tokens."""

    @property
    def cut(self) -> str:
        """What it lost to fit `chat.max_length`, in words; empty where it was not cut."""
        turns = self.outcome.cut_turns
        if turns is None:
            return ""
        if self.parts and not self.replies:
            return "the end of its text was removed"
        if not turns:
            return "its first turns were removed; every reply still trains"
        counted = "1 reply" if turns == 1 else f"{turns} replies"
        return f"its first turns were removed, {counted} among them"


class RowReader(Protocol):
    """Makes rows of the examples of one kind, and goes on where training would stop."""

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these examples make."""
        ...


class Readers:
    """The readers under the settings of a config; sources that train alike share one."""

    def __init__(self, tokenizer: Any, config: RunConfig, end_tokens: list[int]) -> None:
        """`end_tokens`: those of the model's generation config."""
        self._tokenizer = tokenizer
        self._config = config
        self._end_tokens = end_tokens
        self._images = _find_images(config)
        self._conversations: dict[str, ConversationReader] = {}
        self._others: dict[tuple[str, str], RowReader] = {}

    def of(self, opened: OpenedSource) -> RowReader:
        """Return the reader of a source, whose rows the method of the run takes."""
        facts = METHODS[self._config.trainer.base_method]
        example_type = opened.row_format.example_type
        is_answered = facts.uses_rewards or facts.uses_teacher
        if example_type == "conversation" and not is_answered:
            return self.conversations(opened)
        key = example_type, repr(opened.config.train_on)
        if key not in self._others:
            self._others[key] = self._make(example_type, opened)
        return self._others[key]

    def conversations(self, opened: OpenedSource) -> "ConversationReader":
        """Return the reader of conversations, with the turns that the source says train."""
        settings = self._chat_settings(opened)
        key = repr(settings.train_on)
        if key not in self._conversations:
            self._conversations[key] = ConversationReader(
                self._tokenizer, settings, self._end_tokens, self._images
            )
        return self._conversations[key]

    def _chat_settings(self, opened: OpenedSource) -> ChatSettings:
        """Return the settings of the chat encoder for a source."""
        chat = self._config.chat
        train_on = chat.train_on if opened.config.train_on is None else opened.config.train_on
        changes = {"max_length": bounded_length(self._config), "train_on": train_on}
        return chat.model_copy(update=changes)

    def _make(self, example_type: str, opened: OpenedSource) -> RowReader:
        """Return a reader of the examples of a type."""
        config, chat, tokenizer = self._config, self._config.chat, self._tokenizer
        if example_type == "conversation":
            limit = max_prompt_tokens(config)
            return PromptReader(tokenizer, chat, self._end_tokens, limit, config.trainer.method)
        if example_type in ("preference", "unpaired"):
            method = config.trainer.base_method
            settings = self._chat_settings(opened).model_dump()
            encoder = PREFERENCE_ENCODERS[method, example_type](
                tokenizer, settings | {"eos_token_ids": self._end_tokens}, self._images
            )
            takes_images = METHODS[method].takes_images
            return ReplyReader(encoder, None if takes_images else config.trainer.method)
        if example_type == "classification":
            return TaskReader(ClassificationEncoder(tokenizer, chat.max_length, chat.on_long))
        if example_type == "tagging":
            return TaskReader(TaggingEncoder(tokenizer, chat.max_length, chat.on_long))
        if example_type == "seq2seq":
            limits = chat.max_length, chat.on_long, chat.empty_replies
            return TaskReader(Seq2SeqEncoder(tokenizer, *limits))
        return DocumentReader(
            tokenizer, bounded_length(config), config.dataset.stride, chat.empty_replies
        )


def _find_images(config: RunConfig) -> ImageExpander | None:
    """Return what the model makes of images; None where rows may have none."""
    if not METHODS[config.trainer.base_method].takes_images:
        return None
    try:
        return find_model_images(config.model)
    except UserError:
        # A folder that holds a tokenizer and nothing else is enough to look at rows of text.
        if Path(config.model.tokenizer or config.model.path).is_dir():
            return None
        raise


class ConversationReader:
    """Encodes conversations as a config says, and goes on where training would stop."""

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings,
        end_tokens: list[int],
        images: ImageExpander | None,
    ) -> None:
        """`images`: what the model makes of images; None where rows may have none."""
        self.settings = settings
        chat = settings.model_dump() | {"eos_token_ids": end_tokens}
        self.encoder = ChatEncoder(tokenizer, **chat, images=images)
        """The encoder of a training."""
        self.encoder.check_variables()
        # One day for all, also where the clock passes midnight.
        chat |= {"date": self.encoder.date, "on_lost": "drop"}
        chat |= {name: "drop" for name in ("on_long", "empty_replies") if chat[name] == "error"}
        self._dropping = ChatEncoder(tokenizer, **chat, images=images)
        self._lenient = ChatEncoder(tokenizer, **chat | {"on_lost": "keep"}, images=images)
        uncut = chat | {"on_lost": "keep", "max_length": None}
        self._uncut = ChatEncoder(tokenizer, **uncut, images=images)
        other = "segments" if settings.boundaries == "served" else "served"
        self._other_boundaries = ChatEncoder(
            tokenizer, **uncut | {"boundaries": other}, images=images
        )

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these conversations make."""
        rows = self._encode(self._dropping, placed)
        if self.settings.on_lost == "keep":
            lossy = [n for n, row in enumerate(rows) if row.outcome.reason in LOSSY_REASONS]
            lossy_rows = self._encode(self._lenient, [placed[number] for number in lossy])
            for number, row in zip(lossy, lossy_rows, strict=True):
                rows[number] = row
        for row in rows:
            if not row.sequences and self._stops_at(row.outcome):
                row.outcome = row.outcome._replace(state=RowState.STOPS)
        return rows

    def uncut_sequences(self, row: InspectedRow) -> list[ChatSequence]:
        """Return the sequences of a row before anything is cut."""
        if row.sequences and row.outcome.cut_turns is None:
            return row.sequences
        return _encode_or_nothing(self._uncut, row)

    def other_sequences(self, row: InspectedRow) -> list[ChatSequence]:
        """Return the same with the boundaries that the config did not choose."""
        return _encode_or_nothing(self._other_boundaries, row)

    def _encode(self, encoder: ChatEncoder, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what an encoder makes of rows; those that it stops at are dropped."""
        try:
            batch = encoder.encode_batch([row.example for row in placed])
        except ChatError as error:
            if len(placed) > 1:
                # One row stops the batch: each by itself tells which one.
                return [row for each in placed for row in self._encode(encoder, [each])]
            outcome = row_outcome(0, (error.reason, error.description))
            return [_inspected(placed[0], [], outcome)]
        columns = placed, batch.rows, batch_outcomes(batch)
        return [_inspected(*row) for row in zip(*columns, strict=True)]

    def _stops_at(self, outcome: RowOutcome) -> bool:
        """Return whether training stops at a row that makes no sequence."""
        if outcome.reason == "too long":
            return self.settings.on_long == "error"
        if outcome.reason == "empty reply":
            return self.settings.empty_replies == "error"
        return outcome.reason != "nothing to train" and self.settings.on_lost != "drop"


class DocumentReader:
    """Cuts plain texts into windows as a config says, and goes on where training would stop."""

    def __init__(
        self, tokenizer: Any, max_length: int | None, stride: int, empty_replies: OnEmpty
    ) -> None:
        self._encoder = WindowEncoder(tokenizer, max_length, stride)
        self._empty_replies: OnEmpty = empty_replies

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these documents make."""
        try:
            texts = [
                "" if find_empty_text(row.example["text"], self._empty_replies) else text
                for row in placed
                for text in [row.example["text"]]
            ]
            windows = self._encoder.encode_batch(texts)
        except ChatError as error:
            return _row_by_row(self, placed, error)
        return [
            _inspected(row, [*map(_window_sequence, own)], window_outcome(own))
            for row, own in zip(placed, windows, strict=True)
        ]


class PromptReader:
    """Encodes conversations up to their last reply, for methods whose model answers them itself.

    It goes on where a training would stop.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings,
        end_tokens: list[int],
        limit: int | None,
        method: str,
    ) -> None:
        """`limit`: the longest prompt, in tokens; `method`: the training method, for messages."""
        self._method = method
        encoder = ChatEncoder(tokenizer, **settings.model_dump(), eos_token_ids=end_tokens)
        encoder.check_variables()
        self._prompts = ChatPromptEncoder(encoder, limit)

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these conversations make."""
        return [self._row(row) for row in placed]

    def _row(self, placed: LocatedExample) -> InspectedRow:
        try:
            check_no_images(placed.example, self._method)
            ids, outcome = encode_prompt(self._prompts, placed.example)
        except ChatError as error:
            return _inspected(placed, [], _stopping(error))
        return _inspected(placed, [_prompt_sequence(ids)] * outcome.sequences, outcome)


class ReplyReader:
    """Encodes the replies of preferences as a training does, and goes on where it would stop."""

    def __init__(self, encoder: PreferenceRowEncoder, text_method: str | None) -> None:
        """`encoder`: that of the training; `text_method`: the method, where it takes text alone."""
        self._encoder = encoder
        self._text_method = text_method
        self.compares = not isinstance(encoder, UnpairedEncoder)
        """Whether a token row has two replies side by side."""

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these preferences make."""
        examples = [row.example for row in placed]
        try:
            if self._text_method is not None:
                for example in examples:
                    check_no_images(example, self._text_method)
            compared = self._encoder.compare(examples)
        except ChatError as error:
            return _row_by_row(self, placed, error)
        return [self._row(*row) for row in zip(placed, compared, strict=True)]

    def _row(self, placed: LocatedExample, compared: ComparedReplies) -> InspectedRow:
        example, replies = placed.example, compared.replies
        values = self._encoder.rows(example, compared) if compared else []
        row = InspectedRow(shorten_location(placed.where), example, compared.outcome(len(values)))
        if not compared:
            return row
        images = replies[0].sequence.images
        # The prompt with its images stands before each reply of a token row.
        image_tokens = sum(image.stop - image.start for image in images)
        image_tokens *= len(replies) // len(values)
        row.sizes = [
            TokenRowSize(each["length"], each["tokens"], each["trained"], len(images), image_tokens)
            for each in values
        ]
        row.parts = self._parts(example, compared)
        row.labels = [_VERDICTS[verdict] for verdict in self._verdicts(example)]
        row.is_tied = len(replies) == 2 and replies[0].whole == replies[1].whole
        row.replies = [
            InspectedRow(f"{row.place}, {name}", conversation, row.outcome, [reply.sequence])
            for name, conversation, reply in zip(
                self._encoder.names, self._encoder.conversations(example), replies, strict=True
            )
        ]
        return row

    def _verdicts(self, example: Example) -> list[bool]:
        """Return whether each reply is a good one; nothing where replies are only compared."""
        encoder = self._encoder
        return encoder.verdicts(example) if isinstance(encoder, UnpairedEncoder) else []

    def _parts(self, example: Example, compared: ComparedReplies) -> list[RowPart]:
        """Return the prompt that the replies share, and each reply."""
        prompt, replies, is_whole = compared.prompt, compared.replies, self._encoder.whole
        is_shared = all(reply.whole[: len(prompt)] == prompt for reply in replies)
        parts, start = [], 0
        if is_shared:
            start = len(prompt)
            shared = _cut_out(replies[0].sequence, 0, start, example, compared)
            parts.append(RowPart("prompt", shared, is_padded=False))
        for name, reply in zip(self._reply_names(example), replies, strict=True):
            stop = len(reply.whole) if is_whole else start + len(reply.ids)
            sequence = _cut_out(reply.sequence, start, stop, example, compared)
            remark = ""
            if is_whole:
                # Only the score of the whole conversation trains.
                sequence.replies = []
                remark = "its score at the last token trains"
            parts.append(RowPart(name, sequence, start, remark=remark))
        return parts

    def _reply_names(self, example: Example) -> list[str]:
        names = [*self._encoder.names]
        verdicts = [f"a {_VERDICTS[verdict]} reply" for verdict in self._verdicts(example)]
        if not verdicts:
            return names
        if isinstance(self._encoder, PairSplittingEncoder):
            return [f"{name}, {verdict}" for name, verdict in zip(names, verdicts, strict=True)]
        return verdicts


_VERDICTS = {True: "good", False: "bad"}


class TaskReader:
    """Encodes texts with labels, words with tags, or sources with targets as a training does.

    It goes on where a training would stop.
    """

    def __init__(self, encoder: TaskEncoder) -> None:
        """`encoder`: that of the training."""
        self._encoder = encoder

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these examples make."""
        try:
            encoded = self._encoder.encode([row.example for row in placed])
        except ChatError as error:
            return _row_by_row(self, placed, error)
        rows, number = [], 0
        for located, outcome in zip(placed, encoded.outcomes, strict=True):
            row = InspectedRow(shorten_location(located.where), located.example, outcome)
            if outcome.sequences:
                columns: dict[str, Any] = encoded.columns
                values = {name: column[number] for name, column in columns.items()}
                length = len(values["input_ids"])
                row.sizes = [TokenRowSize(length, length, values["trained"])]
                row.parts, row.labels = _task_parts(values)
                number += 1
            rows.append(row)
        return rows


def _task_parts(values: dict[str, Any]) -> tuple[list[RowPart], list[str]]:
    """Return what is displayed of a token row of a task, and its labels."""
    ids: list[int] = values["input_ids"]
    if "labels" in values:
        target: list[int] = values["labels"]
        source = RowPart("source", _text_sequence(ids, "source", []), is_padded=False)
        stretch = [Reply(0, 0, len(target))]
        reply = _text_sequence(target, "target", stretch)
        return [source, RowPart("target", reply, is_padded=False)], []
    if "tags" in values:
        tags = [str(tag) for tag in json.loads(values["tags"])]
        # Only the first token of a word says its tag.
        of_tokens = [tags[word] if word >= 0 else None for word in values["words"]]
        firsts = [Reply(0, at, at + 1) for at, tag in enumerate(of_tokens) if tag is not None]
        sequence = _text_sequence(ids, "text", firsts)
        labels = [tag for tag in of_tokens if tag is not None]
        return [RowPart("", sequence, tags=of_tokens)], labels
    label = json.loads(values["label"])
    labels = [*map(str, label)] if isinstance(label, list) else [str(label)]
    name = f"label{'s' * (len(labels) > 1)} {', '.join(labels)}" if labels else "no label"
    part = RowPart(name, _text_sequence(ids, "text", []), remark="its label trains")
    return [part], labels or [name]


def _text_sequence(ids: list[int], origin: str, trained: list[Reply]) -> ChatSequence:
    """Return text of one origin as a sequence in which these stretches train."""
    segments = [Segment(0, len(ids), None, None, origin, False)]
    return ChatSequence(ids, trained, lambda: segments)


def _cut_out(
    sequence: ChatSequence, start: int, stop: int, example: Example, compared: ComparedReplies
) -> ChatSequence:
    """Return tokens `start` up to `stop` of a conversation with a reply as a sequence.

    Its messages and images have their numbers in the example, whose prompt may have been cut.
    """
    kept = compared.prompt_messages

    def number(message: int | None) -> int | None:
        if message is None or kept is None:
            return message
        is_reply = message >= len(kept)
        return message - len(kept) + len(example["prompt"]) if is_reply else kept[message]

    def find_segments() -> list[Segment]:
        return [
            replace(
                segment,
                start=max(segment.start, start) - start,
                end=min(segment.end, stop) - start,
                message=number(segment.message),
            )
            for segment in sequence.segments
            if segment.end > start and segment.start < stop
        ]

    replies = [
        reply._replace(start=reply.start - start, stop=reply.stop - start)
        for reply in sequence.replies
        if start <= reply.start < stop
    ]
    images = [
        ImageSpan(image_number, image.start - start, image.stop - start)
        for image_number, image in zip(
            _image_numbers(example, compared.images), sequence.images, strict=True
        )
        if start <= image.start < stop
    ]
    return ChatSequence(sequence.input_ids[start:stop], replies, find_segments, images)


def _image_numbers(example: Example, digests: bytes) -> list[int]:
    """Return which image of an example each SHA-256 is, the digests being one behind the other."""
    if not digests:
        return []
    of_example = [bytes.fromhex(part["image"]["sha256"]) for part in image_parts(example)]
    size = len(of_example[0])
    return [
        of_example.index(digests[start : start + size]) for start in range(0, len(digests), size)
    ]


def _row_by_row(
    reader: RowReader, placed: Sequence[LocatedExample], error: ChatError
) -> list[InspectedRow]:
    """Return the rows of examples one of which stops a training with this error."""
    if len(placed) > 1:
        # Each by itself tells which one.
        return [row for each in placed for row in reader.rows([each])]
    return [_inspected(placed[0], [], _stopping(error))]


def _inspected(
    placed: LocatedExample, sequences: list[ChatSequence], outcome: RowOutcome
) -> InspectedRow:
    sizes = [
        TokenRowSize(
            len(sequence),
            len(sequence),
            sequence.trained_tokens,
            len(sequence.images),
            sum(image.stop - image.start for image in sequence.images),
        )
        for sequence in sequences
    ]
    place = shorten_location(placed.where)
    return InspectedRow(place, placed.example, outcome, sequences, sizes)


def _stopping(error: ChatError) -> RowOutcome:
    """Return the outcome of a row at which training stops with this error."""
    return RowOutcome(0, RowState.STOPS, error.reason, error.description)


def _encode_or_nothing(encoder: ChatEncoder, row: InspectedRow) -> list[ChatSequence]:
    """Return what a row makes; nothing where the encoder stops at it."""
    try:
        return encoder.encode(row.example["messages"], **template_inputs(row.example))
    except ChatError:
        return []


def _window_sequence(window: TextWindow) -> ChatSequence:
    """Return the window as a sequence whose reply is all that trains."""
    size, context = len(window.input_ids), window.labels.count(IGNORED)
    segments = [Segment(0, context, None, None, "text", False)] if context else []
    segments.append(Segment(context, size, None, None, "text", True))
    return ChatSequence(window.input_ids, [Reply(0, context, size)], lambda: segments)


def _prompt_sequence(ids: list[int]) -> ChatSequence:
    """Return the prompt as a sequence in which nothing trains."""
    segment = Segment(0, len(ids), None, None, "prompt", False)
    return ChatSequence(ids, [], lambda: [segment])
