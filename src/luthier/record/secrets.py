"""Secrets are hidden in a record, by their key, by their look and by their value."""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
"""What is written in place of a secret."""
SECRET_KEYS = re.compile(
    r"^(hub_|auth_|use_auth_|api_|access_)?(token|key|secret|password)$|_api_key$"
)
"""Keys of a config whose values are secrets."""

_SECRET_VARIABLE_PARTS = {
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
"""Shorter values of such variables are switches or numbers, and texts have those too."""
_TOKEN_PATTERN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{16,})"
)
_URL_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@")


def redact_secrets(value: Any) -> Any:
    """Return a copy of a config without the values of secrets."""
    if isinstance(value, dict):
        return {
            k: HIDDEN if SECRET_KEYS.search(str(k)) and v else redact_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [redact_secrets(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def redact_override(override: str) -> str:
    """Return an override as typed, without the value of a secret."""
    key, equals, _ = override.partition("=")
    # The last name decides, as `hub_token` is a secret in any group of the config.
    if equals and SECRET_KEYS.search(key.split(".")[-1]):
        return f"{key}={HIDDEN}"
    return scrub_text(override)


def scrub_text(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text without what looks like a token, a login in a URL, or a secret's value.

    Secrets are the values of variables of the environment such as `HF_TOKEN` and `WANDB_API_KEY`.
    """
    for value in _secret_values(tuple(environ.items())):
        text = text.replace(value, HIDDEN)
    return _URL_LOGIN.sub(rf"\1{HIDDEN}@", _TOKEN_PATTERN.sub(HIDDEN, text))


@cache
def _secret_values(environ: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the values of the environment's secrets, longest first; a path to one is none."""
    values = {
        value
        for name, value in environ
        if _SECRET_VARIABLE_PARTS & set(name.upper().split("_")) and len(value) >= _MIN_SECRET_CHARS
    }
    # The longest first: a secret that is part of another one would leave the rest of that.
    secrets = [
        value
        for value in values
        if not (value.startswith(("/", "~")) and Path(value).expanduser().exists())
    ]
    return sorted(secrets, key=len, reverse=True)
