"""Read the rows that a model is measured on, and encode those of models that write."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

from luthier.chat import ChatEncoder, ChatError, ImageExpander
from luthier.config.methods import EXAMPLE_TYPES
from luthier.config.schema import DatasetConfig, RunConfig, SourceConfig
from luthier.data.encoders.plain_text import OnLong, WindowEncoder
from luthier.data.encoders.prompts import split_prompt_and_reply
from luthier.data.encoders.tasks import Seq2SeqEncoder
from luthier.data.examples import (
    BadRows,
    LocatedExample,
    OpenedSource,
    eval_set_name,
    eval_sources,
    open_examples,
    path_key,
    train_sources,
)
from luthier.data.formats.conversations import template_inputs
from luthier.data.prepare import prepare
from luthier.errors import UserError
from luthier.infer.prompt_images import (
    PromptImage,
    RowImages,
    attach_images,
    list_prompt_images,
)
from luthier.infer.questions import Question, list_questions, select_questions
from luthier.metrics import Metric, parse_metrics, prepare_metrics

# Rows keep the place they are from, by which two models are compared row by row.

MAIN = "held out"
"""What the evaluation set without a name is called."""


class MeasuredSequence(NamedTuple):
    """A sequence of a row."""

    ids: list[int]
    """For an encoder-decoder model those of the source."""
    labels: list[int]
    """As many as there are ids: -100 where nothing is measured. For an encoder-decoder model the
    ids of the target."""
    images: Sequence[PromptImage] = ()
    """Those of its tokens, in their order."""


@dataclass(frozen=True)
class EvaluationRow:
    """A row to measure on."""

    where: str
    sequences: list[MeasuredSequence]
    questions: Sequence[Question]
    """What can be asked of it: its last reply, and where it has tools the turns before."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """For a model with a head: the columns of its token row."""


@dataclass
class EvaluationRows:
    """The rows of one evaluation set."""

    name: str
    rows: list[EvaluationRow] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that make no tokens, by the reason."""

    @property
    def asked(self) -> list[tuple[EvaluationRow, Question]]:
        """Each question with its row, in the order in which they are answered."""
        return [(row, question) for row in self.rows for question in row.questions]

    def leave_out(self, why: str) -> None:
        """Count a row that makes no tokens."""
        self.left_out[why] = self.left_out.get(why, 0) + 1


class RowBuilder(Protocol):
    """Encodes rows as the training did, and leaves out those that would stop a training."""

    @property
    def kinds(self) -> Sequence[str]:
        """The example types that it takes."""
        ...

    def add(
        self, rows: EvaluationRows, opened: OpenedSource, placed: Iterable[LocatedExample]
    ) -> None:
        """Add the rows of one source, which are of such a type."""
        ...


def read_run_rows(
    config: RunConfig, maker: RowBuilder, limit: int | None, tokenizer: Callable[[], Any]
) -> Iterator[EvaluationRows]:
    """Yield the evaluation sets of a run, as it held them out.

    `tokenizer` gives the base's own: rows that were drawn from the training rows are drawn again,
    from the cache of the training where it is still there.
    """
    named = eval_sources(config.dataset)
    for key, source in named.items():
        rows, opened = (
            EvaluationRows(eval_set_name(key) or MAIN),
            open_examples(source, path_key(key)),
        )
        _add(maker, rows, opened, _rows(opened, config.dataset, limit))
        yield rows
    # Rows drawn from the training rows are in no file of their own: they are drawn again.
    if config.dataset.eval.share is not None or config.dataset.eval.count is not None:
        yield _drawn(config, maker, limit, tokenizer())
    elif not named:
        raise UserError(
            "This run held no rows out. Name rows to measure on: luthier evaluate RUN "
            "dataset.path=FILE."
        )


def read_dataset_rows(
    config: DatasetConfig, maker: RowBuilder, limit: int | None
) -> Iterator[EvaluationRows]:
    """Yield all rows of a dataset, a set for each of its sources."""
    sources = train_sources(config)
    for name, source in sources.items():
        opened = open_examples(
            source, "dataset" if len(sources) == 1 else f"dataset.sources.{name}"
        )
        rows = EvaluationRows(opened.source.label if len(sources) == 1 else name)
        _add(maker, rows, opened, _rows(opened, config, limit))
        yield rows


