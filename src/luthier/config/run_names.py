"""The names of run folders: short, readable, typed without quotes, and the same on every rank."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from luthier.redaction import redact_override, redact_text

_SAME_RUN = {"name", "output_dir", "dry_run", "overwrite", "tracker", "recipe", "hydra"}
"""Keys that do not change what is trained, and so not the name of the run."""

_LONGEST_NAME = 60
_LONGEST_VALUE = 24
_LONGEST_GROUP_PART = 32
_LONGEST_RECIPES = 64
_HASH_DIGITS = 6
_GENERIC_FOLDERS = ("model", "default", "merged", "data", "train")
"""Names that say nothing of a model or a dataset by themselves: the folder above is named, too."""
_SUFFIXES = re.compile(
    r"(\.(jsonl|json|ndjson|csv|tsv|parquet|arrow|txt|gguf|gz|bz2|xz|zst|zip))+\Z", re.IGNORECASE
)


def run_folder(config: Mapping[str, Any], overrides: Iterable[str], within: str = "") -> str:
    """Return the folder of a run whose config names none: `runs/<group>/<within>/<name>`.

    `config` is a composed config as plain values, in which interpolations may still stand. The
    name is the config's `name`, or made of the overrides (`run_name`).
    """
    groups = () if config.get("recipe") else ("model", "dataset")
    in_group = [key for group in groups if config.get(group) for key in (group, f"{group}.path")]
    name = config.get("name") or run_name(overrides, in_group)
    return "/".join(filter(None, ("runs", run_group(config), within, str(name))))


def run_group(config: Mapping[str, Any]) -> str:
    """Return the folder that the runs of one recipe share; without one, `<model>-<data>`."""
    if config.get("recipe"):
        return _cut_at_dash(str(config["recipe"]), _LONGEST_RECIPES)
    model, dataset = config.get("model"), config.get("dataset")
    model_path = model.get("path") if isinstance(model, Mapping) else None
    parts = [_path_name(model_path), _dataset_name(dataset)]
    return "-".join(part for part in parts if part) or "custom"


def run_name(overrides: Iterable[str], left_out: Collection[str] = ()) -> str:
    """Return the run folder's name for these overrides, whatever order they were typed in.

    `default` without overrides, else the last part of each key with its value, as far as they fit,
    and six hex digits of the hash of all overrides: `r-8-learning_rate-0.0005-3f2a1c`. The keys
    `left_out` count in the hash alone. The name is never random, and no shell and no override
    needs quotes for it.
    """
    # A folder's name stands everywhere, and must hold no secret that was typed.
    lines = [redact_override(line).lstrip("+") for line in overrides if _changes_the_run(line)]
    if not lines:
        return "default"
    # Of one key the last value counts, so their order stays.
    lines.sort(key=_key)
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:_HASH_DIGITS]
    words = _readable_words([line for line in lines if _key(line) not in left_out])
    return f"{_join_fitting(words) or 'default'}-{digest}"


def _changes_the_run(line: str) -> bool:
    return re.split(r"[./]", _key(line), maxsplit=1)[0] not in _SAME_RUN


def _key(line: str) -> str:
    """Return the key of an override; an empty text for a word without a value."""
    bare = line.lstrip("+~")
    return re.split(r"[=@]", bare, maxsplit=1)[0] if re.search("[=@]", bare) or bare != line else ""


def _readable_words(lines: list[str]) -> list[str]:
    """Return a word for each override: `r-8` for `lora.r=8`, `no-r` for `~lora.r`."""
    keys = [_key(line).split(".") for line in lines]
    words = []
    for line, key in zip(lines, keys, strict=True):
        others = {tuple(other) for other in keys} - {tuple(key)}
        count = 1
        while count < len(key) and any(other[-count:] == tuple(key[-count:]) for other in others):
            count += 1
        _, equals, value = line.partition("=")
        short_key = ".".join(key[-count:])
        if line.startswith("~"):
            text = f"no-{short_key}"
        else:
            text = f"{short_key}-{_short_value(value)}" if equals else line
        words.append(_safe(text))
    return [word for word in words if word]


def _join_fitting(words: list[str]) -> str:
    """Join as many words as fit into a name, and say how many more there are."""
    room = _LONGEST_NAME - _HASH_DIGITS - 1
    name = "-".join(words)
    for count in range(len(words) - 1, 0, -1):
        if len(name) <= room:
            break
        # A word that is cut could show another number than the one that was typed.
        name = "-".join([*words[:count], f"and-{len(words) - count}-more"])
    return name if len(name) <= room else _safe(name[:room])


def _short_value(value: str) -> str:
    """Return a value as it stands in a name: of a path its last part."""
    # Without this, 1e+3 would read 1e-3.
    value = re.sub(r"(?<=[0-9]e)\+(?=[0-9])", "", value.strip("\"'"), flags=re.IGNORECASE)
    if re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", value, re.IGNORECASE):
        return value
    if re.search(r"[/\\]", value) and not re.search(r"[\[{(,]", value):
        value = _path_name(value)
    return _cut_at_dash(_safe(value), _LONGEST_VALUE)


def _cut_at_dash(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    head, dash, _ = text[: length + 1].rpartition("-")
    return head if dash else text[:length]


def _dataset_name(dataset: Any) -> str:
    if not isinstance(dataset, Mapping):
        return ""
    sources, path = dataset.get("sources"), dataset.get("path")
    if isinstance(sources, Mapping) and sources:
        return _cut_at_dash(_safe("-".join(map(str, sources))), _LONGEST_GROUP_PART)
    return _path_name(path[0] if isinstance(path, list) and path else path)


def _path_name(path: Any) -> str:
    """Return what a path, an address or a repository is called: its last part that says so."""
    text = redact_text(str(path or "")).replace("${oc.env:", "").split("?")[0]
    text = re.sub(r"\A[a-z]\w+:(//)?", "", text)
    name = ""
    for part in reversed(re.split(r"[/\\]", text)):
        word = _safe(_SUFFIXES.sub("", part))
        name = "-".join(filter(None, (word, name)))
        if word and word not in _GENERIC_FOLDERS:
            break
    return _cut_at_dash(_safe(name), _LONGEST_GROUP_PART)


def _safe(text: str) -> str:
    """Return a text with `-` for what a shell or a file system could take for something else."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("${oc.env:", ""))
    return text.lstrip("-._").rstrip("-._")
