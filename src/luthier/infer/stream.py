"""Stream one reply: its tokens while the model writes them, and the text they complete."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


def stream_tokens(model: Any, prompt: Sequence[int], config: Any, **more: Any) -> Iterator[int]:
    """Yield the ids of the reply to one prompt as they come, the stop token last if there is one.

    The model writes in a thread of its own. Where the reader leaves early (`close`, an error,
    Ctrl-C), the model stops at its next token, and it has stopped when this returns.
    """
    # model.generate calls back and cannot be iterated, so it runs in a thread and fills a queue.
    stopped = threading.Event()
    tokens: queue.Queue[int | BaseException | None] = queue.Queue()
    # A daemon, so that a second Ctrl-C need not wait for a reply of many tokens.
    work = threading.Thread(
        target=write_tokens, args=(model, prompt, config, tokens, stopped, more), daemon=True
    )
    work.start()
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                # Raised in the reader's thread: there the caller can catch it.
                raise token
            yield token
    finally:
        # Joined in any case: two generations at once would share the model's cache and hooks.
        stopped.set()
        work.join()


class TokenSink(Protocol):
    """Takes the ids of a reply as they come, stop token and all; None or an error is the end."""

    def put(self, token: int | BaseException | None, /) -> None:
        """Take an id, or the end."""


def write_tokens(
    model: Any,
    prompt: Sequence[int],
    config: Any,
    tokens: TokenSink,
    stopped: threading.Event,
    more: dict[str, Any],
) -> None:
    """Generate into `tokens`, in this thread, until the reply ends or `stopped` is set."""
    import torch
    from transformers import StoppingCriteriaList

    ids = torch.tensor([list(prompt)], device=model.device)
    try:
        # Inference mode belongs to a thread: that of the reader does not hold in this one.
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
    # KeyboardInterrupt and SystemExit too: a reader without an end would wait forever.
    except BaseException as error:
        tokens.put(error)


def _stop_at(stopped: threading.Event) -> Any:
    """Return a stopping criterion that holds from the moment the event is set."""
    import torch

    def holds(input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    return holds


class _Tokens:
    """What transformers calls with the prompt and then with each token: a streamer."""

    def __init__(self, tokens: TokenSink) -> None:
        self._tokens, self._is_prompt = tokens, True

    def put(self, value: Any) -> None:
        """Take the prompt, which is passed over, or a token."""
        # transformers puts the whole prompt first, as one tensor, and then each new token.
        if not self._is_prompt:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        """The model has ended; nothing is left to tell."""


# A token may hold a part of a character (bytes of UTF-8), so text is held back until it is whole.

_BROKEN = "�"
"""What a decoder writes for bytes that are no whole character."""


class TextStream:
    """Decodes a reply as it comes; the pieces together are what decoding it whole gives."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode`: gives the text of some of the reply's ids."""
        self._decode = decode
        self._ids: list[int] = []
        # SentencePiece decoders drop the space in front of the first token, so the piece before is
        # decoded with each new one, and its text cut off again.
        self._before = self._said = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty where it ends within a character."""
        self._ids.append(token)
        piece = self._new()
        # The replacement character at the end means that bytes are still missing; within a text the
        # model may have written it.
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._before, self._said = self._said, len(self._ids)
        return piece

    def rest(self) -> str:
        """Return what is left when the reply has ended, even a part of a character."""
        piece = self._new()
        self._before = self._said = len(self._ids)
        return piece

    def _new(self) -> str:
        """Return the text behind what was returned already."""
        emitted = self._decode(self._ids[self._before : self._said])
        return self._decode(self._ids[self._before :])[len(emitted) :]


class StopStrings:
    """Ends a text before the first of some strings; text that may begin one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.is_complete = False
        """Whether one of them came: the text has ended in front of it."""

    def add(self, text: str) -> str:
        """Return what can be told of the text so far and was not yet."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        self.is_complete = bool(starts)
        end = min(starts) if starts else len(self._held) - self._possible_start()
        text, self._held = self._held[:end], self._held[end:]
        return text

    def rest(self) -> str:
        """Return what was held back of a text that has ended by itself."""
        rest, self._held = ("" if self.is_complete else self._held), ""
        return rest

    def _possible_start(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        sizes = (
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)
