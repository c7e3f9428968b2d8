"""Tools, and calls of them, in the one form that chat templates read: OpenAI's."""

from functools import lru_cache
from typing import Any

from luthier.data.rows import RowError, kind
from luthier.data.shapes.values import json_in

Call = dict[str, Any]


def read_tools(value: Any, column: str) -> list[dict[str, Any]]:
    """The tools of a row: a list of objects, or JSON text of one, as exports write it.

    A tool without its `function` wrapper (`functions` of OpenAI, `tools` of LLaMA-Factory) gets it.
    """
    if isinstance(value, str):
        return _parsed_tools(value, column)
    if not isinstance(value, list):
        raise RowError(f"the tools ({column!r}) are {kind(value)}; expected a list of objects")
    return [_tool(tool, column) for tool in value]


@lru_cache(maxsize=256)
def _parsed_tools(text: str, column: str) -> list[dict[str, Any]]:
    """The tools of JSON text, which is often the same for many rows."""
    value = json_in(text, f"the tools ({column!r})", "a list of objects")
    return [] if value is None else read_tools(value, column)


def _tool(tool: Any, column: str) -> dict[str, Any]:
    """One tool, wrapped as `{"type": "function", "function": ...}` where it has only a name."""
    if isinstance(tool, str):
        tool = json_in(tool, f"an entry of {column!r}", "an object")
    if not isinstance(tool, dict):
        raise RowError(f"the tools ({column!r}) hold {kind(tool)}; expected objects")
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def read_calls(value: Any) -> list[Call]:
    """The `tool_calls` of a message, each with its function's name and arguments."""
    if isinstance(value, str):
        value = json_in(value, "tool_calls", "a list of calls")
    if not isinstance(value, list):
        raise RowError(f"tool_calls is {kind(value)}; expected a list")
    return [read_call(call, f"tool_calls[{place}]") for place, call in enumerate(value)]


def read_call(call: Any, where: str) -> Call:
    """One call; a flat one (`{"name", "arguments"}`) gets its `function` wrapper.

    Arguments stay as they are, an object or JSON text; a call that has none gives an empty object.
    """
    if isinstance(call, str):
        call = json_in(call, where, 'an object {"name": ..., "arguments": {...}}')
    if not isinstance(call, dict):
        raise RowError(f"{where} is {kind(call)}; expected an object")
    kept = {key: value for key, value in call.items() if value is not None}
    if "function" in kept:
        return {**kept, "function": _function(kept["function"], where)}
    outer = {key: kept.pop(key) for key in ("id", "index") if key in kept}
    kept.pop("type", None)
    return {**outer, "type": "function", "function": _function(kept, where)}


def _function(function: Any, where: str) -> dict[str, Any]:
    """The function of a call, with a name and with arguments."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = f"it has: {', '.join(function)}" if isinstance(function, dict) else kind(function)
        raise RowError(f"{where} names no function ({found}); expected name and arguments")
    arguments = function.get("arguments")
    if arguments is None:
        return {**function, "arguments": {}}
    if not isinstance(arguments, dict | str):
        raise RowError(f"the arguments of {where} are {kind(arguments)}; expected an object")
    return function
