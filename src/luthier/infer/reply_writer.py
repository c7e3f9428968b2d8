"""One reply at a time: a request's settings, its turn, and its reply piece by piece."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any

from luthier.chat import ParsedReply, ReplyDelta
from luthier.infer import generation_config
from luthier.infer.api_objects import ApiError
from luthier.infer.generate import bytes_per_row, free_memory, is_out_of_memory
from luthier.infer.llm import LLM
from luthier.infer.openai_replies import FinishReason, ReplyEnd
from luthier.infer.openai_requests import (
    ReplyRequest,
)
from luthier.infer.reply_messages import split_message
from luthier.infer.request_prompts import RequestPrompt, RequestReplyParser
from luthier.infer.stream import StopStrings, TextStream

_GREEDY_BELOW = 1e-4
"""The temperature below which sampling is greedy: in float32 the scores would overflow."""
_MEMORY_SHARE = 0.8
"""Of the free memory, what one prompt and its reply may take."""
MAX_CONTEXT = 32_768
"""The most tokens of prompt and reply for a model without a limit of its own (Mamba, Bloom)."""
_SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
                      "epsilon_cutoff", "eta_cutoff")  # fmt: skip


def merge_settings(settings: Mapping[str, Any], request: ReplyRequest) -> dict[str, Any]:
    """Return the settings of generation for a request: its own over those of the command."""
    merged = dict(settings)
    temperature, top_p = request.temperature, request.top_p
    if temperature is not None and temperature < _GREEDY_BELOW:
        merged = {key: value for key, value in merged.items() if key not in _SAMPLING_SETTINGS}
        merged["do_sample"] = False
    elif temperature is not None:
        merged |= {"do_sample": True, "temperature": temperature}
    # 1 cuts nothing off: clients send it with every request, and it asks for no sampling.
    if top_p is not None and (merged.get("do_sample") or (temperature is None and top_p < 1)):
        merged |= {"do_sample": True, "top_p": top_p}
    if request.biases:
        merged["sequence_bias"] = {(token,): bias for token, bias in request.biases.items()}
    if request.max_tokens_requested is not None:
        merged["max_new_tokens"] = request.max_tokens_requested
    return merged


def count_fitting_tokens(model: Any, prompt_tokens: int) -> int:
    """Return how many tokens of a reply the free memory holds behind a prompt."""
    # Models with a state instead of keys and values (Mamba) take the same memory for any length.
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        return MAX_CONTEXT
    free = int(free_memory(model)[0] * _MEMORY_SHARE)
    prompt = bytes_per_row(model, prompt_tokens, 0)
    return (free - prompt) // max(1, bytes_per_row(model, prompt_tokens, 1) - prompt)


class ReplyWriter:
    """Writes one reply at a time, in the order in which requests came."""

    def __init__(self, llm: LLM, seconds: float) -> None:
        """`seconds`: the longest time that a reply may take."""
        self._llm, self._seconds = llm, seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reply")
        self._waiting: set[LoopQueue] = set()

    def close(self) -> None:
        """End all replies with an error, because the server ends."""
        for tokens in self._waiting:
            tokens.put(ApiError("The server is shutting down.", code="shutting_down", status=503))

    async def write(
        self,
        prompt: RequestPrompt,
        config: Any,
        request: ReplyRequest,
        parser: RequestReplyParser | None,
    ) -> AsyncGenerator[ReplyDelta | ReplyEnd]:
        """Yield the reply to a prompt, and how it ended. Closing it stops the model.

        `parser`: what makes a message of it; None for a plain text. A reply that is not streamed
        comes in one piece for each field of its message.
        """
        text = TextStream(self._decode if parser is None else parser.decode)
        stops = StopStrings([*request.stops, *_as_list(config.stop_strings)])
        config.stop_strings = None
        stop_ids = set(generation_config.stop_token_ids(config))
        written, is_stopped = list[int](), False
        async with aclosing(self._tokens(prompt, config, request.random_seed)) as tokens:
            async for token in tokens:
                written.append(token)
                if is_stopped := token in stop_ids:
                    break
                for delta in _take(parser, stops.add(text.add(token))):
                    if parser is None or request.stream:
                        yield delta
                if is_stopped := stops.is_complete:
                    break
        rest = "" if stops.is_complete else stops.add(text.rest())
        last = _take(parser, rest + stops.rest())
        parsed: ParsedReply | None = None
        if parser is not None:
            # A stop string may end the text within a token.
            reply_ids = None if stops.is_complete else written
            # In a thread, because the message is rendered.
            message, ending = await asyncio.to_thread(parser.finish, reply_ids)
            last = [*last, *ending] if request.stream else list(split_message(message))
            parsed = message
        for delta in last:
            yield delta
        is_cut = not is_stopped and not stops.is_complete and len(written) >= config.max_new_tokens
        has_calls = parsed is not None and "tool_calls" in parsed.message
        finish: FinishReason = "length" if is_cut else "tool_calls" if has_calls else "stop"
        yield ReplyEnd(finish, len(prompt.ids), len(written), parsed.reason if parsed else None)

    def _decode(self, ids: list[int]) -> str:
        return str(self._llm.tokenizer.decode(ids, skip_special_tokens=True))

    async def _tokens(
        self, prompt: RequestPrompt, config: Any, seed: int | None
    ) -> AsyncGenerator[int]:
        """Yield the ids of a reply as they come, once it is its turn."""
        loop = asyncio.get_running_loop()
        tokens, stopped = LoopQueue(loop), threading.Event()
        self._waiting.add(tokens)
        self._thread.submit(self._write_tokens, prompt, config, tokens, stopped, seed)
        try:
            # The time that a reply may take begins with its turn.
            await tokens.get(None)
            async for token in read_tokens(tokens, self._seconds, loop.time() + self._seconds):
                yield token
        finally:
            stopped.set()
            self._waiting.discard(tokens)

    def _write_tokens(
        self,
        prompt: RequestPrompt,
        config: Any,
        tokens: "LoopQueue",
        stopped: threading.Event,
        seed: int | None,
    ) -> None:
        """Write a reply when it is its turn: first `_ITS_TURN`, then what `LLM.write_tokens` has.

        This is the one thread in which the model writes: while it is at a last token for a client
        that has left, the next reply waits.
        """
        if stopped.is_set():
            return
        tokens.put(_ITS_TURN)
        try:
            self._llm.write_tokens(prompt.ids, config, tokens, stopped, seed, prompt.images)
        except BaseException as error:
            tokens.put(error)


_ITS_TURN = -1


def _writing_error(error: BaseException) -> BaseException:
    """Return the client's words for an error of the model, or the error itself."""
    if is_out_of_memory(error):
        text = "The memory was full before the reply was written. Try a shorter one."
        return ApiError(text, code="out_of_memory", status=503)
    return error


