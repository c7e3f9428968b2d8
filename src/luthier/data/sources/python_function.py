"""Rows that a function of the user's own yields: `python:package.module.function`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luthier.data.rows import BadRow, Row, describe_type, excerpt
from luthier.data.sources.source import HashedRows
from luthier.errors import UserError
from luthier.python_code import check_python_path, describe_exception, load_python_object


class FunctionContent:
    """What a function yields; called anew, with the same arguments, each time it is read."""

    advice = "Each row that the function yields must be a dict of columns."

    def __init__(
        self, path: str, arguments: Mapping[str, Any], name: str, max_rows: int | None = None
    ) -> None:
        self._path, self._arguments = path, dict(arguments)
        self._function = _load_function(path, self._arguments, name)
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
                f"dataset: {self._path} failed at row {number}: {describe_exception(error)}"
            ) from error


def _load_function(path: str, arguments: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """Return the function of a source; raises UserError, before it is called."""
    if problem := check_python_path(path):
        raise UserError(f"{name}.path: {problem}")
    if problem := check_python_path(path, arguments):
        raise UserError(f"{name}.options: {problem} The options are its arguments.")
    try:
        return load_python_object(path, arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _check_iterable(returned: Any, path: str) -> Iterable[Any]:
    """Return what the function returned, if rows can be taken from it."""
    # A text and a mapping can be iterated too, and would give characters and keys for rows.
    if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping):
        return returned
    raise UserError(
        f"dataset: {path} returned {_describe_type(returned)}, and rows are needed: let it yield "
        "dicts or return a list of them."
    )


def _describe_type(value: Any) -> str:
    """Return what a value is, in words; beyond JSON by the name of its class."""
    plain = value is None or isinstance(value, str | bool | int | float | list | dict)
    return describe_type(value) if plain else f"a {type(value).__name__}"
