"""Rows for models that write: chats, texts, and sources with targets."""

from collections.abc import Iterable, Mapping
from typing import Any

from luthier.chat import ChatEncoder, ChatError
from luthier.config.schema import SourceConfig
from luthier.data.encoders.plain_text import OnLong, PlainEncoder
from luthier.data.encoders.tasks import Seq2SeqEncoder
from luthier.data.examples import Opened, Placed
from luthier.errors import UserError
from luthier.evaluate.items import Item, Items
from luthier.infer.questions import questions


class SpokenMaker:
    """Makes items of conversations, of judged replies (the good one counts), and of texts."""

    kinds = ("conversation", "text", "preference", "unpaired")

    def __init__(
        self, tokenizer: Any, chat: Mapping[str, Any] | None, stride: int, context: int | None
    ) -> None:
        """`chat`: the settings of the chat encoder; None for a model without a template.

        `context`: the longest sequence that the model reads.
        """
        self._tokenizer, self._stride = tokenizer, stride
        longest = None if chat is None else chat["max_length"]
        bounds: list[int] = [bound for bound in (context, longest) if bound is not None]
        self._max_length = min(bounds, default=None)
        own = {"max_length": self._max_length}
        self._chat = None if chat is None else lenient(chat) | own

    def add(self, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
        """Add the items of rows of one source."""
        if opened.shape.kind == "text":
            self._add_texts(found, placed)
        else:
            self._add_chats(found, placed, opened.config)

    def _add_texts(self, found: Items, placed: Iterable[Placed]) -> None:
        encoder = PlainEncoder(self._tokenizer, self._max_length, self._stride)
        for row in placed:
            (windows,) = encoder.encode_batch([row.example["text"]])
            if windows:
                sequences = [(list(one.input_ids), list(one.labels)) for one in windows]
                found.rows.append(Item(row.where, sequences, None))
            else:
                found.leave_out("the text is empty")

    def _add_chats(self, found: Items, placed: Iterable[Placed], source: SourceConfig) -> None:
        if self._chat is None:
            raise UserError(
                "This model has no chat template, and these rows are chats. Put its template "
                "beside the tokenizer, as chat_template.jinja."
            )
        own = {} if source.train_on is None else {"train_on": source.train_on}
        encoder = ChatEncoder.from_settings(self._tokenizer, self._chat | own)
        for row in placed:
            asked = questions([(row.example, row.columns)], 1)
            try:
                made = encoder.encode_batch([_spoken(row.example)])
            except ChatError as error:
                found.leave_out(error.reason)
                continue
            sequences = [(one.input_ids, one.labels) for one in made.rows[0]]
            if sequences:
                found.rows.append(Item(row.where, sequences, asked[0] if asked else None))
            else:
                found.leave_out(made.reports[0].reason if made.reports else "nothing to measure")


class TargetMaker:
    """Makes items of sources with a target, for encoder-decoder models."""

    kinds = ("seq2seq",)

    def __init__(self, tokenizer: Any, max_length: int | None, on_long: OnLong) -> None:
        self._encoder = Seq2SeqEncoder(tokenizer, max_length, lenient_length(on_long))

    def add(self, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
        """Add the items of rows of one source."""
        for row, values in encoded(self._encoder, found, placed):
            (question,) = questions([(row.example, row.columns)], 1)
            found.rows.append(Item(row.where, [(values["input_ids"], values["labels"])], question))


def lenient_length(on_long: OnLong) -> OnLong:
    """What becomes of rows that are too long: they are left out where training would stop."""
    return "drop" if on_long == "error" else on_long


def lenient(chat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a chat encoder under which a row is left out where training would stop."""
    return {**chat} | {name: "drop" for name in ("on_lost", "on_long") if chat[name] == "error"}


def encoded(
    encoder: Any, found: Items, placed: Iterable[Placed]
) -> "Iterable[tuple[Placed, dict[str, Any]]]":
    """Each row with the columns of its token row; those that make none are left out and counted."""
    for row in placed:
        try:
            made = encoder.encode([row.example])
        except ChatError as error:
            found.leave_out(error.reason)
            continue
        if made.counts == [0]:
            found.leave_out(made.problems[0][0])
        else:
            yield row, {name: column[0] for name, column in made.columns.items()}


def _spoken(example: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation; of judged replies, the prompt and the good one."""
    tools = example.get("tools")
    if "messages" in example:
        return {"messages": example["messages"], "tools": tools}
    if not example.get("label", True):
        return {"messages": [], "tools": None}
    reply = example.get("chosen") or example["completion"]
    return {"messages": [*example["prompt"], *reply], "tools": tools}
