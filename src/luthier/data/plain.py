"""Plain documents to token ids and labels, whole or in windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from luthier.chat import IGNORED
from luthier.data.neutral import NeutralText
from luthier.errors import UserError


class Window(NamedTuple):
    """A stretch of a document: token ids, and labels of the same length."""

    input_ids: list[int]
    labels: list[int]
    """The ids, but `IGNORED` for tokens that the window before trains."""


class PlainEncoder:
    """Turns documents into windows of token ids, of which every token trains.

    tokenizer: a fast tokenizer of transformers. A document begins with what the tokenizer itself
    puts before a text (a BOS, or nothing) and ends with its end token. max_length: tokens of a
    window; null keeps documents whole. stride: tokens that a window repeats from the one before, as
    context that does not train again. Without a stride the first token of a later window has
    nothing to be predicted from.

    Text never becomes a control token, as in chats: `</s>` in a document is encoded as plain text.
    Raises UserError for a tokenizer without an end token and for a stride as long as a window.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, stride: int = 0) -> None:
        if max_length is not None and stride >= max_length:
            raise UserError(
                f"dataset.stride={stride} must be less than chat.max_length={max_length}: windows "
                "of a document overlap by so many tokens, and each must bring new ones."
            )
        self.max_length = max_length
        self.stride = stride
        self._text = NeutralText(tokenizer)
        self.start, self.end = _around(tokenizer)

    def encode_batch(self, texts: Iterable[str]) -> list[list[Window]]:
        """The windows of each document, in order; none for an empty one.

        Raises ChatError, with the document's number, where a control token in its text cannot be
        encoded as text.
        """
        return [
            self._windows([*self.start, *ids, *self.end]) if ids else []
            for ids in self._text.encode(texts)
        ]

    def settings(self) -> dict[str, Any]:
        """Everything besides the tokenizer's files that decides the windows, for JSON."""
        return {
            "max_length": self.max_length,
            "stride": self.stride,
            "start": self.start,
            "end": self.end,
            "controls": sorted(self._text.controls),
        }

    def _windows(self, ids: list[int]) -> list[Window]:
        """The document, cut where it is longer than a window."""
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return [Window(ids, ids.copy())]
        windows = [Window(ids[:limit], ids[:limit])]
        for begin in range(limit - self.stride, len(ids) - self.stride, limit - self.stride):
            window = ids[begin : begin + limit]
            windows.append(Window(window, [IGNORED] * self.stride + window[self.stride :]))
        return windows


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and behind every document."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    place = next(p for p in range(len(whole)) if whole[p : p + len(alone)] == alone)
    behind = whole[place + len(alone) :]
    if not behind and tokenizer.eos_token_id is None:
        raise UserError(
            "dataset: plain text needs an end token behind each document, and the tokenizer names "
            "none (eos_token). Set model.tokenizer to one that does, or add eos_token to its "
            "tokenizer_config.json."
        )
    return whole[:place], behind or [tokenizer.eos_token_id]
