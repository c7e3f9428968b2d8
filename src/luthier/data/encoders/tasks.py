"""Rows for tasks with a fixed answer: classes of texts, tags of words, one text from another."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, ClassVar, NamedTuple

from luthier.chat import ChatError
from luthier.chat.encoder import OnEmpty
from luthier.data.encoders.chat import (
    EMPTY_TEXT,
    EncodedRows,
    RowProblem,
    find_empty_text,
    row_outcome,
)
from luthier.data.encoders.plain_text import (
    LengthLimit,
    OnLong,
    PlainTextTokenizer,
    RowTooLongError,
    SpecialTokenFrame,
    add_end_token,
    measure_frame,
)
from luthier.data.formats import Example

NOT_FIRST = -1
"""In the column `words`: a token that does not begin a word."""

Values = dict[str, Any]
TextIds = list[list[int]]
"""The token ids of each text, or word, of an example."""


class TaskRow(NamedTuple):
    """The row of an example, or why it makes none."""

    values: Values
    """One value for each column."""
    is_cut: bool = False
    problem: RowProblem | None = None


class TaskEncoder(ABC):
    """What the encoders share: texts as `tokenizer(text)` gives them, cut at the end if too long.

    Text never becomes a control token, as in chats. It pickles.
    """

    kind: ClassVar[str]

    def __init__(self, tokenizer: Any, max_length: int | None, on_long: OnLong) -> None:
        """`max_length` counts what the tokenizer adds, too; null for no bound."""
        self._tokenizer = tokenizer
        self._bound = LengthLimit(max_length, on_long)

    @cached_property
    def _text(self) -> PlainTextTokenizer:
        return PlainTextTokenizer(self._tokenizer)

    @cached_property
    def _frame(self) -> SpecialTokenFrame:
        """What stands around a single text."""
        return self._checked(measure_frame(self._tokenizer))

    def _checked(self, frame: SpecialTokenFrame) -> SpecialTokenFrame:
        self._bound.check(frame)
        return frame

    def settings(self) -> dict[str, Any]:
        """All that decides the rows besides the tokenizer's files, for JSON."""
        return {
            "kind": self.kind,
            "max_length": self._bound.max_length,
            "on_long": self._bound.on_long,
            "frame": self._frame.settings(),
            "controls": sorted(self._text.controls),
        }

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode some examples; each makes one row or none.

        Raises ChatError, with the example's number, for one that is too long where `on_long` is
        `error`, and for text that this tokenizer makes a control token in any case.
        """
        columns: dict[str, Any] = {name: [] for name in self._columns()}
        outcomes = []
        texts_of_rows = zip(examples, self._text_ids(examples), strict=True)
        for number, (example, texts) in enumerate(texts_of_rows):
            try:
                row = self._row(example, texts)
            except ChatError as error:
                raise error.in_row(number) from None
            except RowTooLongError as error:
                row = TaskRow({}, problem=self._too_long(error.tokens, number))
            for name, value in row.values.items():
                columns[name].append(value)
            # A cut takes text from the end, and no trained turn with it.
            cut_turns = 0 if row.is_cut else None
            outcomes.append(row_outcome(1 if row.values else 0, row.problem, cut_turns))
        return EncodedRows(columns, outcomes)

    @abstractmethod
    def _columns(self) -> tuple[str, ...]:
        """The names of the columns."""

    @abstractmethod
    def _text_ids(self, examples: Sequence[Example]) -> Iterator[TextIds]:
        """The ids of each example's texts."""

    @abstractmethod
    def _row(self, example: Example, texts: TextIds) -> TaskRow:
        """The row of an example, whose texts have these ids; raises TooLong."""

    def _encode_texts(self, texts: Sequence[Sequence[str]]) -> Iterator[TextIds]:
        """The ids of texts, in the order of the examples that have them."""
        ids = self._text.encode(chain.from_iterable(texts))
        for number, row in enumerate(texts):
            try:
                yield [next(ids) for _ in row]
            except ChatError as error:
                raise error.in_row(number) from None

    def _too_long(self, tokens: int, number: int) -> RowProblem:
        reason = "longer than chat.max_length"
        description = (
            f"the row has {tokens} tokens, and chat.max_length is {self._bound.max_length}"
        )
        if self._bound.on_long == "error":
            advice = "Raise it, or set chat.on_long=turns to cut texts at their end, or =drop"
            raise ChatError(f"{description}. {advice}", reason=reason, row=number)
        return reason, description

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("_text", "_frame", "_pair_frame", "_target_frame")
        return {name: value for name, value in vars(self).items() if name not in lazy}


