"""Several replies side by side: greedy replies by transformers' continuous batching, `--batch`.

A request joins the batch between two tokens and leaves it when its reply ends, so a short reply
does not wait for a long one. transformers 5.23 draws with one set of settings and without seeds for
all requests of a manager, so replies here are greedy, and a request that asks for more is refused.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from luthier.errors import UserError
from luthier.infer import generation_config
from luthier.infer.api_objects import ApiError
from luthier.infer.llm import LLM
from luthier.infer.reply_writer import (
    MAX_CONTEXT,
    LoopQueue,
    ReplyWriter,
    count_fitting_tokens,
    read_tokens,
)
from luthier.infer.request_prompts import RequestPrompt

_PAGE = 256
"""Tokens of a block of the cache, as transformers has them."""
_PROBES = ("Hello!", "What is the capital of France?", "Berlin, 3. Oktober 1990: was geschah?")
_PROBE_TOKENS = 8
_PROBE_SECONDS = 300
_STOP_SECONDS = 3
_ALLOWED = ("max_new_tokens", "eos_token_id", "pad_token_id", "do_sample", "bos_token_id")
"""Settings of generation that leave a reply what greedy decoding makes of the model."""


class BatchWriter(ReplyWriter):
    """Writes up to `size` replies at a time."""

    def __init__(self, llm: LLM, seconds: float, size: int) -> None:
        """`size`: the replies that are written side by side.

        Raises UserError for a model whose replies would differ from those written one by one.
        """
        super().__init__(llm, seconds)
        self._is_closed = False
        self._manager = _start_manager(llm, size)
        try:
            _check_replies(llm, self._manager)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all replies with an error, and the thread in which the model writes."""
        super().close()
        if not self._is_closed:
            self._is_closed = True
            # Its thread is no daemon: left running, it would keep the process alive.
            self._manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)

    async def _tokens(
        self, prompt: RequestPrompt, config: Any, seed: int | None
    ) -> AsyncGenerator[int]:
        """Yield the ids of a reply as they come."""
        _refuse_drawing(prompt, config, seed)
        loop = asyncio.get_running_loop()
        tokens, name = LoopQueue(loop), uuid.uuid4().hex
        self._waiting.add(tokens)
        sent = 0

        def deliver(result: Any) -> None:
            nonlocal sent
            # Each result has all tokens so far.
            for token in result.generated_tokens[sent:]:
                tokens.put(token)
            sent = len(result.generated_tokens)
            if result.error is not None:
                tokens.put(RuntimeError(str(result.error)))
            elif result.is_finished():
                tokens.put(None)

        self._manager.register_result_handler(name, deliver)
        _add_request(self._manager, prompt.ids, config, name, streaming=True)
        try:
            async for token in read_tokens(tokens, self._seconds, loop.time() + self._seconds):
                yield token
        finally:
            self._manager.cancel_request(name)
            self._waiting.discard(tokens)


def check_batch_settings(settings: dict[str, Any]) -> None:
    """Raise UserError for settings of the command under which replies would not be greedy."""
    others = [name for name in settings if name not in _ALLOWED] or (
        ["do_sample"] if settings.get("do_sample") else []
    )
    if others:
        raise UserError(
            f"{others[0]}: with --batch all replies are greedy. Leave out one of the two."
        )


def _start_manager(llm: LLM, size: int) -> Any:
    """Return transformers' manager, running, with a cache for `size` replies as memory allows."""
    import torch
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = llm.model
    tokens = min(
        size * min(llm.context or MAX_CONTEXT, MAX_CONTEXT), count_fitting_tokens(model, 1)
    )
    config = llm.generation_config({"max_new_tokens": _PROBE_TOKENS})
    config.do_sample = False
    settings = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=max(size, tokens // _PAGE),
        max_batch_tokens=max(size, 512),
        max_requests_per_batch=size,
        auto_switch_to_flash=False,
    )
    try:
        with torch.inference_mode():
            manager = model.init_continuous_batching(
                generation_config=config, continuous_batching_config=settings
            )
        manager.start()
    except Exception as error:  # models of which transformers has no paged cache raise many kinds
        raise UserError(f"--batch: transformers cannot batch this model: {error}") from error
    return manager


def _add_request(
    manager: Any, ids: Sequence[int], config: Any, name: str, streaming: bool = False
) -> None:
    manager.add_request(
        list(ids),
        request_id=name,
        max_new_tokens=config.max_new_tokens,
        streaming=streaming,
        eos_token_id=generation_config.stop_token_ids(config),
    )


def _check_replies(llm: LLM, manager: Any) -> None:
    """Raise UserError unless replies side by side are those of the same prompts one by one."""
    import torch

    tokenizer = llm.tokenizer
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBES]
    config = llm.generation_config({"max_new_tokens": _PROBE_TOKENS})
    config.do_sample = False
    for number, ids in enumerate(prompts):
        _add_request(manager, ids, config, str(number))
    batched: dict[str, list[int]] = {}
    while len(batched) < len(prompts):
        result = manager.get_result(timeout=_PROBE_SECONDS)
        if result is None or result.error is not None:
            reason = "no reply came" if result is None else result.error
            raise UserError(f"--batch: transformers cannot batch this model: {reason}")
        if result.is_finished():
            batched[result.request_id] = result.generated_tokens
    for number, ids in enumerate(prompts):
        inputs = torch.tensor([ids], device=llm.model.device)
        with torch.inference_mode():
            alone = llm.model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config
            )
        if alone[0, len(ids) :].tolist() != batched[str(number)]:
            raise UserError(
                "--batch: this model writes other replies side by side than one by one. Leave "
                "--batch out."
            )


def _refuse_drawing(prompt: RequestPrompt, config: Any, seed: int | None) -> None:
    """Raise ApiError for what a manager does not do for a single request."""
    refused = {
        "temperature": bool(config.do_sample),
        "seed": seed is not None,
        "logit_bias": bool(config.sequence_bias),
        "messages": bool(prompt.images),
    }
    for name, is_refused in refused.items():
        if is_refused:
            text = "images are not read" if name == "messages" else "replies are greedy"
            raise ApiError(
                f"{name}: this server writes replies side by side (--batch), where {text}. Leave "
                "it out, or start luthier serve without --batch.",
                param=name,
            )
