"""The rows that a model is measured on: their tokens, and the questions in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from luthier.chat import ChatEncoder, ChatError
from luthier.config.schema import DatasetConfig, RunConfig, SourceConfig
from luthier.data.encoders import ConversationEncoder, RowEncoder, TextEncoder
from luthier.data.examples import BadRows, Opened, Placed, open_rows
from luthier.data.parts import eval_sources, key_of_path, set_name, train_sources
from luthier.data.plain import PlainEncoder
from luthier.data.prepare import Encoders, prepare
from luthier.errors import UserError
from luthier.infer.score import Question, questions
from luthier.model.tokenizer import end_token_ids

MAIN = "held out"
"""What the evaluation set without a name is called."""
_SPOKEN = ("conversation", "preference", "unpaired")
_OTHERS = {
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


@dataclass(frozen=True)
class Item:
    """A row to measure on."""

    where: str
    sequences: list[tuple[list[int], list[int]]]
    """Token ids, and labels of the same length: -100 where nothing is measured."""
    question: Question | None
    """What can be asked of it; None where it has no reply in words."""


@dataclass
class Items:
    """The rows of one evaluation set."""

    name: str
    rows: list[Item] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that make no tokens, by the reason."""


class Maker:
    """Makes items as the training made rows, and leaves out what it would stop at."""

    def __init__(
        self, tokenizer: Any, chat: Mapping[str, Any] | None, stride: int, context: int | None
    ) -> None:
        """`chat`: the settings of the chat encoder; None for a model without a template.

        `context`: the longest sequence that the model reads.
        """
        self._tokenizer, self._stride = tokenizer, stride
        lenient = {"on_lost": "drop"} if chat and chat["on_lost"] == "error" else {}
        lenient |= {"on_long": "drop"} if chat and chat["on_long"] == "error" else {}
        longest = None if chat is None else chat["max_length"]
        bounds: list[int] = [bound for bound in (context, longest) if bound is not None]
        self._max_length = min(bounds, default=None)
        self._chat = None if chat is None else {**chat, **lenient, "max_length": self._max_length}

    def add(self, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
        """Add the items of rows of one source."""
        kind = opened.shape.kind
        if kind not in (*_SPOKEN, "text"):
            raise UserError(
                f"{opened.source.label}: its rows are {_OTHERS[kind]}, which luthier evaluate does "
                "not measure; the results of a run on such rows are in its run.json."
            )
        if kind == "text":
            self._add_texts(found, placed)
        else:
            self._add_chats(found, placed, opened.config)

    def _add_texts(self, found: Items, placed: Iterable[Placed]) -> None:
        encoder = PlainEncoder(self._tokenizer, self._max_length, self._stride)
        for row in placed:
            (windows,) = encoder.encode_batch([row.example["text"]])
            sequences = [(list(one.input_ids), list(one.labels)) for one in windows]
            _add(found, Item(row.where, sequences, None), "the text is empty")

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
                found.left_out[error.reason] = found.left_out.get(error.reason, 0) + 1
                continue
            sequences = [(one.input_ids, one.labels) for one in made.rows[0]]
            why = made.reports[0].reason if made.reports else "nothing to measure"
            _add(found, Item(row.where, sequences, asked[0] if asked else None), why)


def _add(found: Items, item: Item, why: str) -> None:
    if item.sequences:
        found.rows.append(item)
    else:
        found.left_out[why] = found.left_out.get(why, 0) + 1


def _spoken(example: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation; of judged replies, the prompt and the good one."""
    tools = example.get("tools")
    if "messages" in example:
        return {"messages": example["messages"], "tools": tools}
    if not example.get("label", True):
        return {"messages": [], "tools": None}
    reply = example.get("chosen") or example["completion"]
    return {"messages": [*example["prompt"], *reply], "tools": tools}


def of_run(
    config: RunConfig, maker: Maker, limit: int | None, tokenizer: Callable[[], Any]
) -> Iterator[Items]:
    """The evaluation sets of a run, as it held them out.

    `tokenizer` gives the base's own: rows that were drawn from the training rows are drawn again,
    from the cache of the training where it is still there.
    """
    named = eval_sources(config.dataset)
    for key, source in named.items():
        found, opened = Items(set_name(key) or MAIN), open_rows(source, key_of_path(key))
        maker.add(found, opened, _rows(opened, config.dataset, limit))
        yield found
    if config.dataset.eval.share is not None or config.dataset.eval.count is not None:
        yield _drawn(config, maker, limit, tokenizer())
    elif not named:
        raise UserError(
            "This run held no rows out. Name rows to measure on: luthier evaluate RUN "
            "dataset.path=FILE."
        )


def of_dataset(config: DatasetConfig, maker: Maker, limit: int | None) -> Iterator[Items]:
    """All rows of a dataset, a set for each of its sources."""
    sources = train_sources(config)
    for name, source in sources.items():
        opened = open_rows(source, "dataset" if len(sources) == 1 else f"dataset.sources.{name}")
        found = Items(opened.source.label if len(sources) == 1 else name)
        maker.add(found, opened, _rows(opened, config, limit))
        yield found


def _drawn(config: RunConfig, maker: Maker, limit: int | None, tokenizer: Any) -> Items:
    """The rows that the run drew from its training rows to hold them out."""
    found = Items(MAIN)
    sides = prepare(config.dataset, _encoders(config, tokenizer), tokenizer, config.seed).heldout
    for opened, placed in sides[""].by_source():
        left = None if limit is None else limit - len(found.rows)
        maker.add(found, opened, placed[:left])
    return found


def _encoders(config: RunConfig, tokenizer: Any) -> Encoders:
    """The encoders of a supervised training, so that its cache is found."""
    chat = config.chat.model_dump() | {"eos_token_ids": end_token_ids(config.model)}

    def encoder(kind: str, source: SourceConfig, key: str) -> RowEncoder:
        if kind == "text":
            return TextEncoder(tokenizer, config.chat.max_length, config.dataset.stride)
        if kind != "conversation":
            raise UserError(
                f"{key}: its rows are no chats and no texts, and which of them the run held out is "
                "not drawn again here. Name rows to measure on: luthier evaluate RUN "
                "dataset.path=FILE."
            )
        own = {} if source.train_on is None else {"train_on": source.train_on}
        return ConversationEncoder(tokenizer, chat | own)

    return encoder


def _rows(opened: Opened, config: DatasetConfig, limit: int | None) -> list[Placed]:
    """The rows; UserError for bad ones unless they are dropped."""
    bad = BadRows()
    rows = list(islice(opened.examples(bad), limit))
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    return rows
