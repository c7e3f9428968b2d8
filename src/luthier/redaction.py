"""What must not leave the process as text: secrets, and values that came from the environment.

A value is a secret by its key (`headers.Authorization`, `account_key`), by its look (`hf_...`, a
login or a signature in an address), or because a variable of the environment that is named like a
secret holds it. `redact` and its like hide it in whatever is written. A value that a config took
from the environment (`${oc.env:NAME}`) is written as that reference.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
"""What is written in place of a secret."""
REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
"""A value of the environment as it is written: its variable's name in place of the text."""

# Names: of keys in a config, of headers, of parameters in an address, of variables.

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_SECRET_WORDS = frozenset(
    [
        *("secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential"),
        *("credentials", "authorization", "cookie", "cookies", "apikey", "webhook", "sas", "jwt"),
    ]
)
"""Words that make a name the name of a secret, wherever they stand in it."""
_SECRET_LAST_WORDS = frozenset(
    [
        *("token", "tokens", "key", "keys", "pass", "pwd", "creds", "auth", "pat", "dsn"),
        *("sig", "signature", "bearer"),
    ]
)
"""Words that do so at the end of a name alone: `key_columns` are columns."""
_SECRET_ENDINGS = ("password", "passwd", "pwd", "secret", "apikey", "webhook", "passphrase")
"""Endings of names without separators, such as PGPASSWORD and MYSQL_PWD."""
_CONNECTION_WORDS = frozenset(["connection", "conn"])
_NOT_SECRET = re.compile(
    # Tokens and keys of models and tables, and counts.
    r"(add|additional|assistant|audio|bos|boi|cls|control|decoder|document|end|eoi|eos|eot|extra"
    r"|forced|image|input|invocation|mask|max|min|new|num|number|pad|prompt|sep|special|start|stop"
    r"|total|trained|unk|video|vision|vocab|word)[\w-]*_tokens?$"
    r"|^(tokens|keys)$|^(pwd|oldpwd)$|^(primary|foreign|sort|group|partition)_keys?$"
    r"|^(auth|sig|pass)_(version|type|method|mode)$",
    re.IGNORECASE,
)
_OPEN_MAPPINGS = frozenset(["storage", "headers"])
"""Mappings that go to file systems and servers as they are: nobody knows all their keys."""
_HARMLESS_OPTIONS = re.compile(
    r"(anon|endpoint(_?url)?|region(_name)?|project|account_name|bucket|host|port|protocol|block_?size"
    r"|default_\w+|cache_\w+|use_ssl|requester_pays|version_aware|consistency|access|accept|timeout"
    r"|location|repo_type|revision|user_agent|content_type|accept_(encoding|language)|range)",
    re.IGNORECASE,
)
"""Keys of such a mapping whose texts are no secrets; those of all others are hidden."""


@cache
def is_secret_name(name: str) -> bool:
    """Return whether a key, a header or a parameter of this name holds a secret."""
    words = [word.lower() for word in _WORD.findall(name) if not word.isdigit()]
    if not words or _NOT_SECRET.search("_".join(words)):
        return False
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or words[-1] in _SECRET_LAST_WORDS
        or words[-1].endswith(_SECRET_ENDINGS)
        or (words[-1] in ("string", "str", "url") and not _CONNECTION_WORDS.isdisjoint(words))
    )


