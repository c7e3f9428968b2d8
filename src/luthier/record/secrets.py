"""Secrets never stand in a record: not by their key, not by their look, not by their value."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
"""What stands in place of a secret."""
SECRET_KEYS = re.compile(
    r"^(hub_|auth_|use_auth_|api_|access_)?(token|key|secret|password)$|_api_key$"
)
"""Keys of a config whose values are secrets."""

_SECRET_WORDS = {
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "CREDENTIAL",
    "CREDENTIALS",
    "KEY",
    "APIKEY",
}
_MIN_SECRET_CHARS = 8
"""Shorter values of such variables are switches or numbers, and hiding them would hide words."""
_TOKEN_PATTERN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{16,})"
)
_URL_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@")


def redact_secrets(value: Any) -> Any:
    """A copy of a config in which no secret's value stands."""
    if isinstance(value, dict):
        return {
            k: HIDDEN if SECRET_KEYS.search(str(k)) and v else redact_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [redact_secrets(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def redact_override(override: str) -> str:
    """An override as typed, without the value of a secret."""
    key, equals, _ = override.partition("=")
    if equals and SECRET_KEYS.search(key.split(".")[-1]):
        return f"{key}={HIDDEN}"
    return scrub_text(override)


def scrub_text(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a token, a login within an address, or a secret's value.

    Secrets are the values of variables of the environment such as `HF_TOKEN` and `WANDB_API_KEY`.
    """
    for value in _secret_values(tuple(environ.items())):
        text = text.replace(value, HIDDEN)
    return _URL_LOGIN.sub(rf"\1{HIDDEN}@", _TOKEN_PATTERN.sub(HIDDEN, text))


@cache
def _secret_values(environ: tuple[tuple[str, str], ...]) -> list[str]:
    """The values of the environment's secrets, longest first; a path to one is none."""
    found = {
        value
        for name, value in environ
        if _SECRET_WORDS & set(name.upper().split("_")) and len(value) >= _MIN_SECRET_CHARS
    }
    return sorted((v for v in found if not _is_path(v)), key=len, reverse=True)


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and Path(value).expanduser().exists()
