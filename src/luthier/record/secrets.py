"""Secrets never stand in a record: not by their key, not by their look, not by their value."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
"""What stands in place of a secret."""
SECRET = re.compile(r"^(hub_|auth_|use_auth_|api_|access_)?(token|key|secret|password)$|_api_key$")
"""Keys of a config whose values are secrets."""

_NAMES = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS", "KEY", "APIKEY"}
_SHORTEST = 8
"""Shorter values of such variables are switches or numbers, and hiding them would hide words."""
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{16,})"
)
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@")


def redacted(value: Any) -> Any:
    """A copy of a config in which no secret's value stands."""
    if isinstance(value, dict):
        return {k: HIDDEN if SECRET.search(str(k)) and v else redacted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [redacted(part) for part in value]
    return scrubbed(value) if isinstance(value, str) else value


def redacted_override(override: str) -> str:
    """An override as typed, without the value of a secret."""
    key, equals, _ = override.partition("=")
    if equals and SECRET.search(key.split(".")[-1]):
        return f"{key}={HIDDEN}"
    return scrubbed(override)


def scrubbed(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a token, a login within an address, or a secret's value.

    Secrets are the values of variables of the environment such as `HF_TOKEN` and `WANDB_API_KEY`.
    """
    for value in _values(tuple(environ.items())):
        text = text.replace(value, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}@", _LOOKS.sub(HIDDEN, text))


@cache
def _values(environ: tuple[tuple[str, str], ...]) -> list[str]:
    """The values of the environment's secrets, longest first; a path to one is none."""
    found = {
        value
        for name, value in environ
        if _NAMES & set(name.upper().split("_")) and len(value) >= _SHORTEST
    }
    return sorted((v for v in found if not _is_path(v)), key=len, reverse=True)


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and Path(value).expanduser().exists()
