"""Rows of a dataset become prompts and questions, with the replies that the rows have."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from luthier.infer.prompt_images import RowImages
from luthier.infer.prompts import Prompt
from luthier.infer.seq2seq_prompts import Seq2SeqPrompts
from luthier.metrics import Metric, Prediction

_MOST_EXAMPLES = 5
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
    images: str | None = None
    """A hash of the images of the rows, whose files are no part of the source; None without any."""

    def identity(self) -> dict[str, Any]:
        """What decides the rows, for a record."""
        identity = {"content": self.opened.source.digest(), **self.opened.settings()}
        return identity if self.images is None else identity | {"pictures": self.images}


def read_prompt_rows(config: DatasetConfig) -> PromptRows:
    """Read the rows of a dataset with one source as prompts.

    Raises UserError for a file that is not there, for rows that cannot be read (with their lines,
    unless they are dropped) and for rows of a kind that ask nothing. Imports nothing large.
    """
    (source,) = train_sources(config).values()
    opened, bad = _opened(source), BadRows()
    _check_kind(opened)
    images, rows = RowImages(opened), []
    for placed in opened.examples(bad, keep_image=images.keep):
        images.attach(placed.example)
        rows.append(_ask(placed, opened))
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    notes = [f"{row.where}: left out: {row.problem}" for row in bad.rows]
    if (left_out := opened.source.left_out)[0]:
        notes.append(f"{left_out[0]:,} of {left_out[1]:,} rows left out by dataset.map")
    if bad.filtered:
        notes.append(f"{bad.filtered:,} rows left out by dataset.filter")
    return PromptRows(opened, rows, notes + list(_blank_lines(opened)), images.digest())


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
            line_numbers = ", ".join(map(str, blank[:_MOST_EXAMPLES]))
            more = ", ..." if len(blank) > _MOST_EXAMPLES else ""
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
    expected: str | None
    """The reply in words; None for one that calls tools, and for a turn that is not the last."""
    row: dict[str, Any] = field(default_factory=dict)
    """The example, and over it the row's own columns."""
    reply: Mapping[str, Any] = field(default_factory=dict)
    """The message of the row that the model's reply is compared with."""
    is_last: bool = True
    """Whether the row ends with this reply."""
    offers_tools: bool = False
    """Whether the row has tools, or calls one: then a reply without a call says something, too."""

    @property
    def expected_text(self) -> str:
        """What is expected, to be shown."""
        return self.expected if self.expected is not None else turn_text(self.reply)

    @property
    def prompt(self) -> dict[str, Any]:
        """The messages, and what the template gets beside them."""
        return {"messages": self.messages, **self.template_inputs}

    def prediction(self, text: str, message: Mapping[str, Any]) -> Prediction:
        """Return a reply for the metrics; `message`: what its text says as a message."""
        calls = [each.get("tool_calls") or () for each in (message, self.reply)]
        return Prediction(
            text,
            self.expected or "",
            self.row,
            has_reference=self.expected is not None,
            calls=(calls[0], calls[1]) if self.offers_tools else None,
            message=message,
            reference_message=self.reply,
        )


def turn_text(message: Mapping[str, Any]) -> str:
    """Return what a turn says in words, and each of its calls as a line of JSON.

    An image among its parts is `[image PATH]`.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    lines = [content] if isinstance(content, str) and content else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        shown = {"name": function.get("name"), "arguments": function.get("arguments")}
        lines.append(json.dumps(shown, ensure_ascii=False, default=str))
    return "\n".join(lines)


def _part_text(part: Mapping[str, Any]) -> str:
    """Return a part of a content as text."""
    if part.get("type") != "image":
        return str(part.get("text") or "")
    image = part.get("image")
    source = image.get("source") if isinstance(image, Mapping) else None
    return f"[image {source}]" if source else "[image]"


def list_questions(example: Mapping[str, Any], columns: Mapping[str, Any]) -> list[Question]:
    """Return what can be asked of a row: each turn of the assistant behind the row's own prefix.

    The last one has a reply in words that metrics of text compare with; those before it are for
    metrics of tool calls, so they are there only where the row has tools or calls. The reply of a
    pair is the chosen one, and that of judged replies a good one.
    """
    row, inputs = {**example, **columns}, template_inputs(example)
    prompt, reply = split_prompt_and_reply(example)
    turns = [*prompt, *reply]
    offers_tools = bool(inputs.get("tools")) or any(each.get("tool_calls") for each in turns)
    make = partial(Question, template_inputs=inputs, row=row, offers_tools=offers_tools)
    questions = []
    for number, message in enumerate(prompt if offers_tools and "messages" in example else ()):
        if message["role"] == "assistant" and message.get("train") is not False and number:
            questions.append(make(prompt[:number], expected=None, reply=message, is_last=False))
    if prompt and len(reply) == 1:
        expected = reference_text(example)
        if expected is not None or reply[0].get("tool_calls"):
            questions.append(make(prompt, expected=expected, reply=reply[0]))
    return questions


def select_questions(questions: Iterable[Question], metrics: Sequence[Metric]) -> list[Question]:
    """Return those questions that a metric scores; without metrics those of last replies."""
    return [
        each
        for each in questions
        if any(metric.takes(each.prediction("", {})) for metric in metrics)
        or (not metrics and each.is_last)
    ]


def read_questions(
    rows: Iterable[Row], limit: int, metrics: Sequence[Metric] = ()
) -> list[Question]:
    """Return what is asked of the first `limit` rows that have something to score."""
    questions: list[Question] = []
    count = 0
    for example, columns in rows:
        if count == limit:
            break
        selected = select_questions(list_questions(example, columns), metrics)
        questions += selected
        count += bool(selected)
    return questions


Answer = tuple[str, dict[str, Any]]
"""A reply as text, and as a message."""


def decode_answer(
    encoder: Any, tokenizer: Any, ids: list[int], is_ended: bool, question: Question
) -> Answer:
    """Return what a model answered.

    `encoder`: what made the prompt. `ids`: without the stop token; `is_ended`: whether one
    followed. A reply that is no turn of the template has no calls. The text of one with calls has
    them as JSON, as the text of what is expected does.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    if isinstance(encoder, Seq2SeqPrompts):  # there is no chat template
        return text, {"role": "assistant", "content": text}
    stop = encoder.stop_token_ids[:1] if is_ended else []
    message: dict[str, Any] = encoder.parse([*ids, *stop], **question.prompt).message
    calls_tools = question.offers_tools and message.get("tool_calls")
    return turn_text(message) if calls_tools else text, message
