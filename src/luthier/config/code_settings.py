"""The settings that take code of the user's own, what it must be, and its hashes.

`luthier.python_code` finds and loads what a path names; here stands where such paths are written.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from luthier.config.trust import find_code
from luthier.errors import Mistake, format_value
from luthier.python_code import (
    PYTHON_FORMS,
    PYTHON_PREFIX,
    check_python_path,
    find_python_file,
    hash_python_source,
    is_python_path,
    split_python_path,
)


@dataclass(frozen=True)
class CodeSetting:
    """A setting that takes `python:` paths, alone or in a list, with arguments or without.

    An entry with arguments is a mapping: `{python:my.py:Stop: {steps: 3}}`.
    """

    summary: str
    """What the code is, for `--help`."""
    positional: tuple[str, ...] | None = None
    """What it is called with before the arguments of the config; None where that depends on the
    rows, or is checked by what reads the setting."""
    by_name: tuple[str, ...] | None = ()
    """What else it gets where it has an argument of that name; None for columns of the rows."""
    base: str | None = None
    """The class, by its dotted name, that it must derive from."""
    only_code: bool = False
    """Whether nothing else than code can stand there."""
    is_list: bool = True
    """Whether several can stand there."""


LOADER_ARGUMENTS = (
    "dtype", "device_map", "attn_implementation", "revision", "trust_remote_code",
    "local_files_only",
)  # fmt: skip
"""What the function of `model.loader` gets besides the path, where it takes it by that name."""

CODE_SETTINGS: dict[str, CodeSetting] = {
    "model.loader": CodeSetting(
        "a function that loads the model",
        ("path",),
        LOADER_ARGUMENTS,
        only_code=True,
        is_list=False,
    ),
    "dataset.path": CodeSetting("a function that yields rows"),
    "dataset.map": CodeSetting("a function of a row", ("row",), only_code=True, is_list=False),
    "trainer.method": CodeSetting(
        "a class of a transformers.Trainer", base="transformers.Trainer", is_list=False
    ),
    "trainer.callbacks": CodeSetting(
        "classes of transformers.TrainerCallback",
        (),
        base="transformers.TrainerCallback",
        only_code=True,
    ),
    "trainer.loss": CodeSetting(
        "a function of log_probs, labels and columns that gives each token's loss",
        ("log_probs", "labels"),
        by_name=None,
        only_code=True,
        is_list=False,
    ),
    "trainer.optimizer.name": CodeSetting(
        "a function of the model that gives an optimizer or parameter groups", ("model", "args")
    ),
    "trainer.evaluation.metrics": CodeSetting("a function that scores replies"),
    "trainer.rewards": CodeSetting("a function that rewards completions"),
    "trainer.tools": CodeSetting("functions that the model may call", only_code=True),
    "trainer.environment": CodeSetting("a class that the model acts in", only_code=True),
}
"""Every setting that takes code; those of `dataset` stand in each of its sources, too."""


class CodeEntry(NamedTuple):
    """A path of code and the arguments that the config gives it."""

    path: str
    arguments: dict[str, Any]


def read_code_entries(value: Any) -> list[CodeEntry]:
    """Return the code that a setting names: a path, `{path: {argument: value}}`, or a list of them.

    What names no code, such as the name of a metric, is not among it. Raises ValueError, with words
    that follow the setting's name, for arguments that are no mapping.
    """
    if isinstance(value, list | tuple):
        return [entry for item in value for entry in read_code_entries(item)]
    if isinstance(value, Mapping):
        entries = []
        for path, arguments in value.items():
            if not is_python_path(path):
                continue
            if not isinstance(arguments, Mapping | None):
                raise ValueError(
                    f"the arguments of {path} are to be a mapping of names to values, and not "
                    f"{format_value(arguments)}"
                )
            entries.append(CodeEntry(str(path), dict(arguments or {})))
        return entries
    return [CodeEntry(value, {})] if is_python_path(value) else []


def check_code_settings(resolved: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield what is wrong with the code that a config names, without running any of it."""
    for name, setting in CODE_SETTINGS.items():
        for key, value in _settings_named(resolved, name):
            for text in _check_value(value, setting):
                yield Mistake(key, text)


