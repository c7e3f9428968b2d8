"""From a row's columns to a conversation: the shape is found or named, and every row checked."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from luthier.config.schema import DatasetConfig
from luthier.data.messages import read_messages
from luthier.data.rows import Mistakes, Row, RowError, excerpt, kind
from luthier.errors import UserError


class Conversation(TypedDict):
    """What the chat encoder takes: OpenAI-style messages, and the tools on offer, if any."""

    messages: list[dict[str, Any]]
    tools: NotRequired[list[dict[str, Any]]]


SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
"""The columns that each shape needs; `tools` may stand beside them."""
OPTIONAL = ("tools",)

_HINTS: tuple[tuple[set[str], str], ...] = (
    ({"chosen", "rejected"}, "These are preference pairs, which supervised training cannot read."),
    (
        {"conversations"},
        "If its items have role and content: dataset.columns={messages: conversations}. "
        "ShareGPT's from and value are to be renamed in the file.",
    ),
    ({"conversation"}, "Map it: dataset.columns={messages: conversation}."),
    ({"question", "answer"}, "Map them: dataset.columns={prompt: question, completion: answer}."),
    ({"question", "response"}, "dataset.columns={prompt: question, completion: response}."),
    ({"prompt", "response"}, "Map one: dataset.columns={completion: response}."),
    (
        {"instruction", "output"},
        "Map them: dataset.columns={prompt: instruction, completion: output}; a third column "
        "such as input is not joined to the prompt.",
    ),
    ({"input", "output"}, "Map them: dataset.columns={prompt: input, completion: output}."),
    ({"text"}, "Plain text has no reply to train; give it a prompt and a completion."),
)


@dataclass(frozen=True)
class Shape:
    """How to read the rows of a source: which columns hold what, and the system prompt to add."""

    name: str
    columns: dict[str, str]
    system: str | None = None

    def take(self, row: Row, ours: str) -> Any:
        """The row's value for one of our columns; RowError names a column that is not there."""
        column = self.columns[ours]
        if column not in row.fields:
            near = difflib.get_close_matches(column, list(row.fields), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RowError(f"there is no {column!r} (it has: {', '.join(row.fields)}){hint}")
        return row.fields[column]


def find_shape(config: DatasetConfig, rows: Sequence[Row], source: str) -> Shape:
    """The shape that the config names, or the one that the columns of the rows show."""
    present = list(dict.fromkeys(key for row in rows for key in row.fields))
    columns = _columns(config.columns, present, source)
    fitting = [name for name, needs in SHAPES.items() if all(columns[n] in present for n in needs)]
    if config.shape == "auto" and len(fitting) > 1:
        raise UserError(
            f"dataset: {source} has the columns of two shapes, {' and '.join(fitting)}. Say which "
            f"one is meant: dataset.shape={fitting[0]} or dataset.shape={fitting[1]}."
        )
    wanted = fitting if config.shape == "auto" else [n for n in fitting if n == config.shape]
    if not wanted:
        raise UserError(_unknown(config, present, rows[0], source))
    return Shape(wanted[0], columns, config.system)


def _columns(mapping: dict[str, str], present: list[str], source: str) -> dict[str, str]:
    """Our column names -> the source's, after checking that the mapping names real ones."""
    ours = [*(name for needs in SHAPES.values() for name in needs), *OPTIONAL]
    for key, column in mapping.items():
        if key not in ours:
            raise UserError(
                f"dataset.columns has the key {key!r}{_near(key, ours)}. Its keys are our names, "
                f"{', '.join(ours)}; its values are the dataset's own."
            )
        if column not in present:
            raise UserError(
                f"dataset.columns maps {key} to {column!r}, and {source} has no such column"
                f"{_near(column, present)}. It has: {', '.join(present)}."
            )
    return {name: mapping.get(name, name) for name in ours}


def _near(name: str, choices: Sequence[str]) -> str:
    """A question that names the choice most like a name, if one is."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _unknown(config: DatasetConfig, present: list[str], first: Row, source: str) -> str:
    """The words for columns that fit no shape, or not the one that the config names."""
    wanted = list(SHAPES) if config.shape == "auto" else [config.shape]
    known = " or ".join(f"{name} ({', '.join(SHAPES[name])})" for name in wanted)
    hints = [words for needs, words in _HINTS if needs <= set(present)]
    near = [
        f"{column!r} looks like {ours!r}: dataset.columns={{{ours}: {column}}}."
        for name in wanted
        for ours in SHAPES[name]
        for column in difflib.get_close_matches(ours, present, n=1, cutoff=0.75)
        if column != ours
    ]
    return "\n".join(
        [
            f"dataset: the columns of {source} do not show the shape {known}.",
            f"  columns: {', '.join(present) or 'none'}",
            f"  first row ({first.where}): {excerpt(first.fields)}",
            *(hints[:1] or near or ["Rename its columns, or map them with dataset.columns."]),
        ]
    )


def to_conversations(rows: Sequence[Row], shape: Shape, source: str) -> list[Conversation]:
    """Every row as a conversation, or one UserError with the first bad rows and their places."""
    mistakes = Mistakes()
    conversations: list[Conversation] = []
    for row in rows:
        with mistakes.of(row):
            conversations.append(to_conversation(row, shape))
    needs = ", ".join(shape.columns[name] for name in SHAPES[shape.name])
    mistakes.raise_if_any(
        source, f"The rows are read as {shape.name} (columns: {needs}); see docs/data.md."
    )
    return conversations


def to_conversation(row: Row, shape: Shape) -> Conversation:
    """One row as a conversation; RowError says what is wrong with it."""
    messages = _READERS[shape.name](row, shape)
    if shape.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": shape.system}, *messages]
    conversation = Conversation(messages=messages)
    tools = _tools(row.fields.get(shape.columns["tools"]))
    if tools:
        conversation["tools"] = tools
    return conversation


def _messages(row: Row, shape: Shape) -> list[dict[str, Any]]:
    """The messages of a row that has them."""
    return read_messages(shape.take(row, "messages"), shape.columns["messages"])


def _prompt_completion(row: Row, shape: Shape) -> list[dict[str, Any]]:
    """The messages of a prompt and its completion: two texts, or two lists of messages.

    Assistant messages within the prompt are context and do not train, as in TRL.
    """
    prompt, completion = shape.take(row, "prompt"), shape.take(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    names = shape.columns["prompt"], shape.columns["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowError(
            f"{names[0]!r} is {kind(prompt)} and {names[1]!r} is {kind(completion)}; "
            "both are to be text, or both lists of messages"
        )
    context = [_as_context(message) for message in read_messages(prompt, names[0])]
    return [*context, *read_messages(completion, names[1])]


def _as_context(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a prompt: an assistant's does not train unless it says so itself."""
    return {"train": False, **message} if message["role"] == "assistant" else message


def _tools(value: Any) -> list[dict[str, Any]]:
    """The tools of a row, as a list of objects or as JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise RowError(f"the tools are text that is not JSON: {error}") from error
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"the tools are {kind(value)}; expected a list of objects")
    return value


_READERS = {"messages": _messages, "prompt_completion": _prompt_completion}