def _take(parser: RequestReplyParser | None, text: str) -> list[ReplyDelta]:
    """Return what a piece of text settles; all of it is content where there is no parser."""
    if parser is not None:
        return parser.add(text)
    return [ReplyDelta("content", text)] if text else []


def _as_list(stops: Any) -> list[str]:
    return [stops] if isinstance(stops, str) else list(stops or ())


class LoopQueue:
    """A queue that another thread fills and a coroutine reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[int | BaseException | None] = asyncio.Queue()

    def put(self, token: int | BaseException | None, /) -> None:
        """Put an item in, from a thread."""
        # A loop that is closed has no reader: the server has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, token)

    async def get(self, seconds: float | None) -> int | None:
        """Return the next id, None at the end; raises the error that ended the reply.

        TimeoutError where no id comes in time, or the time is over.
        """
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        # No wait_for: in Python 3.11 it may swallow the cancellation that a client's leaving is.
        async with asyncio.timeout(seconds):
            token = await self._queue.get()
        if isinstance(token, BaseException):
            raise _writing_error(token)
        return token


async def read_tokens(tokens: LoopQueue, seconds: float, deadline: float) -> AsyncGenerator[int]:
    """Yield the ids of a reply until its end; ApiError where it takes longer than `seconds`.

    `deadline` is a time of the running loop.
    """
    loop = asyncio.get_running_loop()
    try:
        while (token := await tokens.get(deadline - loop.time())) is not None:
            yield token
    except TimeoutError:
        raise ApiError(
            f"The reply was not complete within {seconds} s, and was stopped.",
            code="timeout",
            status=504,
        ) from None
