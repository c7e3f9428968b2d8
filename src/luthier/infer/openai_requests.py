"""What a client may ask of the server: the requests of OpenAI's API, field by field.

A field is read, has no effect on a reply here and is passed over, or is refused in words: nothing
that a client sends is left out in silence. Source: https://platform.openai.com/docs/api-reference.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)

from luthier.errors import nearest_option
from luthier.infer.api_objects import ApiError, ApiObject, FieldError, is_finite
from luthier.infer.message_content import Content, join_parts, read_content

MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
"""The longest stop string, in characters."""
MAX_LOGIT_BIASES = 1024
MAX_VARIABLES = 32
MAX_TEMPERATURE = 10.0
HARMLESS: Mapping[str, type] = {
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
}
"""Fields that say nothing about the reply, and their types: they are taken and passed over."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": (),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}
"""Fields that this server does not follow, and the values that ask for what it does anyway."""

_ONE_REPLY = "a request gets one reply; send it again, with another seed, for another one"
_NO_PROBABILITIES = "this server returns no probabilities of tokens"
_NO_PENALTY = (
    "this server has another penalty, for all requests: luthier serve RUN repetition_penalty=1.1"
)
REASONS: Mapping[str, str] = {
    "n": _ONE_REPLY,
    "best_of": _ONE_REPLY,
    "logprobs": _NO_PROBABILITIES,
    "top_logprobs": _NO_PROBABILITIES,
    "presence_penalty": _NO_PENALTY,
    "frequency_penalty": _NO_PENALTY,
    "response_format": "replies are not constrained to a form; ask for it in the messages",
}
"""Why a field is not followed, and what to do instead."""

_RESPONSES_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "text": ({"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}, {}),
    "parallel_tool_calls": (True,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "context_management": (),
}
_MESSAGE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "refusal": (), "audio": (), "function_call": (), "annotations": ([],), "phase": (),
}  # fmt: skip
"""What clients send back with a reply that they got before."""
_ITEM_HARMLESS: Mapping[str, type] = {"id": str, "status": str}


class FunctionCall(ApiObject):
    """The name and the arguments of a call, these as JSON in a text."""

    name: str
    arguments: str


class MessageToolCall(ApiObject):
    """A call that an earlier reply made."""

    neutral: ClassVar = {"index": tuple(range(MAX_TOOLS))}
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiObject):
    """A message of a conversation."""

    neutral = _MESSAGE_NEUTRAL
    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    _content = field_validator("content", mode="before")(read_content)

    def as_row(self) -> dict[str, Any]:
        """Return the message as rows of a dataset have it."""
        return self.model_dump(exclude_none=True)


class FunctionDefinition(ApiObject):
    """What a function is called, does and takes."""

    # Agent frameworks set it with each tool, and check the arguments of a call themselves; a reply
    # is not constrained to the schema here.
    harmless: ClassVar = {"strict": bool}
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(ApiObject):
    """A tool of chat completions."""

    type: Literal["function"]
    function: FunctionDefinition

    def as_row(self) -> dict[str, Any]:
        """Return the tool as rows of a dataset have it."""
        return self.model_dump(exclude_none=True)


class ResponseTool(FunctionDefinition):
    """A tool of responses: the same without an object around the function."""

    type: Literal["function"]

    def as_row(self) -> dict[str, Any]:
        """Return the tool as rows of a dataset have it."""
        function = self.model_dump(exclude_none=True, exclude={"type"})
        return {"type": "function", "function": function}


class StreamOptions(ApiObject):
    """Whether a stream ends with the counts of tokens."""

    harmless: ClassVar = {"include_obfuscation": bool}
    include_usage: bool | None = None


