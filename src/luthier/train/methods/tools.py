"""The tools of a run: functions of the user's own, and the methods of environments."""

import asyncio
import inspect
import json
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.python_code import describe_exception, load_python_object, select_arguments

Tool = Callable[..., Any]

TOOLS_KEY, ENVIRONMENT_KEY = "trainer.tools", "trainer.environment"
_NO_TOOLS = ("reset", "get_reward")
"""Methods of an environment that the model cannot call; nor can it those that begin with `_`."""


@dataclass(frozen=True)
class CallRequest:
    """What a model calls in a turn."""

    name: str
    arguments: Any
    id: str | None
    """The call's own id, for templates in which the model writes one."""


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: the text that the model reads."""

    content: str
    has_failed: bool = False
    fault: str | None = None
    """What failed in the tool, with its own line; None where it worked, or the call was bad."""

    @classmethod
    def of_failure(cls, text: str, fault: str | None = None) -> "ToolResult":
        """Return an error as the model reads it."""
        return cls(json.dumps({"error": text}, ensure_ascii=False), True, fault)


class ToolBox:
    """The functions that a model may call, and the class of the environments it acts in."""

    def __init__(
        self,
        functions: Mapping[str, Tool],
        environment: type | None = None,
        environment_path: str = "",
    ) -> None:
        """`functions` by the name that the model calls; every rollout has an environment."""
        self.functions = dict(functions)
        self.environment = environment
        self._environment_path = environment_path
        self._paths: dict[str, str] = {}

    @cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """The JSON schema of each tool, as the chat template shows it to the model.

        Raises UserError for a tool without docstring or type hints.
        """
        # A bound method has no `self` in its signature, and no environment is made for it.
        methods = {
            name: method if self._is_static(name) else MethodType(method, object())
            for name, method in self._methods.items()
        }
        return [_make_schema(name, tool) for name, tool in (self.functions | methods).items()]

    @cached_property
    def _methods(self) -> dict[str, Any]:
        """The methods of an environment that the model may call, by their names."""
        if self.environment is None:
            return {}
        members = inspect.getmembers(self.environment, predicate=inspect.isfunction)
        return {
            name: method
            for name, method in members
            if name not in _NO_TOOLS and not name.startswith("_")
        }

    def _is_static(self, name: str) -> bool:
        return isinstance(inspect.getattr_static(self.environment, name), staticmethod)

    @property
    def has_reward(self) -> bool:
        """Whether the environment scores its rollout itself, by `get_reward`."""
        return hasattr(self.environment, "get_reward")

    def tools_of(self, environment: Any) -> dict[str, Tool]:
        """Return what the model may call in an environment, by name; None is no environment."""
        return self.functions | {name: getattr(environment, name) for name in self._methods}

    def make_environment(self) -> Any:
        """Return a new environment, None where the run has none.

        Raises UserError where the class cannot be made.
        """
        if self.environment is None:
            return None
        try:
            return self.environment()
        except Exception as error:
            raise UserError(
                f"{ENVIRONMENT_KEY}: {self._environment_path} cannot be made: "
                f"{describe_exception(error)}"
            ) from error

    def reset_environment(
        self, environment: Any, row: Mapping[str, Any], location: str, time_limit: float
    ) -> str | None:
        """Begin an episode with a row's columns; return what its prompt is to end with, if any.

        `reset` gets those of the columns, and `prompt`, that it names; all where it takes
        `**kwargs`. Raises UserError, with the row, where it fails or returns no text.
        """
        path = f"{ENVIRONMENT_KEY}: {self._environment_path}.reset"
        arguments = select_arguments(environment.reset, row, path)
        try:
            with limit_time(time_limit):
                observation = environment.reset(**arguments)
        except (Exception, ToolTimeoutError) as error:
            raise UserError(f"{path}, row {location}: {describe_exception(error)}") from error
        if observation is None or isinstance(observation, str):
            return observation
        raise UserError(
            f"{path}, row {location}: it returned {type(observation).__name__}, and must return "
            "a text, which is added to the prompt, or None."
        )


def load_tools(config: RunConfig) -> ToolBox | None:
    """Return the tools of a run; None where it has neither tools nor an environment.

    Raises UserError for what cannot be loaded, has no docstring or no type hints.
    """
    trainer = config.trainer
    if not trainer.tools and trainer.environment is None:
        return None
    functions: dict[str, Tool] = {}
    for path in trainer.tools:
        function = load_python_object(path)
        name = getattr(function, "__name__", path)
        if name in functions:
            raise UserError(f"{TOOLS_KEY}: two tools are called {name}. Rename one of them.")
        functions[name] = function
    environment = None
    if trainer.environment is not None:
        environment = load_python_object(trainer.environment)
        if not isinstance(environment, type) or not hasattr(environment, "reset"):
            raise UserError(
                f"{ENVIRONMENT_KEY}: {trainer.environment} must be a class with a method `reset`, "
                "which begins an episode."
            )
    tools = ToolBox(functions, environment, trainer.environment or "")
    taken = sorted(functions.keys() & tools.tools_of(environment).keys() & set(tools._methods))
    if taken:
        raise UserError(
            f"{ENVIRONMENT_KEY}: it has a method {taken[0]}, as one of trainer.tools is called. "
            "Rename one of them."
        )
    _ = tools.schemas  # a tool that cannot be described is refused before anything is loaded
    return tools


def _make_schema(name: str, tool: Tool) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        function = inspect.unwrap(getattr(tool, "__func__", tool))
        code = getattr(function, "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        raise UserError(
            f"{TOOLS_KEY}: {name}{place}: {error}\n"
            "A tool needs a docstring with a line for each argument under `Args:`, and a type "
            "hint for each argument: that is what the model is told of it."
        ) from error
    schema["function"]["name"] = name
    return schema


# Calling them.


class ToolTimeoutError(BaseException):
    """A tool took too long; no Exception, so that a tool's own `except` does not stop it."""


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise ToolTimeoutError within the block once it has run for so long.

    What waits or computes in Python is interrupted; compiled code that never comes back to Python
    is not, nor is anything in a thread other than the main one, where Python hears no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_running = True

    def interrupt(*_: Any) -> None:
        if is_running:
            raise ToolTimeoutError(f"it took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    # Again each second, should the tool catch everything.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            is_running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def call_tools(
    calls: Sequence[tuple[CallRequest, Mapping[str, Tool]]], time_limit: float
) -> list[ToolResult]:
    """Return the result of each call of a tool among those that its model may call.

    Functions that are `async` run side by side, the others one after the other. What fails, is
    not there, does not take these arguments or runs for longer than `time_limit` seconds gives an
    error for the model to read, as in TRL.
    """
    results: list[ToolResult | None] = []
    waiting: list[tuple[int, Coroutine[Any, Any, Any]]] = []
    for call, tools in calls:
        tool = tools.get(call.name)
        problem = _describe_bad_call(call, tool, tools)
        if problem is not None:
            results.append(ToolResult.of_failure(problem))
        elif inspect.iscoroutinefunction(tool):
            waiting.append((len(results), tool(**call.arguments)))
            results.append(None)
        else:
            assert tool is not None
            results.append(_call(tool, call.arguments, time_limit))
    if waiting:
        coroutines = [coroutine for _, coroutine in waiting]
        # In a thread of its own: a notebook has a loop of events in the main one.
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(asyncio.run, _gather(coroutines, time_limit)).result()
        for (number, _), result in zip(waiting, finished, strict=True):
            results[number] = result
    return [result for result in results if result is not None]


