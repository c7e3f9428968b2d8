"""Prompts of the server's requests, as token ids: those of the training, or an error in words."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from luthier.chat import ChatEncoder, ChatError, ParsedReply, ReplyDelta, ReplyStream
from luthier.chat.encoder import ChatPromptEncoder
from luthier.chat.template import TEMPLATE_INPUTS
from luthier.data.encoders.plain_text import PlainTextTokenizer, measure_frame
from luthier.errors import UserError
from luthier.infer.api_objects import ApiError
from luthier.infer.llm import LLM
from luthier.infer.openai_requests import (
    EFFORT,
    ChatCompletionRequest,
    CompletionRequest,
    ConversationRequest,
)
from luthier.infer.prompt_images import PromptImage, list_prompt_images
from luthier.infer.request_images import ImageLimits, RequestImages

_MOST_ENCODERS = 8
"""Encoders for variables of requests that are remembered: each compiles its template."""
_MAX_VARIABLE_CHARS = 4096
"""The longest variables of a request, as JSON."""


class RequestPrompt(NamedTuple):
    """A request's prompt."""

    ids: list[int]
    messages: list[dict[str, Any]]
    """Its conversation, as rows of a dataset have it; none for a plain text."""
    images: list[PromptImage]
    """The images of these, in their order."""


class RequestPrompts:
    """Makes the prompt of a request as the training did; text never becomes a control token."""

    def __init__(self, llm: LLM, context: int, images: ImageLimits | None = None) -> None:
        """`context`: the most tokens of prompt and reply together."""
        self._llm, self._context = llm, context
        self._images = RequestImages(images or ImageLimits())
        self._text = PlainTextTokenizer(llm.tokenizer)
        self._start = list(measure_frame(llm.tokenizer).ids_around[0])
        self._encoders: OrderedDict[str, ChatEncoder] = OrderedDict()
        # Encoders keep what they have seen, and requests are encoded in several threads. Making an
        # encoder takes a second, in which requests without variables need not wait.
        self._lock, self._encoders_lock = threading.Lock(), threading.Lock()

    def make_parser(
        self, request: ConversationRequest, messages: list[dict[str, Any]]
    ) -> "RequestReplyParser":
        """Return what makes a message of the reply to a request; `messages`: of its prompt."""
        with self._encoders_lock if request.variables else nullcontext():
            encoder = self._encoder(request)
        with self._lock:
            stream = encoder.stream_parser(messages, request.tool_rows())
        return RequestReplyParser(encoder, stream, self._lock)

    def encode(self, request: ConversationRequest | CompletionRequest) -> RequestPrompt:
        """Return a request's prompt; raises ApiError for one that makes none."""
        field = request.prompt_field
        messages: list[dict[str, Any]] = []
        if isinstance(request, CompletionRequest):
            ids = self._encode_text(request.prompt)
        else:
            messages = self._open_messages(request)
            ids = self._encode_conversation(request, messages)
        if not ids:
            raise ApiError(f"{field}: is empty, so there is nothing to begin with.", param=field)
        if len(ids) >= self._context:
            raise ApiError(
                f"{field}: the prompt has {len(ids):,} tokens, and the model reads "
                f"{self._context:,} with its reply. Shorten it.",
                param=field,
                code="context_length_exceeded",
            )
        return RequestPrompt(ids, messages, list_prompt_images(messages))

    def _encode_text(self, text: str) -> list[int]:
        try:
            with self._lock:
                (ids,) = self._text.encode([text])
        except ChatError as error:
            raise ApiError(f"prompt: {error.text}.", param="prompt") from None
        return [*self._start, *ids]

    def _open_messages(self, request: ConversationRequest) -> list[dict[str, Any]]:
        """Return the conversation of a request, whose images can be opened."""
        if not self._llm.has_template:
            raise ApiError("This model has no chat template. Ask it at /v1/completions.")
        messages = request.message_rows()
        # A model of text alone says so when the message is read.
        if self._llm.reads_images:
            is_chat = isinstance(request, ChatCompletionRequest)
            self._images.open(messages, request.prompt_field, is_chat)
        return messages

    def _encode_conversation(
        self, request: ConversationRequest, messages: list[dict[str, Any]]
    ) -> list[int]:
        field, tools = request.prompt_field, request.tool_rows()
        self._check_keys(tools)
        if messages[-1]["role"] == "assistant":
            raise ApiError(
                f"{field}: the conversation ends with a reply, so there is nothing to answer.",
                param=field,
            )
        try:
            with self._encoders_lock if request.variables else nullcontext():
                encoder = self._encoder(request)
            with self._lock:
                return _prompt_ids(encoder, messages, tools)
        except ChatError as error:
            raise _prompt_error(error, request) from None
        except UserError as error:
            # The model's processor cannot be had, so it reads no images here.
            raise ApiError(f"{field}: {error}", param=field) from None

    def _encoder(self, request: ConversationRequest) -> ChatEncoder:
        """Return the training's encoder, with a request's variables over the training's."""
        variables = request.variables
        if not variables:
            return self._llm.encoder
        self._check_variables(variables)
        key = json.dumps(variables, sort_keys=True)
        if len(key) > _MAX_VARIABLE_CHARS:
            text = f"chat_template_kwargs: is longer than {_MAX_VARIABLE_CHARS:,} characters."
            raise ApiError(text, param="chat_template_kwargs")
        if key not in self._encoders:
            # Variables are part of what an encoder checks when it is made.
            encoder = self._llm.encoder
            encoder = encoder.with_settings({"variables": encoder.variables | variables})
            # Those of the training were looked at there.
            _check_read(encoder, request)
            self._encoders[key] = encoder
            if len(self._encoders) > _MOST_ENCODERS:
                self._encoders.popitem(last=False)
        self._encoders.move_to_end(key)
        return self._encoders[key]

    def _check_variables(self, variables: dict[str, Any]) -> None:
        """Refuse variables that the template has from elsewhere, and control tokens in values.

        A variable is the template's own text, in which control tokens are control tokens.
        """
        field = "chat_template_kwargs"
        fixed = {*TEMPLATE_INPUTS, *self._llm.tokenizer.special_tokens_map}
        for name in variables:
            if name in fixed or not name.isidentifier():
                raise ApiError(f"{field}: a request cannot set {name[:80]!r}.", param=field)
        if self._has_control_tokens(_texts(variables)):
            raise ApiError(f"{field}: a value holds a control token.", param=field)

    def _check_keys(self, tools: list[dict[str, Any]] | None) -> None:
        """Refuse control tokens in the names of a tool's fields, which are not message text."""
        if tools and self._has_control_tokens(_keys(tools)):
            raise ApiError("tools: a name holds a control token.", param="tools")

    def _has_control_tokens(self, texts: Iterator[str]) -> bool:
        return self._llm.encoder.holds_control_tokens(texts)