_ONE_STOP = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ReplyRequest(ApiObject):
    """What all requests for a reply have in common."""

    harmless = HARMLESS
    prompt_field: ClassVar[str]
    """The field with the prompt, for errors about it."""
    limit_fields: ClassVar[tuple[str, ...]]
    """The fields that bound the reply, the first that is set counts."""
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def max_tokens_requested(self) -> int | None:
        """The longest reply that the client wants, in tokens; None where it does not say."""
        values = [getattr(self, name) for name in self.limit_fields]
        return next((value for value in values if value is not None), None)

    @property
    def stops(self) -> list[str]:
        """The texts that end a reply."""
        return getattr(self, "stop", None) or []

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the scores of tokens, by their ids."""
        biases = getattr(self, "logit_bias", None) or {}
        return {int(name): bias for name, bias in biases.items()}

    @property
    def random_seed(self) -> int | None:
        """The seed of the drawing; None for any."""
        return getattr(self, "seed", None)


class _CompletionFields(ReplyRequest):
    """What the two routes for completions have and responses have not."""

    neutral = NEUTRAL
    reasons = REASONS
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[_ONE_STOP], Field(max_length=MAX_STOP_STRINGS)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


class CompletionRequest(_CompletionFields):
    """A request to /v1/completions: a text to go on with."""

    prompt_field = "prompt"
    limit_fields = ("max_tokens",)
    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _single(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            return prompt[0]
        if not isinstance(prompt, str):
            raise ValueError("must be one text: this server takes no token ids and no batches")
        return prompt


EFFORT = "reasoning_effort"
"""The variable of a chat template that a request's effort sets, as in vLLM."""
_Effort = Annotated[str, Field(min_length=1, max_length=80)]
_Variables = Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)]
_ToolChoice = Literal["auto", "none"]


class ConversationRequest(ReplyRequest):
    """What the two routes for conversations have in common."""

    chat_template_kwargs: _Variables | None = None
    tool_choice: _ToolChoice | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _free_choice(cls, choice: Any) -> Any:
        if choice not in (None, "auto", "none"):
            raise ValueError('must be "auto" or "none": a model cannot be made to call a tool')
        return choice

    @property
    def effort(self) -> str | None:
        """How much the model is to think, which is a variable of some chat templates."""
        raise NotImplementedError

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the chat template that the request sets."""
        effort = {} if self.effort is None else {EFFORT: self.effort}
        return effort | (self.chat_template_kwargs or {})

    def tool_rows(self) -> list[dict[str, Any]] | None:
        """Return the tools as rows of a dataset have them; None for no tools."""
        tools = getattr(self, "tools", None)
        # `none`: a model that does not know of a tool does not call it.
        return [tool.as_row() for tool in tools] if tools and self.tool_choice != "none" else None

    def message_rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows of a dataset have it."""
        raise NotImplementedError


class ChatCompletionRequest(_CompletionFields, ConversationRequest):
    """A request to /v1/chat/completions."""

    prompt_field = "messages"
    limit_fields = ("max_completion_tokens", "max_tokens")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: _Effort | None = None

    @property
    def effort(self) -> str | None:
        """How much the model is to think."""
        return self.reasoning_effort

    def message_rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows of a dataset have it."""
        return [message.as_row() for message in self.messages]


class MessageItem(ApiObject):
    """An item of a response's input: a message."""

    harmless = _ITEM_HARMLESS
    neutral: ClassVar = {"phase": ()}
    type: Literal["message"] = "message"
    role: str
    content: Content

    _content = field_validator("content", mode="before")(read_content)


class FunctionCallItem(ApiObject):
    """An item of a response's input: a call that an earlier reply made."""

    harmless = _ITEM_HARMLESS
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(ApiObject):
    """An item of a response's input: what a call gave."""

    harmless = _ITEM_HARMLESS
    type: Literal["function_call_output"]
    call_id: str
    output: str

    _output = field_validator("output", mode="before")(join_parts)


class ReasoningText(ApiObject):
    """A part of an earlier reply's reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(ApiObject):
    """An item of a response's input: the reasoning of an earlier reply."""

    harmless = _ITEM_HARMLESS
    neutral: ClassVar = {"encrypted_content": (), "summary": ([],)}
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _item_type(item: Any) -> str:
    name = item.get("type", "message") if isinstance(item, dict) else "message"
    return name if name in _ITEM_TYPES else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class ReasoningOptions(ApiObject):
    """How a response is to reason."""

    neutral: ClassVar = {"summary": (), "generate_summary": ()}
    effort: _Effort | None = None