def _describe_bad_call(
    call: CallRequest, tool: Tool | None, tools: Mapping[str, Tool]
) -> str | None:
    """Return what the model did wrong in a call; None for nothing."""
    if tool is None:
        return f"Tool {call.name} not found. There are: {', '.join(tools)}."
    if not isinstance(call.arguments, Mapping):
        return f"The arguments of {call.name} must be an object."
    try:
        inspect.signature(tool).bind(**call.arguments)
    except TypeError as error:
        return f"{call.name}: {error}"
    except ValueError:  # some built-in functions do not tell
        return None
    return None


def _call(tool: Tool, arguments: Mapping[str, Any], time_limit: float) -> ToolResult:
    try:
        with limit_time(time_limit):
            return ToolResult(_as_text(tool(**arguments)))
    except (Exception, ToolTimeoutError, SystemExit) as error:
        return ToolResult.of_failure(str(error), describe_exception(error))


async def _gather(
    coroutines: Sequence[Coroutine[Any, Any, Any]], time_limit: float
) -> list[ToolResult]:
    async def finish(coroutine: Coroutine[Any, Any, Any]) -> ToolResult:
        try:
            return ToolResult(_as_text(await asyncio.wait_for(coroutine, time_limit)))
        except TimeoutError:
            text = f"it took longer than {time_limit:g} s"
            return ToolResult.of_failure(text, text)
        except Exception as error:
            return ToolResult.of_failure(str(error), describe_exception(error))

    return list(await asyncio.gather(*map(finish, coroutines)))


def _as_text(value: Any) -> str:
    """Return a result as the model reads it: a text as it is, lists and dicts as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
