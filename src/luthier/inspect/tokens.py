"""A sequence as tokens that a person can look at: their text, and what each is there for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from luthier.chat import ChatSequence

Kind = Literal["trained", "context", "control", "padding"]


@dataclass(frozen=True)
class Token:
    """One token: its id, its text, whether it trains, and the message field that it is from."""

    id: int
    text: str
    kind: Kind
    trained: bool
    role: str | None = None
    message: int | None = None
    field: str | None = None


def tokens_of(sequence: ChatSequence, tokenizer: Any) -> list[Token]:
    """Return the tokens of a sequence, each with its part in training and its origin.

    A control token is one that the vocabulary added to plain text; one that also trains, such as
    the stop token of a reply, is of kind `control` with `trained` set.
    """
    text_of = token_texts(tokenizer)
    controls = set(tokenizer.added_tokens_decoder)
    origins = _origins(sequence)
    return [
        Token(
            token, text_of(token), _kind(token in controls, label != -100), label != -100, *origin
        )
        for token, label, origin in zip(sequence.input_ids, sequence.labels, origins, strict=True)
    ]


def padded(rows: Sequence[list[Token]], pad_id: int, pad_text: str) -> list[list[Token]]:
    """Fill the rows up on the right to the longest, as a batch of them is in training."""
    width = max(map(len, rows))
    pad = Token(pad_id, pad_text, "padding", trained=False)
    return [row + [pad] * (width - len(row)) for row in rows]


def token_texts(tokenizer: Any) -> Any:
    """Return a function from a token id to its text as it stands inside a longer text.

    A token decoded alone loses the space that SentencePiece writes before a word, so each is
    decoded behind an anchor. A piece of a character is shown as its raw token.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = tokenizer.decode(anchor)

    @cache
    def text_of(token: int) -> str:
        text: str = tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
        text = text.removeprefix(prefix)
        return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text else text

    return text_of


def _kind(control: bool, trained: bool) -> Kind:
    if control:
        return "control"
    return "trained" if trained else "context"


def _origins(sequence: ChatSequence) -> list[tuple[str | None, int | None, str | None]]:
    found: list[tuple[str | None, int | None, str | None]] = [(None, None, None)]
    found *= len(sequence.input_ids)
    for segment in sequence.segments:
        origin = (segment.role, segment.message, segment.field)
        found[segment.start : segment.end] = [origin] * (segment.end - segment.start)
    return found