def _settings_named(resolved: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yield a setting where it is set: its key and value; one of a source in each source."""
    group, *path = name.split(".")
    places = {group: resolved.get(group)}
    if group == "dataset":
        for below in ("sources", "eval.sets"):
            sources = _get(resolved, [group, *below.split(".")])
            if isinstance(sources, Mapping):
                places |= {f"{group}.{below}.{key}": source for key, source in sources.items()}
    for place, settings in places.items():
        value = _get(settings, path)
        if value is not None:
            yield ".".join([place, *path]), value


def _get(value: Any, path: list[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _check_value(value: Any, setting: CodeSetting) -> Iterator[str]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        names = (list(item) or [item]) if isinstance(item, Mapping) else [item]
        if len(names) > 1 and not setting.is_list:
            yield f"{', '.join(map(format_value, names))} are several; write one of them."
        for name in names:
            if setting.only_code and not is_python_path(name):
                yield f"{format_value(name)} names no code. Write {PYTHON_FORMS}."
    try:
        entries = read_code_entries(value)
    except ValueError as error:
        yield f"{error}."
        return
    for entry in entries:
        # A class of that base is made with the arguments of the config alone.
        arguments = entry.arguments if setting.positional is not None else None
        problem = check_python_path(
            entry.path,
            arguments,
            positional=setting.positional or (),
            by_name=setting.by_name,
            base=setting.base,
        )
        if problem:
            yield problem


# Files beside a recipe.


def resolve_code_paths(value: Any, find_folder: Callable[[str], Path | None], key: str = "") -> Any:
    """Return a config whose relative `python:file.py:name` are relative to the working folder.

    A file is looked for beside the YAML file that names it first, whose folder `find_folder` gives
    for a setting (None for one that was typed), and then in the working folder.
    """
    if isinstance(value, Mapping):
        return {
            _resolve_code_path(name, find_folder, key): resolve_code_paths(
                below, find_folder, f"{key}.{name}" if key else str(name)
            )
            for name, below in value.items()
        }
    if isinstance(value, list):
        return [resolve_code_paths(item, find_folder, key) for item in value]
    return _resolve_code_path(value, find_folder, key)


def _resolve_code_path(text: Any, find_folder: Callable[[str], Path | None], key: str) -> Any:
    if not is_python_path(text):
        return text
    parsed = split_python_path(text)
    if parsed.file is None or parsed.file.is_absolute():
        return text
    folder = find_folder(key)
    if folder is None or not (folder / parsed.file).is_file():
        return text
    file, here = (folder / parsed.file).resolve(), Path.cwd()
    shown = file.relative_to(here) if file.is_relative_to(here) else file
    return f"{PYTHON_PREFIX}{shown}:{parsed.name}"


# What a run says and records of it.


def describe_code(config: Mapping[str, Any]) -> str | None:
    """Return the line that a run begins with where its config brings code; None for others."""
    sentences = []
    for reference in dict.fromkeys(find_code(config)):
        file = find_python_file(reference.text) if is_python_path(reference.text) else None
        effect = reference.effect
        if file and split_python_path(reference.text).file is None:
            effect = f"runs {reference.text} ({file})"
        elif file:
            effect = f"runs {reference.text}"
        sentences.append(f"{reference.key} {effect}")
    return f"code      {'; '.join(sentences)}" if sentences else None


class CodeSource(TypedDict):
    """The source of some code, as a run's record has it."""

    settings: list[str]
    """The settings that name it."""
    sha256: str | None
    """The hash of its source; None for code that has none in Python."""


def hash_code(config: Mapping[str, Any]) -> dict[str, CodeSource]:
    """Return each `python:` path of a config with its settings and the SHA-256 of its source."""
    sources: dict[str, CodeSource] = {}
    for reference in find_code(config):
        if not is_python_path(reference.text):
            continue
        if reference.text not in sources:
            sha256 = hash_python_source(reference.text)
            sources[reference.text] = {"settings": [], "sha256": sha256}
        if reference.key not in sources[reference.text]["settings"]:
            sources[reference.text]["settings"].append(reference.key)
    return sources
