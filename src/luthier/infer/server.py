"""An OpenAI-compatible server for one loaded model, with the prompts of its training.

A request sets what its API names and nothing else (`luthier.infer.openai_requests`), within limits:
one reply is written at a time, a bounded number of requests waits, and a client that leaves stops
its reply. Errors are OpenAI's error object; nothing that a client sends ends in a traceback.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.chat import ReplyDelta
from luthier.errors import UserError
from luthier.infer import generation_config
from luthier.infer.api_objects import ApiError
from luthier.infer.llm import LLM
from luthier.infer.openai_replies import (
    STREAM_END,
    ChatCompletionForm,
    CompletionForm,
    ReplyEnd,
    ReplyForm,
    ResponseForm,
)
from luthier.infer.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ConversationRequest,
    ReplyRequest,
    ResponseRequest,
    parse_request,
)
from luthier.infer.reply_writer import (
    MAX_CONTEXT,
    ReplyWriter,
    count_fitting_tokens,
    merge_settings,
)
from luthier.infer.request_access import KEY_VARIABLE, HostCheck, KeyCheck
from luthier.infer.request_images import ImageLimits
from luthier.infer.request_prompts import RequestPrompts

if TYPE_CHECKING:
    import uvicorn

MAX_NEW_TOKENS = 1024
"""The longest reply where neither the request nor the command says otherwise, in tokens."""
BODY_BYTES, BODY_BYTES_WITH_IMAGES = 4 * 2**20, 32 * 2**20
"""The largest request to a model of text, and to one that reads images."""
_BODY_SECONDS = 30.0
"""How long a client may take to send its request."""
_SHUTDOWN_SECONDS = 3
"""How long a server that is told to end waits for replies."""
_ONE_REPLY_SETTINGS = ("num_beams", "num_return_sequences")


@dataclass(frozen=True)
class ServerLimits:
    """What requests may take; the flags of `luthier serve`."""

    waiting: int = 32
    """Requests that wait while a reply is written; more are refused with 503."""
    batch: int = 1
    """Replies that are written side by side."""
    reply_seconds: int = 600
    """The longest time that one reply may take."""
    body_bytes: int | None = None
    """The largest request; None for `BODY_BYTES`, or more where the model reads images."""
    images: ImageLimits = field(default_factory=ImageLimits)
    """What the images of a request may take."""
    hosts: tuple[str, ...] = ()
    """Names in a request's `Host` header that are answered, besides those of this machine."""
    origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may ask, such as `http://localhost:3000`; `*` for any."""


def make_server(
    llm: LLM,
    name: str,
    host: str,
    port: int,
    settings: Mapping[str, Any],
    limits: ServerLimits | None = None,
) -> "uvicorn.Server":
    """Return a server ready to run; `settings` of generation hold for requests without any."""
    import uvicorn

    limits = limits or ServerLimits()
    model_server = ModelServer(llm, name, settings, limits)

    class ReplyServer(uvicorn.Server):
        """A server that ends the replies that are being written when it is told to end."""

        def run(self, sockets: Any = None) -> None:
            """Serve until told to end; a server that cannot begin ends its threads, too."""
            try:
                super().run(sockets)
            finally:
                model_server.close()

        async def shutdown(self, sockets: Any = None) -> None:
            """End all replies and connections."""
            model_server.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(model_server, host, limits, os.environ.get(KEY_VARIABLE)),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    # A server object and no uvicorn.run, so that a caller can stop it from another thread.
    return ReplyServer(config)


def make_app(
    server: "ModelServer", host: str, limits: ServerLimits, key: str | None = None
) -> ASGIApp:
    """Return the application behind the server.

    `host` is what it listens at, `key` what requests to `/v1` must send; None for no key.
    """
    routes = [
        Route("/", server.describe, methods=["GET"]),
        Route("/health", _health, methods=["GET"]),
        Route("/v1/models", server.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.show_model, methods=["GET"]),
        *(Route(path, server.route(*types), methods=["POST"]) for path, types in _FORMS.items()),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _answer_api_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_internal_error,
        },
    )
    # A redirect would be to whatever address the client names.
    app.router.redirect_slashes = False
    checked: ASGIApp = KeyCheck(app, key) if key else app
    if limits.origins:
        checked = CORSMiddleware(
            checked,
            allow_origins=limits.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
        )
    return HostCheck(checked, host, limits.hosts)


_FORMS: Mapping[str, tuple[type[ReplyRequest], Callable[..., ReplyForm]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, ChatCompletionForm),
    "/v1/completions": (CompletionRequest, CompletionForm),
    "/v1/responses": (ResponseRequest, ResponseForm),
}
"""The routes that write replies, what they read, and the form of their replies."""


class ModelServer:
    """Answers requests with one loaded model."""

    def __init__(
        self, llm: LLM, name: str, settings: Mapping[str, Any], limits: ServerLimits
    ) -> None:
        """`name`: what requests call the model. UserError for settings that it cannot follow."""
        self._llm, self._name, self._limits = llm, name, limits
        self._settings = check_server_settings(settings)
        self._context = llm.context or MAX_CONTEXT
        self._prompts = RequestPrompts(llm, self._context, limits.images)
        default_bytes = BODY_BYTES_WITH_IMAGES if llm.reads_images else BODY_BYTES
        self._body_bytes = limits.body_bytes or default_bytes
        self._writer = make_writer(llm, limits)
        self._open_requests = 0

    def close(self) -> None:
        """End all replies with an error."""
        self._writer.close()

    async def describe(self, _: Request) -> Response:
        """Return what there is to ask."""
        return JSONResponse({"model": self._name, "routes": ["/v1/models", "/health", *_FORMS]})

    async def list_models(self, _: Request) -> Response:
        """Return the one model, as the API lists it."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        """Return the model of this name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def route(
        self, request_class: type[ReplyRequest], form_class: Callable[..., ReplyForm]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers a route: a request of one class with a reply of one form."""

        async def answer(request: Request) -> Response:
            with self._counted():
                _check_content_type(request)
                body = await _read_body(request, self._body_bytes)
                reply_request = parse_request(request_class, _parse_json(body))
                self._check_model(reply_request.model)
            return ReplyResponse(
                self._reply,
                reply_request,
                form_class(reply_request, reply_request.model or self._name),
            )

        return answer

    async def _reply(self, request: ReplyRequest) -> AsyncGenerator[ReplyDelta | ReplyEnd]:
        """Yield a request's reply, and how it ended; raises ApiError before the first of these."""
        assert isinstance(request, ConversationRequest | CompletionRequest)
        with self._counted():
            # In a thread: encoding a long conversation must not hold up other requests.
            prompt = await asyncio.to_thread(self._prompts.encode, request)
            config = self._generation_config(request, len(prompt.ids))
            parser = (
                await asyncio.to_thread(self._prompts.make_parser, request, prompt.messages)
                if isinstance(request, ConversationRequest)
                else None
            )
            async with aclosing(self._writer.write(prompt, config, request, parser)) as deltas:
                async for delta in deltas:
                    yield delta

    def _generation_config(self, request: ReplyRequest, prompt_tokens: int) -> Any:
        """Return the `GenerationConfig` of a request, whose reply fits the context and memory."""
        settings = merge_settings(self._settings, request)
        self._check_biases(request)
        room = min(settings["max_new_tokens"], self._context - prompt_tokens)
        fitting = count_fitting_tokens(self._llm.model, prompt_tokens)
        if fitting < 1:
            raise ApiError(
                f"{request.prompt_field}: a prompt of {prompt_tokens:,} tokens does not fit into "
                "the memory that is free. Shorten it.",
                param=request.prompt_field,
            )
        return self._llm.generation_config(settings | {"max_new_tokens": min(room, fitting)})

    def _check_biases(self, request: ReplyRequest) -> None:
        vocabulary = self._llm.model.get_output_embeddings().weight.shape[0]
        for token in request.biases:
            if token >= vocabulary:
                text = f"logit_bias: {token} is no token: the model has {vocabulary:,}."
                raise ApiError(text, param="logit_bias")

    def _model(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "luthier"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            text = f"model: there is no model of this name. This server has `{self._name}`."
            raise ApiError(text, param="model", code="model_not_found", status=404)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request within the block; raises ApiError where too many wait."""
        batch = self._limits.batch
        if self._open_requests >= self._limits.waiting + batch:
            at_a_time = "one reply is" if batch == 1 else f"{batch} replies are"
            text = (
                f"The server is busy: {self._open_requests} requests are being answered or wait, "
                f"{at_a_time} written at a time. Try again later."
            )
            raise ApiError(text, code="overloaded", status=503)
        self._open_requests += 1
        try:
            yield
        finally:
            self._open_requests -= 1


def make_writer(llm: LLM, limits: ServerLimits) -> ReplyWriter:
    """Return what writes replies, one at a time or side by side."""
    if limits.batch == 1:
        return ReplyWriter(llm, limits.reply_seconds)
    from luthier.infer.batch_writer import BatchWriter

    return BatchWriter(llm, limits.reply_seconds, limits.batch)


def check_server_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the command; UserError for those that a server cannot follow."""
    checked = generation_config.check_generation_settings(settings)
    for name in _ONE_REPLY_SETTINGS:
        if checked.get(name) not in (None, 1):
            raise UserError(f"{name}={checked[name]}: the server writes one reply; remove it.")
    checked.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    return checked


class ReplyResponse(Response):
    """A reply on its way to a client, whole or as a stream; where the client leaves, it stops."""

    def __init__(
        self,
        write: Callable[[ReplyRequest], AsyncGenerator[ReplyDelta | ReplyEnd]],
        request: ReplyRequest,
        form: ReplyForm,
    ) -> None:
        self._write, self._request, self._form = write, request, form
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply; this is the interface of ASGI."""
        if self._request.stream:
            sending: Coroutine[Any, Any, None] = self._send_stream(send)
        else:
            sending = self._send_whole(scope, receive, send)
        await run_while_connected(receive, sending)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._write(self._request)) as deltas:
            async for delta in deltas:
                if isinstance(delta, ReplyEnd):
                    body = self._form.body(delta)
                else:
                    self._form.add(delta)
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        """Send events; an error before the first piece is a status, and later an event."""
        is_started = False
        try:
            async with aclosing(self._write(self._request)) as deltas:
                async for delta in deltas:
                    events = [] if is_started else self._form.start()
                    if isinstance(delta, ReplyEnd):
                        events += [*self._form.end(delta), STREAM_END]
                    else:
                        events += self._form.add(delta)
                    if not is_started:
                        await send(_STREAM_START)
                        is_started = True
                    await send(_stream_part("".join(events)))
        except ApiError as error:
            if not is_started:
                raise
            await send(_stream_part("".join([*self._form.error(error), STREAM_END])))
        except Exception:
            if is_started:
                failure = ApiError(_INTERNAL, code="internal_error", status=500)
                await send(_stream_part("".join([*self._form.error(failure), STREAM_END])))
            raise
        finally:
            if is_started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}


def _stream_part(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run until the work is done or the client has left; then the work is cancelled."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request) -> None:
    # A web page can send other types to any address without asking it first (CORS).
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError("Send JSON, with the header Content-Type: application/json.")


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body; raises ApiError for one that is too large, or too slow."""
    too_large = ApiError(f"The request is larger than {limit:,} bytes.", status=413)
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        text = f"The request was not complete after {_BODY_SECONDS:.0f} seconds."
        raise ApiError(text, status=408) from None
    return bytes(body)


def _parse_json(body: bytes) -> Any:
    # Stricter than Python's: no NaN, no lone surrogates, no more than 200 levels.
    from pydantic_core import from_json

    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"The body is not valid JSON: {error}.") from None


_INTERNAL = "The server failed. Its log says how."


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


def _error_response(error: ApiError) -> Response:
    # OpenAI's clients send a request again that failed: not one that takes as long a second time.
    headers = {"x-should-retry": "false"} if error.status in (500, 504) else {}
    if error.status == 503:
        headers["retry-after"] = "1"
    return JSONResponse(error.body(), error.status, headers)


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "There is no such route.", 405: "This route takes another method."}
    text = texts.get(error.status_code, f"{error.detail}.")
    text += f" Routes: {', '.join(_FORMS)}, /v1/models and /health."
    return JSONResponse(ApiError(text, status=error.status_code).body(), error.status_code)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    """Answer a client that left while it was sending; nobody reads it."""
    return Response(status_code=400)


async def _answer_internal_error(_: Request, __: Exception) -> Response:
    return _error_response(ApiError(_INTERNAL, code="internal_error", status=500))