class ResponseRequest(ConversationRequest):
    """A request to /v1/responses."""

    neutral = _RESPONSES_NEUTRAL
    reasons = REASONS
    prompt_field = "input"
    limit_fields = ("max_output_tokens",)
    input: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def effort(self) -> str | None:
        """How much the model is to think."""
        return None if self.reasoning is None else self.reasoning.effort

    @field_validator("input", mode="before")
    @classmethod
    def _as_items(cls, text: Any) -> Any:
        return [{"role": "user", "content": text}] if isinstance(text, str) else text

    def message_rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows of a dataset have it.

        Reasoning, a message and calls that follow one another are one turn of the assistant.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return system + list(_turns(self.input))


def _turns(items: Sequence[Any]) -> Iterator[dict[str, Any]]:
    turn: dict[str, Any] | None = None
    for item in items:
        # A second text begins a turn of its own, and so does reasoning behind a text or a call.
        is_reply = isinstance(item, MessageItem) and item.role == "assistant"
        if isinstance(item, ReasoningItem | FunctionCallItem) or is_reply:
            begins = (is_reply and (turn or {}).keys() & {"content", "tool_calls"}) or (
                isinstance(item, ReasoningItem) and turn is not None
            )
            if begins and turn is not None:
                yield turn
                turn = None
            turn = turn or {"role": "assistant"}
            _add_to_turn(turn, item)
            continue
        if turn is not None:
            yield turn
            turn = None
        if isinstance(item, FunctionOutputItem):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
        else:
            yield {"role": item.role, "content": item.content}
    if turn is not None:
        yield turn


def _add_to_turn(turn: dict[str, Any], item: Any) -> None:
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] = "".join(part.text for part in item.content or ())
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    else:
        turn["content"] = item.content


# A request is checked whole, and its first mistake is told with its path: messages[0].role.

RequestType = TypeVar("RequestType", bound=ReplyRequest)


def parse_request(request_class: type[RequestType], body: Any) -> RequestType:
    """Return the request of a JSON body; raises ApiError with the field that is wrong."""
    if not isinstance(body, dict):
        raise ApiError("The body must be a JSON object.")
    if not is_finite(body):
        raise ApiError("The body holds a number that is too large.")
    try:
        return request_class.model_validate(body)
    except ValidationError as error:
        # Without the input: what a client sent may be megabytes, and goes into no message.
        first = error.errors(include_url=False, include_input=False)[0]
    except RecursionError:
        raise ApiError("The body is nested too deeply.") from None
    raise _validation_error(request_class, first)


_PYDANTIC_WORDS = (
    (r"^(Input|String|List|Dictionary) should", "must"), (" after validation", ""),
    (r"a valid (?=[aeiou])", "an "), ("a valid ", "a "),
    (r"a dictionary( or instance of \w+)?", "a JSON object"),
)  # fmt: skip
"""What pydantic says, and what it means to a client."""


def _validation_error(request_class: type[ReplyRequest], error: Any) -> ApiError:
    # pydantic has steps of its own: the type of an item, and that a key and no value is wrong.
    location = [step for step in error["loc"] if step not in (*_ITEM_TYPES, "[key]")]
    text = error["msg"]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        location.append(cause.field)
    if isinstance(cause, ValueError):
        text = str(cause)
    elif error["type"] == "extra_forbidden":
        name = str(location[-1])
        near = nearest_option(name, request_class.model_fields) if name else None
        guess = f"; did you mean {near}?" if near and len(location) == 1 else ""
        text = f"this server has no such field{guess or '; remove it'}"
    elif error["type"] == "missing":
        text = "is missing"
    param = "".join(
        f"[{step}]" if isinstance(step, int) else f".{_shorten(step)}" for step in location
    ).lstrip(".")
    for words, better in _PYDANTIC_WORDS:
        text = re.sub(words, better, text)
    ending = "" if text.endswith((".", "?")) else "."
    return ApiError(f"{param}: {text}{ending}", param=param or None)


def _shorten(name: Any) -> str:
    # A key of the client's own stands in the message: printable, and no megabytes of it.
    text = str(name)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 80 else text[:77] + "..."
