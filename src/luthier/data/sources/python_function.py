"""Rows that a function of the user's own yields: `python:package.module.function`."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.data.rows import BadRow, Row, describe_type, excerpt
from luthier.data.sources.source import HashedRows
from luthier.errors import UserError, suggest_options

FUNCTION_PREFIX = "python:"


class FunctionContent:
    """What a function yields; called anew, with the same arguments, each time it is read."""

    advice = "Each row that the function yields is to be a dict of columns."

    def __init__(
        self, path: str, arguments: Mapping[str, Any], name: str, max_rows: int | None = None
    ) -> None:
        self._path, self._arguments = path, dict(arguments)
        self._function = _import_function(path)
        _check_arguments(self._function, self._arguments, path, name)
        self._hashed = HashedRows(path, self._rows, max_rows)

    def items(self, hashed: bool = False) -> Iterator[Row | BadRow]:
        """Return the rows, numbered from 0; UserError where the function fails."""
        return self._hashed.items(hashed)

    def _rows(self) -> Iterator[Row | BadRow]:
        """Yield what the function yields as rows."""
        number = -1
        for number, value in enumerate(self._called()):
            where = f"{self._path} row {number}"
            if isinstance(value, Mapping):
                yield Row(dict(value), where)
            else:
                yield BadRow(
                    where, f"this is {_describe_type(value)}, not a dict", excerpt(repr(value))
                )
        if number < 0:
            raise UserError(f"dataset: {self._path} yielded no rows.")

    def digest(self) -> str:
        """Return the hash of the rows: the function's text does not say what it reads."""
        return self._hashed.digest()

    def digest_as_read(self) -> str | None:
        """Return the hash of the rows that were read last, if they were all."""
        return self._hashed.digest_as_read()

    def check_unchanged(self) -> None:
        """Raise UserError where the function yielded other rows than before."""
        self._hashed.check_unchanged()

    def settings(self) -> dict[str, Any]:
        """Return the format alone: the arguments matter only in the rows that they make."""
        return {"format": "python"}

    def size(self) -> int | None:
        """Return None: the number is not known before the last row."""
        return None

    def _called(self) -> Iterator[Any]:
        """Yield what the function yields, its failures in words."""
        # Counted here and not by the caller, because a function fails between two rows.
        number = 0
        try:
            returned = self._function(**self._arguments)
            for value in _check_iterable(returned, self._path):
                yield value
                number += 1
        except UserError:
            raise
        except Exception as error:  # a user's function fails with whatever it likes
            raise UserError(
                f"dataset: {self._path} failed at row {number}: {_describe_exception(error)}"
            ) from error


def _import_function(path: str) -> Callable[..., Any]:
    """Return the function of this dotted path."""
    module_name, _, name = path.removeprefix(FUNCTION_PREFIX).rpartition(".")
    if not module_name:
        raise UserError(
            f"dataset: {path!r} names no function. Write python:module.function, or "
            "python:package.module.function."
        )
    module = _import_module(path, module_name)
    function = vars(module).get(name)
    if callable(function):
        return function
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    raise UserError(
        f"dataset: {path}: the module {module_name} has no function {name!r}. "
        f"{suggest_options(name, functions)}"
    )


def _import_module(path: str, name: str) -> Any:
    """Return the module, which may lie in the working directory."""
    # Behind what is installed, so that a file here called json.py replaces nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The missing module may be one that the user's module imports; only the named one and the
        # packages around it are what the path got wrong.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(_describe_import_error(path, name, error)) from error
        raise UserError(
            f"dataset: {path}: there is no module {error.name} (looked in {Path.cwd()} and among "
            "the installed packages)."
        ) from error
    except Exception as error:  # importing runs the user's module
        raise UserError(_describe_import_error(path, name, error)) from error


def _describe_import_error(path: str, name: str, error: Exception) -> str:
    """Return the text for a module that is there and cannot be imported."""
    return f"dataset: {path}: importing {name} failed: {_describe_exception(error)}"


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], path: str, name: str
) -> None:
    """Refuse arguments that the function does not take, before it is called."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        # Bound without a call: a wrong name is told at once, while the function may work long
        # before its first row.
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{name}.options: {path} takes {signature}, and {error}. The options are its arguments."
        ) from error


def _check_iterable(returned: Any, path: str) -> Iterable[Any]:
    """Return what the function returned, if rows can be taken from it."""
    # A text and a mapping can be iterated too, and would give characters and keys for rows.
    if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping):
        return returned
    raise UserError(
        f"dataset: {path} returned {_describe_type(returned)}, and rows are needed: let it yield "
        "dicts or return a list of them."
    )


def _describe_exception(error: Exception) -> str:
    """Return what an exception says, with the last place of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    location = f" ({last.filename}:{last.lineno})" if last and last.filename != __file__ else ""
    return f"{type(error).__name__}: {error}{location}"


def _describe_type(value: Any) -> str:
    """Return what a value is, in words; beyond JSON by the name of its class."""
    plain = value is None or isinstance(value, str | bool | int | float | list | dict)
    return describe_type(value) if plain else f"a {type(value).__name__}"