class RequestReplyParser:
    """Takes one reply apart while it comes, and makes a message of it."""

    def __init__(self, encoder: ChatEncoder, stream: ReplyStream, lock: threading.Lock) -> None:
        """`lock`: of the encoder, which replies of other requests use too."""
        self.decode, self._stream, self._lock = encoder.decode_reply, stream, lock

    def add(self, text: str) -> list[ReplyDelta]:
        """Return what a piece of text settles."""
        return self._stream.add(text)

    def finish(self, ids: Sequence[int] | None) -> tuple[ParsedReply, list[ReplyDelta]]:
        """Return the reply as a message, and what is left of its pieces.

        `ids`: all that the model wrote; None for a text that a stop string ended.
        """
        with self._lock:
            deltas = self._stream.finish(ids)
        assert self._stream.reply is not None
        return self._stream.reply, deltas


def _check_read(encoder: ChatEncoder, request: ConversationRequest) -> None:
    """Refuse what the model's chat template never reads: it would change nothing."""
    problem = encoder.find_unread_variables(request.variables)
    if problem is not None:
        field = "chat_template_kwargs" if request.chat_template_kwargs else EFFORT
        raise ApiError(f"{field}: {problem}.", param=field)


def _prompt_ids(
    encoder: ChatEncoder, messages: list[dict[str, Any]], tools: list | None
) -> list[int]:
    ids, _, lost = ChatPromptEncoder(encoder).encode(messages, tools)
    # What a training may leave out (chat.on_lost=keep), a reply to it must not.
    if lost is not None:
        raise lost
    return ids


def _prompt_error(error: ChatError, request: ConversationRequest) -> ApiError:
    """Return what is wrong with a conversation in the words of the API."""
    field = request.prompt_field
    place = "tools" if error.field == "tools" else field
    # Several items of a response's input make one message, so its number would mislead there.
    if error.message is not None and isinstance(request, ChatCompletionRequest):
        place = f"{field}[{error.message}]"
        place += f".{error.field}" if error.field else ""
    text = error.text.replace("refuses the row", "refuses the conversation")
    if error.reason == "content is not text":
        # What follows is about training.
        text = text.replace("; use a vision-language model, or remove the image", "")
    if error.reason == "unknown role":
        # What follows is about a setting of the training.
        text = text.partition(" If the chat template")[0].rstrip(".")
    if error.reason == "lost":
        is_tools = error.field == "tools"
        names = ("the tools", "them") if is_tools else ("this text", "it")
        text = f"the model's chat template does not show {names[0]}, so it would not see {names[1]}"
    return ApiError(f"{place}: {text}.", param=place)


def _keys(value: Any) -> Iterator[str]:
    """Yield every key in a JSON value."""
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from _keys(item)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text and key in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        if isinstance(value, dict):
            yield from value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
