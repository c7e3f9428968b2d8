"""Conversations as prompts for a model that learns from what it answers itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.chat import ChatError
from luthier.config.schema import RunConfig
from luthier.data.encoders.chat import (
    ConversationEncoder,
    EncodedRows,
    RowOutcome,
    RowProblem,
    row_outcome,
)
from luthier.data.formats import Example
from luthier.data.formats.conversations import template_inputs
from luthier.data.store import Ragged
from luthier.data.store.table import Column
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.chat.encoder import ChatPromptEncoder

Messages = list[dict[str, Any]]

NO_PROMPT: RowProblem = ("no prompt", "there is nothing before the reply")


def split_prompt_and_reply(example: Mapping[str, Any]) -> tuple[Messages, Messages]:
    """Return the messages of an example's prompt and those of its reply.

    A conversation has a reply if its last message is the assistant's. Of two replies to a prompt
    the chosen one counts, and one that is rated bad is none. What an example has not is empty.
    """
    if "messages" in example:
        *context, last = example["messages"]
        return (context, [last]) if last["role"] == "assistant" else (example["messages"], [])
    if "source" in example:
        return (
            [{"role": "user", "content": example["source"]}],
            [{"role": "assistant", "content": example["target"]}],
        )
    if not example.get("label", True):
        return example["prompt"], []
    return example.get("prompt", []), example.get("chosen") or example.get("completion") or []


def reference_text(example: Mapping[str, Any]) -> str | None:
    """Return the text of an example's reply; None where it is not one message all in words."""
    reply = split_prompt_and_reply(example)[1]
    if len(reply) != 1 or reply[0].get("tool_calls"):
        return None
    content = reply[0].get("content")
    return content if isinstance(content, str) else None


def max_prompt_tokens(config: RunConfig) -> int | None:
    """What `chat.max_length` leaves for a prompt beside the longest completion, in tokens.

    None for no bound. Raises UserError where nothing is left.
    """
    most = config.chat.max_length
    longest = config.trainer.args.max_completion_length
    if most is None or longest is None:
        return most
    if most <= longest:
        raise UserError(
            f"chat.max_length={most}: with completions of up to {longest} tokens "
            "(trainer.args.max_completion_length) there is no room for a prompt. Raise it."
        )
    return most - longest


class PromptEncoder:
    """Conversations up to their last reply as `input_ids`, one row each; nothing in them trains."""

    def __init__(
        self,
        tokenizer: Any,
        settings: dict[str, Any],
        limit: int | None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """`settings`: those of a `luthier.chat.ChatEncoder`; `limit`: the longest prompt.

        `tools`: the JSON schemas that every prompt shows; None for those of each row.
        """
        self._tokenizer = tokenizer
        self._settings = settings
        self._limit = limit
        self._tools = tools

    @cached_property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self._tokenizer, self._settings)

    @cached_property
    def _prompts(self) -> ChatPromptEncoder:
        from luthier.chat.encoder import ChatPromptEncoder

        return ChatPromptEncoder(self._conversations.chat, self._limit)

    def settings(self) -> dict[str, Any]:
        """The chat encoder's, and the limit."""
        settings = self._conversations.settings() | {"kind": "prompt", "limit": self._limit}
        return settings if self._tools is None else settings | {"tools": self._tools}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode dicts of messages and tools.

        Raises ChatError, with the example's number, for one that the settings do not drop.
        """
        rows, outcomes = [], []
        for number, example in enumerate(examples):
            try:
                ids, outcome = encode_prompt(self._prompts, self._with_tools(example))
            except ChatError as error:
                raise error.in_row(number) from None
            rows += [ids] * outcome.sequences
            outcomes.append(outcome)
        flat = np.array(list(chain.from_iterable(rows)), np.int32)
        offsets = np.array([0, *accumulate(map(len, rows))])
        columns: dict[str, Column] = {
            "input_ids": Ragged(flat, offsets),
            "trained": np.zeros(len(rows), np.int32),
        }
        return EncodedRows(columns, outcomes)

    def _with_tools(self, example: Example) -> Example:
        if self._tools is None:
            return example
        if example.get("tools"):
            raise ChatError(
                "the row has tools of its own, and the model can call those of trainer.tools and "
                "trainer.environment alone. Remove them from the row",
                reason="tools of its own",
                field="tools",
            )
        return {**example, "tools": self._tools}

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_tokenizer", "_settings", "_limit", "_tools")}


def encode_prompt(prompts: ChatPromptEncoder, example: Example) -> tuple[list[int], RowOutcome]:
    """Return the ids of an example's prompt, none where it is dropped, and its outcome.

    Raises ChatError for an example that the settings do not allow to drop.
    """
    context, _ = split_prompt_and_reply(example)
    if not context:
        return [], row_outcome(0, NO_PROMPT)
    try:
        ids, left_out, lost = prompts.encode(context, **template_inputs(example))
    except ChatError as error:
        if prompts.is_fatal(error):
            raise
        return [], row_outcome(0, (error.reason, error.description))
    problem = None if lost is None else (lost.reason, lost.description)
    # No turn of a prompt trains, so a cut takes none with it.
    return list(ids), row_outcome(int(bool(ids)), problem, 0 if left_out else None)