@cache
def is_secret_variable(name: str) -> bool:
    """Return whether a variable of the environment with this name holds a secret.

    Any of its words says so, as in TOKEN_OF_CI: no key of a model has such a name.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    return is_secret_name(name) or any(map(is_secret_name, words))


# Looks: texts that are secrets whatever they are called.

_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|[rs]k_(?:live|test)_\w{16,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|glpat-[\w-]{16,}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_URL_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^/?#\s\"'<>]+)@", re.IGNORECASE)
_WEBHOOK = re.compile(
    r"(https://(?:hooks\.slack\.com/|(?:\w+\.)?discord(?:app)?\.com/api/webhooks/"
    r"|api\.telegram\.org/bot|[\w.-]+\.webhook\.office\.com/))([^\s\"'<>]+)",
    re.IGNORECASE,
)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s\"'<>?#]*)([?#][^\s\"'<>]*)", re.IGNORECASE)
_QUERY_VALUE = re.compile(r"(?<=[?&;#])([^=&;#]+=)([^&;#]+)")
_SIGNING_PARAMETERS = re.compile(
    # S3, Google and CloudFront sign their addresses by these; they change with each signature.
    r"(x-(amz|goog|ms)-[\w-]+|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires"
    # A shared access signature of Azure.
    r"|s[evprst]|spr|sip|srt|ss|sk\w{1,3}|code)=",
    re.IGNORECASE,
)
_CONNECTION_STRING = re.compile(
    r"\b((?:(?:Shared)?(?:Account|Access)(?:Key|Signature)|Password|Pwd|Client_?Secret)=)"
    r"([^;\s\"'&]+)",
    re.IGNORECASE,
)
_SCHEME = re.compile(
    r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|\bBearer\s+)([\w.~+/=-]{8,})",
    re.IGNORECASE,
)


def _hide_looks(text: str, secrets: set[str] | None = None) -> str:
    """Return a text without what looks like a secret; `secrets` gets what was hidden."""

    def hide(match: re.Match[str]) -> str:
        lead, secret = (match[1], match[2]) if match.re.groups else ("", match[0])
        # `user:${oc.env:PASSWORD}@` tells no secret, and the address can be used again.
        user = r"(?:[^:]*:)?" if match.re is _URL_LOGIN else ""
        if re.fullmatch(user + REFERENCE.pattern, secret):
            return match[0]
        if secrets is not None:
            # Of `user:password` the password alone; a user's name may stand elsewhere.
            secrets.add(secret.rpartition(":")[2] if match.re is _URL_LOGIN else secret)
        return f"{lead}{HIDDEN}@" if match.re is _URL_LOGIN else f"{lead}{HIDDEN}"

    def hide_in_query(match: re.Match[str]) -> str:
        parameters = _QUERY_VALUE.findall(match[2])
        names = [name.rstrip("=").lower() for name, _ in parameters]
        is_signed = any(is_secret_name(n) or n.startswith(("x-amz", "x-goog")) for n in names)
        return match[1] + _QUERY_VALUE.sub(
            lambda pair: hide(pair) if is_secret_name(pair[1]) or (
                is_signed and _SIGNING_PARAMETERS.fullmatch(pair[1])
            ) else pair[0],
            match[2],
        )  # fmt: skip

    for pattern in (_TOKEN, _WEBHOOK, _URL_LOGIN):
        text = pattern.sub(hide, text)
    text = _QUERY.sub(hide_in_query, text)
    for pattern in (_CONNECTION_STRING, _SCHEME):
        text = pattern.sub(hide, text)
    return text


# Values: secrets that are known by what they are. The process learns them from its environment and
# from the configs that it reads.

_MIN_SECRET_CHARS = 8
"""Shorter values are switches or numbers, and texts have those too."""
_typed_secrets: set[str] = set()
_environment_values: dict[str, str] = {}
"""Values that a config took from the environment -> the variable's name."""


def note_environment_value(name: str, value: str) -> None:
    """Remember that a config took this value from a variable of the environment."""
    _environment_values[value] = name


def reference_to(value: str) -> str | None:
    """Return the reference that stands for this whole value; None where no config took it."""
    name = _environment_values.get(value)
    return None if name is None else f"${{oc.env:{name}}}"


def remember_secrets(config: Any) -> None:
    """Remember the secrets of a config by their values, so that no other text shows them."""
    texts: set[str] = set()
    _collect_secrets(config, "", False, texts)
    for text in texts - {HIDDEN}:
        _typed_secrets.add(text)
        # An error may show what stands behind the scheme of a header (`Bearer ...`) alone.
        scheme, _, credential = text.partition(" ")
        if credential and scheme.isalpha():
            _typed_secrets.add(credential)


def _collect_secrets(value: Any, name: str, is_open: bool, texts: set[str]) -> None:
    """Add the texts that `redact` hides by their key or their look."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            _collect_secrets(below, str(key), _hides_below(str(key), is_open), texts)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_secrets(item, name, is_open, texts)
    elif isinstance(value, str) and not REFERENCE.search(value):
        if _hides_text(name, is_open):
            texts.add(value)
        else:
            _hide_looks(value, texts)


# Redaction itself.


def redact(value: Any) -> Any:
    """Return a copy of plain values, such as a config, with its secrets hidden."""
    return _redact(value, "", False)


def _redact(value: Any, name: str, is_open: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            redact_text(key) if isinstance(key, str) else key: _redact(
                below, str(key), _hides_below(str(key), is_open)
            )
            for key, below in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, name, is_open) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if not _hides_text(name, is_open):
        return redact_text(value) if isinstance(value, str) else value
    if not isinstance(value, str):
        # A password may be a number; what else is one, such as a loss per token, is no secret.
        return HIDDEN if _NUMERIC_SECRET.search(name) else value
    text = reference_to(value) or _use_references(value)
    # A reference says nothing of the secret, and the run can be repeated by it.
    return text if not value or _is_referenced(text) else HIDDEN


def _hides_below(name: str, is_open: bool) -> bool:
    """Return whether the texts below this key are hidden unless they are known to be harmless."""
    return is_open or name.lower() in _OPEN_MAPPINGS or is_secret_name(name)


def _hides_text(name: str, is_open: bool) -> bool:
    if is_secret_name(name):
        return True
    return is_open and not _HARMLESS_OPTIONS.fullmatch(name.replace("-", "_"))


def _is_referenced(text: str) -> bool:
    """Return whether all but the scheme of a text (`Bearer `) comes from the environment."""
    return REFERENCE.search(text) is not None and (
        re.fullmatch(r"[A-Za-z]* ?", REFERENCE.sub("", text)) is not None
    )


def redact_text(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text for a file: without secrets, and with references to the environment."""
    return redact_message(_use_references(text), environ)


