"""Conversations as prompts for a model that learns from what it answers itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np

from luthier.chat import ChatError
from luthier.config.schema import RunConfig
from luthier.data.encoders.chat import ConversationEncoder, EncodedRows, RowProblem
from luthier.data.formats import Example
from luthier.data.store import Ragged
from luthier.errors import UserError

NO_PROMPT: RowProblem = ("no prompt", "there is nothing before the reply")


def split_prompt_and_reply(example: Example) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A conversation's prompt, and the reply it ends with, if it does."""
    *context, last = example["messages"]
    if last["role"] != "assistant":
        return example["messages"], None
    return context, last


def reference_text(example: Example) -> str | None:
    """The text of the reply that a conversation ends with; None where there is none in words."""
    reply = split_prompt_and_reply(example)[1] or {}
    content = reply.get("content")
    return content if isinstance(content, str) and not reply.get("tool_calls") else None


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

    def __init__(self, tokenizer: Any, settings: dict[str, Any], limit: int | None) -> None:
        """`settings`: those of a `luthier.chat.ChatEncoder`; `limit`: the longest prompt."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._limit = limit

    @cached_property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self._tokenizer, self._settings)

    @cached_property
    def _prompts(self) -> Any:
        from luthier.chat.encoder import ChatPromptEncoder

        return ChatPromptEncoder(self._conversations.chat, self._limit)

    def settings(self) -> dict[str, Any]:
        """The chat encoder's, and the limit."""
        return self._conversations.settings() | {"kind": "prompt", "limit": self._limit}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode dicts of messages and tools."""
        rows, made = [], EncodedRows({}, [])
        for number, example in enumerate(examples):
            ids = self._encode(number, example, made)
            rows += [ids] if ids else []
            made.counts.append(1 if ids else 0)
        flat = np.array(list(chain.from_iterable(rows)), np.int32)
        offsets = np.array([0, *accumulate(map(len, rows))])
        made.columns |= {
            "input_ids": Ragged(flat, offsets),
            "trained": np.zeros(len(rows), np.int32),
        }
        return made

    def _encode(self, number: int, example: Example, made: EncodedRows) -> list[int]:
        """One example's prompt; none where it is dropped."""
        context = split_prompt_and_reply(example)[0]
        if not context:
            made.problems[number] = NO_PROMPT
            return []
        try:
            ids, gone, lost = self._prompts.encode(context, example.get("tools"))
        except ChatError as error:
            if self._prompts.is_fatal(error):
                raise error.in_row(number) from None
            made.problems[number] = (error.reason, error.description)
            return []
        if gone:
            made.cut[number] = 0  # no turn of a prompt trains
        if lost is not None:
            made.problems[number] = (lost.reason, lost.description)
        return list(ids)

    def __getstate__(self) -> dict[str, Any]:
        given = ("_tokenizer", "_settings", "_limit")
        return {name: vars(self)[name] for name in given}
