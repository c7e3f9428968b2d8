"""Rows of a dataset become prompts and questions, with the replies that the rows have."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.config.schema import MAIN_SOURCE, DatasetConfig, SourceConfig
from luthier.data.encoders.prompts import reference_text, split_prompt_and_reply
from luthier.data.examples import (
    BadRows,
    LocatedExample,
    OpenedSource,
    open_examples,
    train_sources,
)
from luthier.data.formats.conversations import template_inputs
from luthier.errors import UserError
from luthier.infer.prompts import Prompt

_SHOWN = 5
_LINES = (".jsonl", ".txt", ".json")


@dataclass(frozen=True)
class PromptRow:
    """A row as a prompt."""

    where: str
    """The file and line that it is from."""
    prompt: Prompt
    expected: str | None
    """The reply that the row has in words, if it has one."""


@dataclass(frozen=True)
class PromptRows:
    """The rows of a dataset that are to be answered, in their order."""

    opened: OpenedSource
    rows: list[PromptRow]
    notes: list[str]
    """What was left out, in words."""

    def identity(self) -> dict[str, Any]:
        """What decides the rows, for a record."""
        return {"content": self.opened.source.digest(), **self.opened.settings()}


def read_prompt_rows(config: DatasetConfig) -> PromptRows:
    """Read the rows of a dataset with one source as prompts.

    Raises UserError for a file that is not there, for rows that cannot be read (with their lines,
    unless they are dropped) and for rows of a kind that ask nothing. Imports nothing large.
    """
    (source,) = train_sources(config).values()
    opened, bad = _opened(source), BadRows()
    _check_kind(opened)
    rows = [_ask(placed, opened) for placed in opened.examples(bad)]
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    notes = [f"{row.where}: left out: {row.problem}" for row in bad.rows]
    if (left_out := opened.source.left_out)[0]:
        notes.append(f"{left_out[0]:,} of {left_out[1]:,} rows left out by dataset.map")
    if bad.filtered:
        notes.append(f"{bad.filtered:,} rows left out by dataset.filter")
    return PromptRows(opened, rows, notes + list(_blank_lines(opened)))


def _opened(source: SourceConfig) -> OpenedSource:
    """Open the source; one whose format trains nothing may still hold prompts alone."""
    try:
        return open_examples(source, MAIN_SOURCE)
    except UserError as error:
        # A type that was set is a decision: only a guess is replaced by another one.
        if source.type != "auto":
            raise
        try:
            return open_examples(source.model_copy(update={"type": "prompt"}), MAIN_SOURCE)
        except UserError:
            # The first error says what the format lacks; the second one would only confuse.
            raise error from None


def _check_kind(opened: OpenedSource) -> None:
    if opened.row_format.example_type == "tagging":
        raise UserError(
            f"{opened.source.label}: its rows are words with tags, which ask nothing. If a column "
            "is a question, name it: dataset.type=prompt dataset.columns.prompt=COLUMN."
        )


def _ask(placed: LocatedExample, opened: OpenedSource) -> PromptRow:
    example, example_type = placed.example, opened.row_format.example_type
    if example_type in ("conversation", "preference", "unpaired"):
        context, _ = split_prompt_and_reply(example)
        # A conversation that begins with its reply asks nothing.
        if not context and example_type == "conversation":
            raise UserError(f"{placed.where}: there is nothing before the reply.")
        inputs = template_inputs(example)
        prompt: Prompt = {"messages": context, **inputs} if inputs else context
        return PromptRow(placed.where, prompt, reference_text(example))
    if example_type == "seq2seq":
        return PromptRow(placed.where, example["source"], example["target"])
    return PromptRow(placed.where, example["text"], None)


def _blank_lines(opened: OpenedSource) -> Iterator[str]:
    """Yield a note for each file with empty lines, which make no row."""
    for name in opened.source.files:
        file = Path(name).expanduser()
        # Only in files with a row per line does an empty line shift the numbers of the rows.
        if not file.name.lower().endswith(_LINES) or not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
        if blank:
            line_numbers = ", ".join(map(str, blank[:_SHOWN]))
            more = ", ..." if len(blank) > _SHOWN else ""
            count = "an empty line" if len(blank) == 1 else f"{len(blank):,} empty lines"
            yield f"{name}: {count}, passed over: {line_numbers}{more}"


# Evaluations during and after training ask held-out rows; these need the row's own columns too,
# because a metric may read them.

Messages = list[dict[str, Any]]
Row = tuple[Mapping[str, Any], Mapping[str, Any]]
"""An example and the columns that its row has besides; none where they are not kept."""


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the reply that the row has for it."""

    messages: Messages
    template_inputs: Mapping[str, Any]
    """What the row has for the chat template beside: `tools` and `chat_template_kwargs`."""
    expected: str
    row: dict[str, Any] = field(default_factory=dict)
    """The example, and over it the row's own columns."""


def read_questions(rows: Iterable[Row], limit: int) -> list[Question]:
    """Return the first `limit` rows that have a reply in words, split into prompt and reply.

    The reply of a pair is the chosen one, and that of judged replies a good one.
    """
    questions: list[Question] = []
    for example, columns in rows:
        if len(questions) == limit:
            break
        messages, expected = split_prompt_and_reply(example)[0], reference_text(example)
        # A row that begins with its reply, or whose reply is a tool call, cannot be scored as text.
        if messages and expected is not None:
            row = {**example, **columns}
            questions.append(Question(messages, template_inputs(example), expected, row))
    return questions