def _drawn(
    config: RunConfig, maker: RowBuilder, limit: int | None, tokenizer: Any
) -> EvaluationRows:
    """Return the rows that the run drew from its training rows to hold them out."""
    # Imported here: rows from files need nothing of the training methods.
    from luthier.train.methods.encoders import make_row_encoders

    rows = EvaluationRows(MAIN)
    prepared = prepare(config.dataset, make_row_encoders(config, tokenizer), tokenizer, config.seed)
    for opened, placed in prepared.heldout[""].by_source():
        for row in placed:
            attach_images(row.example, prepared.read_image)
        # The limit holds for the set, which may be drawn from several sources.
        left = None if limit is None else limit - len(rows.rows)
        _add(maker, rows, opened, placed[:left])
    return rows


def _add(
    maker: RowBuilder, rows: EvaluationRows, opened: OpenedSource, placed: Iterable[LocatedExample]
) -> None:
    """Add rows of one source; UserError for a type of example that this model does not take."""
    example_type = opened.row_format.example_type
    if example_type not in maker.kinds:
        raise UserError(
            f"{opened.source.label}: its rows are {EXAMPLE_TYPES[example_type]}, and this "
            f"model is measured on {', '.join(EXAMPLE_TYPES[name] for name in maker.kinds)}. "
            "If they are something else, say so with dataset.type."
        )
    maker.add(rows, opened, placed)


def _rows(opened: OpenedSource, config: DatasetConfig, limit: int | None) -> list[LocatedExample]:
    """Return the rows; UserError for bad ones unless the config drops them."""
    bad, images = BadRows(), RowImages(opened)
    # Bad rows behind the limit are not read, so they cannot stop an evaluation of the first N.
    rows = list(islice(opened.examples(bad, keep_image=images.keep), limit))
    for row in rows:
        images.attach(row.example)
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    return rows


class ChatRowBuilder:
    """Makes items of conversations, of judged replies (the good one counts), and of texts."""

    kinds = ("conversation", "text", "preference", "unpaired")

    def __init__(
        self,
        tokenizer: Any,
        chat: Mapping[str, Any] | None,
        stride: int,
        context: int | None,
        images: ImageExpander | None = None,
    ) -> None:
        """`chat`: the settings of the chat encoder; None for a model without a template.

        `context`: the longest sequence that the model reads. `images`: what it makes of images.
        """
        self._tokenizer, self._stride, self._images = tokenizer, stride, images
        longest = None if chat is None else chat["max_length"]
        bounds: list[int] = [bound for bound in (context, longest) if bound is not None]
        # Measured as trained: what the training cut is cut here too, and never beyond the model.
        self._max_length = min(bounds, default=None)
        length_setting = {"max_length": self._max_length}
        self._chat = None if chat is None else without_length_limit(chat) | length_setting

    def add(
        self, rows: EvaluationRows, opened: OpenedSource, placed: Iterable[LocatedExample]
    ) -> None:
        """Add the items of rows of one source."""
        if opened.row_format.example_type == "text":
            self._add_texts(rows, placed)
        else:
            self._add_chats(rows, placed, opened.config)

    def _add_texts(self, rows: EvaluationRows, placed: Iterable[LocatedExample]) -> None:
        # A text beyond the context becomes several windows, whose losses add up to the text's.
        encoder = WindowEncoder(self._tokenizer, self._max_length, self._stride)
        for row in placed:
            (windows,) = encoder.encode_batch([row.example["text"]])
            if windows:
                sequences = [
                    MeasuredSequence(list(window.input_ids), list(window.labels))
                    for window in windows
                ]
                rows.rows.append(EvaluationRow(row.where, sequences, ()))
            else:
                rows.leave_out("the text is empty")

    def _add_chats(
        self, rows: EvaluationRows, placed: Iterable[LocatedExample], source: SourceConfig
    ) -> None:
        if self._chat is None:
            raise UserError(
                "This model has no chat template, and these rows are chats. Put its template "
                "beside the tokenizer, as chat_template.jinja."
            )
        # A source may train on other messages than the run; its rows are measured on those.
        train_on = {} if source.train_on is None else {"train_on": source.train_on}
        encoder = ChatEncoder.from_settings(self._tokenizer, self._chat | train_on, self._images)
        for row in placed:
            questions = list_questions(row.example, row.columns)
            spoken = _spoken(row.example)
            try:
                batch = encoder.encode_batch([spoken])
            except ChatError as error:
                rows.leave_out(error.reason)
                continue
            images = list_prompt_images(spoken)
            sequences = [
                MeasuredSequence(
                    sequence.input_ids,
                    sequence.labels,
                    [images[span.number] for span in sequence.images],
                )
                for sequence in batch.rows[0]
            ]
            if sequences:
                rows.rows.append(EvaluationRow(row.where, sequences, questions))
            else:
                # The encoder reports why a row came to nothing, such as one that is too long.
                rows.leave_out(batch.reports[0].reason if batch.reports else "nothing to measure")


