"""An object of OpenAI's API with exact types and no field that is passed over in silence."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class ApiError(Exception):
    """An error for the client: an HTTP status and OpenAI's error object."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the error object as OpenAI's API has it."""
        error_type = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": error_type, "param": self.param, "code": self.code}
        return {"error": error}


class FieldError(ValueError):
    """A wrong value of a field that a validator of the whole object looked at."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class ApiObject(BaseModel):
    """An object of the API: types are exact, numbers finite, and there are no other fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    harmless: ClassVar[Mapping[str, type]] = {}
    """Fields without an effect, and their types."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not followed, and the values that ask for what happens anyway."""
    reasons: ClassVar[Mapping[str, str]] = {}
    """Why one of them is not followed, and what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, fields: Any) -> Any:
        """Take out what has no effect; a value that would have one is an error."""
        if not isinstance(fields, dict):
            return fields
        read = dict(fields)
        for name in [name for name in fields if name in cls.harmless or name in cls.neutral]:
            value = read.pop(name)
            if value is None:
                continue
            if name in cls.harmless and type(value) is not cls.harmless[name]:
                raise FieldError(name, f"must be a {_TYPE_NAMES[cls.harmless[name]]}")
            allowed = cls.neutral.get(name, (value,))
            # 1 == True in Python, but `n: true` is a mistake.
            if not any(type(value) is type(option) and value == option for option in allowed):
                raise FieldError(name, describe_options(allowed, cls.reasons.get(name)))
        return read


_TYPE_NAMES = {str: "text", dict: "JSON object", bool: "boolean"}


def describe_options(allowed: Sequence[Any], reason: str | None = None) -> str:
    """Return what a field must be, and why: by default because nothing else is supported."""
    if not allowed:
        return f"{reason or 'is not supported by this server'}; remove it"
    # JSON has one 0: 0 and 0.0 are the same there.
    values = dict.fromkeys(json.dumps(value).replace("0.0", "0") for value in allowed)
    return f"must be {' or '.join(values)}: {reason or 'this server supports nothing else'}"


def is_finite(value: Any) -> bool:
    """Return whether all numbers in a JSON value are finite: 1e999 is infinity to a parser."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
