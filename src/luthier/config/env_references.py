"""Values that a config takes from the environment, `${oc.env:NAME}`: they are recorded as such.

A record of a run goes to other people and machines, so it holds the name of the variable and not
its value. What reads a record takes the value from its own environment again.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from luthier import redaction
from luthier.redaction import REFERENCE

_MARK = "\0"
"""Stands before and behind a variable's name in place of `${oc.env:...}`, which OmegaConf would
resolve again."""
_FINGERPRINT_CHARS = 12


class _EnvResolver:
    """OmegaConf's resolver `oc.env`, which tells redaction what it gives out."""

    is_recording = False
    """Whether references are wanted in place of values."""

    def __call__(self, key: str, *default: Any) -> Any:
        """Return the variable's value, or the default where it is not set."""
        if key not in os.environ:
            from omegaconf.resolvers import oc

            return oc.env(key, *default)
        redaction.note_environment_value(key, os.environ[key])
        return f"{_MARK}{key}{_MARK}" if self.is_recording else os.environ[key]


_RESOLVER = _EnvResolver()


def register_resolver() -> None:
    """Let `${oc.env:NAME}` be resolved here, in place of OmegaConf's own resolver."""
    # Most configs take nothing from the environment.
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("oc.env", _RESOLVER, replace=True)


def resolve_with_references(config: Any) -> Any:
    """Return a config as plain values, with references for what comes from the environment."""
    from omegaconf import OmegaConf

    _RESOLVER.is_recording = True
    try:
        return _unmark(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    finally:
        _RESOLVER.is_recording = False


def _unmark(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unmark(key): _unmark(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_unmark(item) for item in value]
    if not isinstance(value, str) or _MARK not in value:
        return value
    pieces = value.split(_MARK)
    return "".join(
        f"${{oc.env:{piece}}}" if number % 2 else piece for number, piece in enumerate(pieces)
    )


def put_references(values: Any, referenced: Any) -> Any:
    """Return `values` with the references of `referenced`, the same config, in their places."""
    if isinstance(values, dict) and isinstance(referenced, dict):
        return {
            key: put_references(value, referenced[key]) if key in referenced else value
            for key, value in values.items()
        }
    if isinstance(values, list) and isinstance(referenced, list) and len(values) == len(referenced):
        return [put_references(*pair) for pair in zip(values, referenced, strict=True)]
    if isinstance(referenced, str) and REFERENCE.search(referenced):
        return referenced
    return values


def find_references(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the variable of each reference in plain values, such as a record."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from find_references(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_references(item, key)
    elif isinstance(value, str):
        yield from ((key, name) for name in REFERENCE.findall(value))


def fill_references(value: Any, with_secrets: bool) -> Any:
    """Return plain values with the variables of this environment in place of references.

    A variable that is not set, or that holds a secret while those are not to be given out, is
    left as a reference.
    """
    if isinstance(value, Mapping):
        return {key: fill_references(below, with_secrets) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [fill_references(item, with_secrets) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: Any) -> str:
        name = match[1]
        if name not in os.environ or (redaction.is_secret_variable(name) and not with_secrets):
            return str(match[0])
        redaction.note_environment_value(name, os.environ[name])
        return os.environ[name]

    return REFERENCE.sub(fill, value)


def fingerprint_variables(recorded: Any) -> dict[str, str]:
    """Return a short hash of each variable that a recorded config refers to, without secrets.

    It tells whether a variable has changed since a run began. A secret has none: it could be
    guessed from its hash, and another one (a renewed token) gives the same run.
    """
    names = {name for _, name in find_references(recorded)}
    return {
        name: hashlib.sha256(f"{name}={os.environ[name]}".encode()).hexdigest()[:_FINGERPRINT_CHARS]
        for name in sorted(names)
        if name in os.environ and not redaction.is_secret_variable(name)
    }