def redact_message(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text for the user: without what is known as a secret or looks like one."""
    return _hide_looks(redact_known(text, environ))


def redact_chat(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings of a chat encoder as they are written.

    Of the template nothing is hidden: it would be another one. What it took from the environment
    is a reference, which is filled in when it is read.
    """
    if settings is None:
        return None
    variables = _with_references(settings.get("variables"))
    rest = {key: value for key, value in settings.items() if key != "template"}
    redacted: dict[str, Any] = redact(rest | {"variables": variables})
    template = _with_references(settings.get("template"))
    return {key: template if key == "template" else redacted[key] for key in settings}


def _with_references(value: Any) -> Any:
    """Return a copy in which all texts that came from the environment are references."""
    if isinstance(value, Mapping):
        return {key: _with_references(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_with_references(item) for item in value]
    return reference_to(value) or _use_references(value) if isinstance(value, str) else value


def redact_known(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text without the values of secrets that this process knows; looks stay.

    It is for text that is data itself, which must be shown as it is.
    """
    for value in _secret_values(tuple(environ.items())):
        if value in text:
            text = text.replace(value, reference_to(value) or HIDDEN)
    for value in sorted(_typed_secrets, key=len, reverse=True):
        if len(value) >= _MIN_SECRET_CHARS:
            text = text.replace(value, reference_to(value) or HIDDEN)
    return text


def redact_override(override: str) -> str:
    """Return an override as it was typed, without the values of secrets.

    A mapping is looked into, in any form of Hydra's grammar; a word that is no override of this
    grammar is looked at as text.
    """
    key, equals, typed = override.partition("=")
    names = re.split(r"[./@:]", key.lstrip("+~"))
    if not equals or not typed:
        return redact_text(override)
    # Hydra's parser takes longer to import than most commands take to answer a mistake.
    if _PLAIN_LIST.fullmatch(typed) and _shows_plain_list(names, typed):
        return f"{redact_text(key)}={typed}"
    # Only what holds other values is taken apart, which is slow.
    value = _parse_value(override) if re.search(r"[{\[(]", typed) else None
    if value is None:
        # One value, several of a sweep, or what cannot be read: one rule for all that stands in it.
        is_secret = _hides_text(names[-1], any(_hides_below(name, False) for name in names[:-1]))
        hidden = HIDDEN if is_secret and not _is_referenced(typed) else _hide_pairs(typed)
        return f"{redact_text(key)}={hidden}"
    nested: Any = value
    for name in reversed(names):
        nested = {name: nested}
    redacted = redact(nested)
    for name in names:
        redacted = redacted[redact_text(name)]
    if redacted == value:
        return f"{redact_text(key)}={typed}"
    if isinstance(value, str):
        return f"{redact_text(key)}={redacted}"
    return f"{redact_text(key)}={_as_override_value(redacted)}"


_PLAIN_LIST = re.compile(r"\[[\w./-]+(?:, *[\w./-]+)*\]", re.ASCII)
"""A list of numbers, constants and words without quotes."""


def _shows_plain_list(names: list[str], typed: str) -> bool:
    """Return whether nothing is hidden in a list that is set for a key of these names.

    Each item is looked at as a text, of which at least as much is hidden as of a number.
    """
    nested: Any = typed[1:-1].replace(" ", "").split(",")
    for name in reversed(names):
        nested = {name: nested}
    return bool(redact(nested) == nested)


def _parse_value(override: str) -> Any:
    """Return what an override sets; None where it cannot be read or is a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
        return None if parsed.is_sweep_override() else parsed.value()
    except (HydraException, ValueError):
        return None


def _as_override_value(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_as_override_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_override_value, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


_NUMERIC_SECRET = re.compile(r"(password|passwd|pwd|passphrase|secret|pin)$", re.IGNORECASE)
_PAIR = re.compile(r"([\w-]+)([\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,{}\[\]\"']+)")


def _hide_pairs(text: str) -> str:
    """Return a text that cannot be parsed without the values behind secret names in it."""
    hidden = _PAIR.sub(lambda m: f"{m[1]}{m[2]}{HIDDEN}" if is_secret_name(m[1]) else m[0], text)
    return redact_text(hidden)


def _use_references(text: str) -> str:
    """Return a text with the values that a config took from the environment as references."""
    for value, name in sorted(_environment_values.items(), key=lambda item: -len(item[0])):
        if len(value) >= _MIN_SECRET_CHARS and value in text and not _is_path(value):
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def holds_token(text: str) -> bool:
    """Return whether a text holds what looks like an access key."""
    return _TOKEN.search(text) is not None


@cache
def _secret_values(environ: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the values of the environment's secrets, longest first; a path to one is none."""
    values = {
        value
        for name, value in environ
        if is_secret_variable(name) and len(value) >= _MIN_SECRET_CHARS and not _is_path(value)
    }
    # The longest first: a secret that is part of another one would leave the rest of that.
    return sorted(values, key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Return whether a value is a file or folder of this machine."""
    try:
        return value.startswith(("/", "~")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or a user that is not there
        return False