class ClassificationEncoder(TaskEncoder):
    """Texts, or pairs of texts, with a label.

    Columns: `input_ids`; `token_type_ids` where the tokenizer has them; `label`, JSON of a class, a
    number, or a list of classes; `trained`, which is 1.
    """

    kind = "classification"

    @cached_property
    def _pair_frame(self) -> SpecialTokenFrame:
        return self._checked(measure_frame(self._tokenizer, texts=2))

    def settings(self) -> dict[str, Any]:
        """Those of all encoders, and what stands around a pair."""
        return super().settings() | {"pair": self._pair_frame.settings()}

    def _columns(self) -> tuple[str, ...]:
        types = () if self._frame.types is None else ("token_type_ids",)
        return ("input_ids", "label", "trained", *types)

    def _text_ids(self, examples: Sequence[Example]) -> Iterator[TextIds]:
        names = ("text", "text_pair")
        return self._encode_texts(
            [[example[name] for name in names if name in example] for example in examples]
        )

    def _row(self, example: Example, texts: TextIds) -> TaskRow:
        if not any(texts):
            return TaskRow({}, problem=EMPTY_TEXT)
        frame = self._frame if len(texts) == 1 else self._pair_frame
        fitting = self._bound.fit(texts, frame)
        values: Values = {
            "input_ids": frame.around(fitting),
            "label": json.dumps(example["label"]),
            "trained": 1,
        }
        if frame.types is not None:
            values["token_type_ids"] = frame.types_around(fitting)
        return TaskRow(values, is_cut=fitting != texts)


class TaggingEncoder(TaskEncoder):
    """Words with a tag each.

    The ids are those of the words with one space between them. Columns: `input_ids`; `words`, the
    number of the word that a token is the first of, or `NOT_FIRST`; `tags`, JSON of the tags of all
    words; `trained`, how many words have a token. A row that is too long loses whole words.
    """

    kind = "tagging"

    def _columns(self) -> tuple[str, ...]:
        return ("input_ids", "words", "tags", "trained")

    def _text_ids(self, examples: Sequence[Example]) -> Iterator[TextIds]:
        return self._text.encode_words([example["tokens"] for example in examples])

    def _row(self, example: Example, texts: TextIds) -> TaskRow:
        if not any(texts):
            return TaskRow({}, problem=EMPTY_TEXT)
        before, behind = (len(part) for part in self._frame.ids_around)
        fitting = self._kept(texts)
        words = [
            NOT_FIRST if place else number
            for number, ids in enumerate(fitting)
            for place in range(len(ids))
        ]
        values: Values = {
            "input_ids": self._frame.around([list(chain.from_iterable(fitting))]),
            "words": [*[NOT_FIRST] * before, *words, *[NOT_FIRST] * behind],
            "tags": json.dumps(example["tags"]),
            "trained": sum(map(bool, fitting)),
        }
        return (
            TaskRow(values, is_cut=len(fitting) < len(texts)) if any(fitting) else _no_word(texts)
        )

    def _kept(self, words: TextIds) -> TextIds:
        """The words that fit; raises TooLong where a row is not to be cut."""
        flat = list(chain.from_iterable(words))
        room = len(self._bound.fit([flat], self._frame)[0])
        ends = accumulate(map(len, words))
        return words[: sum(end <= room for end in ends)]


def _no_word(words: TextIds) -> TaskRow:
    first = next(ids for ids in words if ids)
    text = f"its first word alone has {len(first)} tokens, which is more than fit"
    return TaskRow({}, problem=("longer than chat.max_length", text))


class Seq2SeqEncoder(TaskEncoder):
    """A text, and the text that an encoder-decoder model is to make of it.

    Columns: `input_ids` of the source; `labels` of the target as `tokenizer(text_target=...)` gives
    them, with one end token; `trained`, how many these are. A target that is too long loses its
    end, and then has no end token: the model must not learn to stop there.
    """

    kind = "seq2seq"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        on_long: OnLong,
        empty_replies: OnEmpty = "error",
    ) -> None:
        """`empty_replies`: what to do with a target that is empty or blank."""
        super().__init__(tokenizer, max_length, on_long)
        self._empty_replies: OnEmpty = empty_replies

    @cached_property
    def _target_frame(self) -> SpecialTokenFrame:
        return self._checked(
            add_end_token(measure_frame(self._tokenizer, target=True), self._tokenizer)
        )

    def settings(self) -> dict[str, Any]:
        """Those of all encoders, what stands around a target, and what becomes of empty ones."""
        own = {"target": self._target_frame.settings(), "empty_replies": self._empty_replies}
        return super().settings() | own

    def source(self, text: str) -> list[int]:
        """The ids of a source, as in a row; one that is too long loses its end in any case."""
        (ids,) = self._text.encode([text])
        bound = LengthLimit(self._bound.max_length, "turns")
        return self._frame.around(bound.fit([ids], self._frame))

    def _columns(self) -> tuple[str, ...]:
        return ("input_ids", "labels", "trained")

    def _text_ids(self, examples: Sequence[Example]) -> Iterator[TextIds]:
        return self._encode_texts([[each["source"], each["target"]] for each in examples])

    def _row(self, example: Example, texts: TextIds) -> TaskRow:
        source, target = texts
        if not source:
            return TaskRow({}, problem=("empty source", "its source is empty"))
        problem = find_empty_text(example["target"], self._empty_replies, "target")
        if problem is not None:
            return TaskRow({}, problem=problem)
        (fitting,) = self._bound.fit([source], self._frame)
        labels = self._target_frame.around([target])
        fits = self._bound.fit([target], self._target_frame) == [target]
        if not fits:
            start = self._target_frame.ids_around[0]
            labels = [*start, *target][: self._bound.max_length]
        values = {
            "input_ids": self._frame.around([fitting]),
            "labels": labels,
            "trained": len(labels),
        }
        return TaskRow(values, is_cut=not fits or fitting != source)
