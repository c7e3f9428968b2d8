"""One reply, token by token, while the model writes it."""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.infer.generation_config import stop_token_ids


def stream_tokens(model: Any, prompt: Sequence[int], config: Any, **more: Any) -> Iterator[int]:
    """Yield the ids of the reply to one prompt as they come, without the stop token.

    The model writes in a thread of its own. Where the reader leaves early (`close`, an error,
    Ctrl-C), the model stops at its next token, and it has stopped when this returns.
    """
    stopped = threading.Event()
    tokens: queue.Queue[int | BaseException | None] = queue.Queue()
    work = threading.Thread(
        target=_write, args=(model, prompt, config, more, tokens, stopped), daemon=True
    )
    stops = set(stop_token_ids(config))
    work.start()
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token not in stops:
                yield token
    finally:
        stopped.set()
        work.join()


def _write(
    model: Any,
    prompt: Sequence[int],
    config: Any,
    more: dict[str, Any],
    tokens: queue.Queue[int | BaseException | None],
    stopped: threading.Event,
) -> None:
    """Generate into the queue, which ends with None or with what went wrong."""
    import torch
    from transformers import StoppingCriteriaList

    ids = torch.tensor([list(prompt)], device=model.device)
    try:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_Tokens(tokens),
                stopping_criteria=StoppingCriteriaList([_stop_at(stopped)]),
                **more,
            )
        tokens.put(None)
    except BaseException as error:
        tokens.put(error)


def _stop_at(stopped: threading.Event) -> Any:
    """A stopping criterion that holds from the moment the event is set."""
    import torch

    def holds(input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    return holds


class _Tokens:
    """What transformers calls with the prompt and then with each token: a streamer."""

    def __init__(self, tokens: queue.Queue[int | BaseException | None]) -> None:
        self._tokens, self._is_prompt = tokens, True

    def put(self, value: Any) -> None:
        """Take the prompt, which is passed over, or a token."""
        if not self._is_prompt:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        """The model has ended; nothing is left to tell."""


_SIGNS = {code: "␦" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters, which could move the cursor or worse."""


def printable(text: str) -> str:
    """A model's text with signs for control characters."""
    return text.translate(_SIGNS)


# Text from tokens that come one by one: a piece at a time, never a part of a character.

_BROKEN = "�"
"""What a decoder writes for bytes that are no whole character."""


class TextStream:
    """Decodes a reply as it comes; the pieces together are what decoding it whole gives."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoders of a space before a word need what stands before it: two whole pieces are kept.
        self._before = self._said = 0

    def add(self, token: int) -> str:
        """The text that this token completes; empty where it ends within a character."""
        self._ids.append(token)
        piece = self._new()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._before, self._said = self._said, len(self._ids)
        return piece

    def rest(self) -> str:
        """What is left when the reply has ended, be it whole or not."""
        piece = self._new()
        self._before = self._said = len(self._ids)
        return piece

    def _new(self) -> str:
        """The text behind what was said."""
        emitted = self._text(self._ids[self._before : self._said])
        return self._text(self._ids[self._before :])[len(emitted) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