class TargetRowBuilder:
    """Makes items of sources with a target, for encoder-decoder models."""

    kinds = ("seq2seq",)

    def __init__(self, tokenizer: Any, max_length: int | None, on_long: OnLong) -> None:
        self._encoder = Seq2SeqEncoder(tokenizer, max_length, lenient_length(on_long), "drop")

    def add(
        self, rows: EvaluationRows, opened: OpenedSource, placed: Iterable[LocatedExample]
    ) -> None:
        """Add the items of rows of one source."""
        for row, values in encode_rows(self._encoder, rows, placed):
            questions = list_questions(row.example, row.columns)
            rows.rows.append(
                EvaluationRow(
                    row.where,
                    [MeasuredSequence(values["input_ids"], values["labels"])],
                    questions,
                )
            )


def lenient_length(on_long: OnLong) -> OnLong:
    """Return `drop` where training would stop at a row that is too long, else the setting."""
    return "drop" if on_long == "error" else on_long


def without_length_limit(chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a chat encoder that drop a row where training would stop."""
    return {**chat, "empty_replies": "drop"} | {
        name: "drop" for name in ("on_lost", "on_long") if chat[name] == "error"
    }


def encode_rows(
    encoder: Any, rows: EvaluationRows, placed: Iterable[LocatedExample]
) -> "Iterable[tuple[LocatedExample, dict[str, Any]]]":
    """Yield each row with the columns of its token row; count and leave out those without one."""
    for row in placed:
        try:
            encoded = encoder.encode([row.example])
        except ChatError as error:
            rows.leave_out(error.reason)
            continue
        (outcome,) = encoded.outcomes
        if not outcome.sequences:
            rows.leave_out(outcome.reason)
        else:
            yield row, {name: column[0] for name, column in encoded.columns.items()}


def _spoken(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return a conversation; for judged replies, the prompt and the good reply."""
    prompt, reply = split_prompt_and_reply(example)
    # Of judged replies only good ones are measured: a row that is rated bad has no reply here.
    if not reply and "messages" not in example:
        return {"messages": []}
    return {"messages": [*prompt, *reply], **template_inputs(example)}


# A set joins rows with the metrics that score them.


@dataclass(frozen=True)
class EvaluationSet:
    """One evaluation set."""

    items: EvaluationRows
    metrics: list[Metric]
    """Those of replies in words."""
    better: Mapping[str, bool | None]
    """For each metric whether higher is better; None where it is neither."""


def rows_with_replies(items: EvaluationRows, metrics: list[Metric]) -> EvaluationSet:
    """Return a set whose replies are scored by metrics; what these need is imported.

    Each row keeps the questions that a metric scores, and metrics that have none are left out.
    Raises UserError as `prepare_metrics` does.
    """
    questions = [question for item in items.rows for question in item.questions]
    # Metrics may load a judge or an embedding model: not for rows that ask nothing.
    used = [m for m in metrics if any(m.takes(each.prediction("", {})) for each in questions)]
    if used:
        expected = [each.expected for each in questions if each.expected is not None]
        prepare_metrics(used, expected)
    items.rows = [
        replace(item, questions=select_questions(item.questions, used) if used else [])
        for item in items.rows
    ]
    better = {metric.name: metric.greater_is_better for metric in used}
    return EvaluationSet(items, used, better)


def metrics_of_run(config: RunConfig | None, name: str) -> list[Metric]:
    """Return the run's metrics of an evaluation set; none for a model without a run."""
    if config is None:
        return []
    evaluation = config.trainer.evaluation
    return parse_metrics(evaluation.sets.get(name, evaluation.metrics))
