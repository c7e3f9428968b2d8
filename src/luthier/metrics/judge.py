"""A judge as a reward: a model behind an OpenAI-compatible address that rates each completion."""

import asyncio
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from luthier.errors import UserError, suggest_options
from luthier.metrics.metric import excerpt
from luthier.metrics.rewards import Reward, Rewards, completion_text
from luthier.metrics.text import find_numbers

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_OWN_PLACEHOLDERS = ("prompt", "reply")
_DECIDED_FIELDS = ("model", "messages", "stream", "n")
"""Fields of a request that follow from the other settings."""
_TRANSIENT_STATUSES = frozenset([408, 409, 425, 429, *range(500, 600)])
"""Answers of a server after which the same request may succeed."""
_LONGEST_PAUSE = 60.0
_PATH = "/chat/completions"

# Nothing outside of the training draws from its random state.
_JITTER = random.Random()


class TransientError(Exception):
    """A request that may succeed when it is sent again, in words."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause
        """Seconds that the server asks to wait; None where it does not say."""


class JudgeReward(Reward):
    """`{judge: ADDRESS, model: NAME, prompt: TEXT}`: what another model says of each completion.

    Completions are judged side by side, each different one once: what was said of a prompt and a
    reply is remembered as long as the process lives.
    """

    address: str
    """Where the API begins, such as `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """The model that judges, by its name there."""
    prompt: str
    """What the judge is asked: `{prompt}`, `{reply}` and columns of the row are filled in."""
    choices: dict[str, FiniteFloat] | None = Field(default=None, min_length=2)
    """What the judge may answer -> the reward; None where it answers with a number."""
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    """The lowest and the highest number that is an answer; None for any."""
    marker: str | None = Field(default=None, min_length=1)
    """What stands before the verdict, such as `Score:`; None where the answer has nothing else."""
    key_variable: str | None = Field(default=None, min_length=1)
    """The variable of the environment that holds the API's key; None sends none."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """An answer without a verdict stops the run, or gives the completion no reward."""
    parallel: PositiveInt = 16
    """How many requests each process has under way at once."""
    timeout: PositiveFloat = 60.0
    """Seconds that one request may take."""
    retries: NonNegativeInt = 5
    """How often a request that failed is sent again."""
    request: dict[str, Any] = Field(default={"temperature": 0, "max_tokens": 512})
    """Further fields of each request."""

    _verdicts: dict[str, float | None] = PrivateAttr(default_factory=dict)
    """What was asked -> the reward, None for an answer without a verdict."""

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        split = urlsplit(address)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError("write the address of the API, such as http://localhost:8000/v1.")
        return address.rstrip("/").removesuffix(_PATH)

    @field_validator("request")
    @classmethod
    def _leaves_decided_fields(cls, request: dict[str, Any]) -> dict[str, Any]:
        decided = [name for name in _DECIDED_FIELDS if name in request]
        if decided:
            raise ValueError(f"leave out request.{decided[0]}, which luthier sets.")
        return request

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if "reply" not in _PLACEHOLDER.findall(self.prompt):
            raise ValueError("the prompt must say where the reply stands: write {reply} in it.")
        if self.choices is not None and self.range is not None:
            raise ValueError("set either choices or range.")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError("range is the lowest and the highest number, such as [0, 10].")
        return self

    def read_key(self) -> str | None:
        """The API's key; UserError where the variable that should hold it is not set."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable)
        if not key:
            raise UserError(
                f"reward {self.name}: the variable {self.key_variable} of the environment, which "
                f"should hold the key of {self.address}, is not set. Set it: "
                f"export {self.key_variable}=..."
            )
        return key

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise UserError for a column in the prompt that the rows do not have."""
        there = [*_OWN_PLACEHOLDERS, *columns]
        for name in _PLACEHOLDER.findall(self.prompt):
            if name not in there:
                raise UserError(
                    f"reward {self.name}: its prompt has {{{name}}}, and the rows have no column "
                    f"{name!r}. {suggest_options(name, there)}"
                )

    async def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Rewards:
        """The judge's rewards; None for answers without a verdict, where that does not stop.

        Raises UserError where the judge cannot be reached, refuses, or gives no verdict.
        """
        lists = {name: values for name, values in columns.items() if isinstance(values, list)}
        questions = []
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[n] for name, values in lists.items()}
            questions.append(self.fill_prompt(prompt, completion, row))
        await self._judge([each for each in dict.fromkeys(questions) if each not in self._verdicts])
        verdicts = [self._verdicts[question] for question in questions]
        log_metric = columns.get("log_metric")
        if self.on_unreadable == "skip" and log_metric is not None:
            log_metric(f"rewards/{self.name}/unreadable", verdicts.count(None) / len(verdicts))
        return verdicts

    def fill_prompt(self, prompt: Any, completion: Any, row: Mapping[str, Any]) -> str:
        """What the judge is asked about one completion; what is filled in is not filled again."""
        values = {**row, "prompt": conversation_text(prompt), "reply": completion_text(completion)}

        def fill(match: re.Match[str]) -> str:
            return _as_text(values[match[1]]) if match[1] in values else match[0]

        return _PLACEHOLDER.sub(fill, self.prompt)

    def read_verdict(self, answer: str) -> float | None:
        """The reward that an answer says; None where it says none, or several."""
        # Servers without a parser for it leave a model's reasoning before its answer.
        text = answer.rpartition("</think>")[2]
        if self.marker is not None:
            _, marker, text = text.rpartition(self.marker)
            if not marker:
                return None
        verdicts: list[float]
        if self.choices is not None:
            verdicts = [self.choices[word] for word in _find_words(text, self.choices)]
        else:
            verdicts = [float(number) for number in find_numbers(text)]
        # Behind a marker the first one counts (`Score: 7/10`), and else there must be no other.
        if not verdicts or (self.marker is None and len(set(verdicts)) > 1):
            return None
        low, high = self.range or (float("-inf"), float("inf"))
        return verdicts[0] if low <= verdicts[0] <= high else None

    async def _judge(self, questions: Sequence[str]) -> None:
        """Ask about all of them side by side, and remember the verdicts."""
        import httpx2

        if not questions:
            return
        key, slots = self.read_key(), asyncio.Semaphore(self.parallel)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        bounds = httpx2.Limits(max_connections=self.parallel)
        async with httpx2.AsyncClient(timeout=None, headers=headers, limits=bounds) as client:
            tasks = [asyncio.create_task(self._ask(client, slots, each)) for each in questions]
            try:
                await asyncio.gather(*tasks)
            finally:
                # Behind the first failure the others are not waited for.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, slots: asyncio.Semaphore, question: str) -> None:
        """Ask until there is a verdict; UserError where there is none after all retries."""
        for attempt in range(self.retries + 1):
            try:
                async with slots:
                    answer = await self._request(client, question)
                verdict = self.read_verdict(answer)
                # At temperature 0 the same answer would come again.
                is_final = attempt == self.retries or self.request.get("temperature") == 0
                if verdict is None and not is_final:
                    continue
                if verdict is None and self.on_unreadable == "stop":
                    raise UserError(self._unreadable_message(answer))
                self._verdicts[question] = verdict
                return
            except TransientError as error:
                if attempt == self.retries:
                    raise UserError(
                        f"reward {self.name}: {self.address} gave no answer in {attempt + 1} "
                        f"{'try' if attempt == 0 else 'tries'}. The last one: {error}.\n"
                        "Look whether the judge runs and what it says; fewer requests at once "
                        "(parallel), more retries or a longer timeout may help."
                    ) from error
                pause = min(2.0**attempt, _LONGEST_PAUSE) * (0.5 + _JITTER.random())
                await asyncio.sleep(min(max(pause, error.pause or 0.0), _LONGEST_PAUSE))

    async def _request(self, client: Any, question: str) -> str:
        """Return the judge's answer; TransientError, or UserError where it refuses."""
        import httpx2

        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, **self.request}
        try:
            # httpx bounds the wait between two pieces of an answer, not all of it.
            async with asyncio.timeout(self.timeout):
                response = await client.post(f"{self.address}{_PATH}", json=body)
        except TimeoutError as error:
            raise TransientError(f"no answer within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise TransientError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except (httpx2.InvalidURL, httpx2.HTTPError) as error:
            raise UserError(f"reward {self.name}: {self.address}: {error}") from error
        if response.status_code in _TRANSIENT_STATUSES:
            raise TransientError(_describe_response(response), _read_pause(response))
        if response.status_code != 200:
            raise UserError(
                f"reward {self.name}: {self.address} refuses: {_describe_response(response)}."
                f"{self._refusal_advice(response.status_code)}"
            )
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"reward {self.name}: {self.address} does not answer as an OpenAI-compatible "
                f"server does: {excerpt(response.text)}"
            ) from error
        return content if isinstance(content, str) else ""

    def _refusal_advice(self, status: int) -> str:
        if status == 404:
            return (
                f"\nThe address is where the API begins (often it ends in /v1), and model is a "
                f"name that the server knows; {self.model!r} was asked for."
            )
        if status in (401, 403):
            if self.key_variable is None:
                return "\nName the variable that holds the API's key: key_variable: NAME."
            return f"\nThe key is that of the variable {self.key_variable}."
        return "\nFields of the request are set by request: {...}."

    def _unreadable_message(self, answer: str) -> str:
        if self.choices is not None:
            expected = f"one of {', '.join(self.choices)}"
        elif self.range is not None:
            expected = f"one number from {self.range[0]:g} to {self.range[1]:g}"
        else:
            expected = "one number"
        where = f" behind {self.marker!r}" if self.marker else ""
        return (
            f"reward {self.name}: the judge's answer has no verdict ({expected}{where}): "
            f"{excerpt(answer)}\nAsk for it in the prompt, set a marker, or "
            "on_unreadable: skip, with which such a completion gets no reward."
        )


def conversation_text(messages: Any) -> str:
    """The text of a prompt: of a single message its content, of several each with its role."""
    if isinstance(messages, str):
        return messages
    texts = [_message_text(message) for message in messages]
    if len(texts) == 1:
        return texts[0]
    roles = [message.get("role", "assistant") for message in messages]
    return "\n\n".join(f"{role}: {text}" for role, text in zip(roles, texts, strict=True))


def _message_text(message: Mapping[str, Any]) -> str:
    """The content of a message, with its calls as JSON behind it."""
    text = completion_text([{**message, "role": "assistant"}])
    calls = message.get("tool_calls")
    return f"{text}\n{_as_text(calls)}".strip() if calls else text


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _find_words(text: str, words: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The words that stand by themselves in a text, in its order; the longest where several do."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text)


def _describe_response(response: Any) -> str:
    """The status of an answer with what it says."""
    return f"HTTP {response.status_code} {excerpt(response.text, 200)}".strip()


def _read_pause(response: Any) -> float | None:
    """The seconds that a server asks to wait; None where it does not say, or names a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return None
