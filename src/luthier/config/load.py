"""Load a run's configuration: compose, resolve, check everything, and say every mistake at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from luthier.config import cross_checks, passthrough, recipes
from luthier.config.code_settings import resolve_code_paths
from luthier.config.compose import (
    ComposedConfig,
    compose_config,
    parse_overrides,
    resolve_config,
    resolve_for_record,
)
from luthier.config.env_references import put_references
from luthier.config.recipes import list_options
from luthier.config.schema import GROUPS, RunConfig
from luthier.config.trust import Trust, check_composed_code, typed_keys
from luthier.config.validate import describe_key, validate_config
from luthier.errors import Mistake, UserError
from luthier.redaction import remember_secrets
from luthier.storage.typed_files import compose_yaml


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration, the same as plain values, and the overrides as they were typed."""

    config: RunConfig
    resolved: dict[str, Any]
    overrides: list[str]
    recorded: dict[str, Any]
    """What is written of it: `resolved` with `${oc.env:NAME}` for what came from the environment.
    Its secrets are hidden when it is written."""
    began: float | None = None
    """When the command began, by `time.monotonic`; None where nobody has noted it."""


def load_config(overrides: Iterable[str], is_trusted: bool = False) -> LoadedConfig:
    """Compose and validate a configuration without importing any of the training libraries.

    `overrides` are the words of the command line, such as `recipe=quickstart` and `lora.r=8`.
    `is_trusted` lets recipes name code that is not the user's own (`--trust`). Raises UserError
    with all mistakes, each with its key, its place and what to do.
    """
    typed = list(overrides)
    return check_composed(compose_config(typed), typed, is_trusted)


def check_composed(
    composed: ComposedConfig, overrides: list[str], is_trusted: bool = False
) -> LoadedConfig:
    """Check a composed configuration and freeze it; raises UserError with all mistakes."""
    resolved = resolve_code_paths(resolve_config(composed), lambda key: _find_folder(key, composed))
    # Before anything is said of it: a message shows values.
    remember_secrets(resolved)
    pass_through_mistakes = passthrough.check_pass_through(resolved)
    empty = [Mistake(key, _no_value(key)) for key in _unset(resolved)]
    config, wrong = validate_config(resolved)
    together = [] if composed.unsure else cross_checks.check_combinations(resolved)
    mistakes = [*_grouped(composed, empty + wrong), *pass_through_mistakes, *together]
    mistakes = [mistake for mistake in mistakes if not _hidden(mistake, composed.unsure)]
    mistakes = composed.mistakes + _once(mistakes, {m.key for m in composed.mistakes})
    if mistakes or config is None:
        raise UserError(format_mistakes(mistakes, composed))
    resolved = config.model_dump(mode="json")
    typed = [(word.key, word.value) for word in parse_overrides(overrides)[0] if not word.is_group]
    trust = Trust(is_trusted, typed_keys(typed))
    check_composed_code(resolved, trust, lambda key: find_origin(key, composed))
    recorded = put_references(resolved, resolve_for_record(composed))
    return LoadedConfig(config, resolved, overrides, recorded)


def format_mistakes(mistakes: list[Mistake], composed: ComposedConfig) -> str:
    """Return the message: a line for each mistake, and where it was written."""
    lines = []
    for mistake in mistakes:
        where = find_origin(mistake.key, composed)
        lines.append(f"  {mistake.key}: {mistake.text}" + (f"  [{where}]" if where else ""))
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n".join([f"{count} in the configuration; nothing was run.", *lines])


def find_origin(key: str, composed: ComposedConfig) -> str | None:
    """Return the file and line in which a key was written; None if it was typed or nowhere."""
    place = _find_place(key, composed)
    return None if place is None else f"{recipes.format_path(place[0])}:{place[1]}"


def _find_folder(key: str, composed: ComposedConfig) -> Path | None:
    """Return the folder of the file in which a key was written; None as `find_origin` has it."""
    place = _find_place(key, composed)
    return None if place is None else place[0].parent


def _find_place(key: str, composed: ComposedConfig) -> tuple[Path, int] | None:
    typed = any(key == word or word.startswith(f"{key}.") for word in composed.keys_typed)
    if typed or key in (*GROUPS, "recipe"):
        return None
    for start, path in composed.files():
        below = key.removeprefix(f"{start}.") if start else key
        if below != key or not start:
            line = _line(path.read_text(encoding="utf-8"), below.split("."))
            if line:
                return path, line
    return None


def _line(text: str, path: list[str]) -> int | None:
    node, line = compose_yaml(text), None
    for component in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        matches = [(key, below) for key, below in node.value if key.value == component]
        if not matches:
            return None
        line, node = matches[-1][0].start_mark.line + 1, matches[-1][1]
    return line


def _unset(node: Any, key: str = "") -> list[str]:
    if node == "???":
        return [key]
    if not isinstance(node, dict):
        return []
    return [
        key_below
        for name, below in node.items()
        for key_below in _unset(below, f"{key}.{name}".lstrip("."))
    ]


def _no_value(key: str) -> str:
    if key in GROUPS:
        return f"nothing is chosen. Add {key}=NAME: {', '.join(list_options(key))}."
    *path, name = key.split(".")
    model: Any = RunConfig
    for component in path:
        # A name that is no field is the user's own, of a source or an evaluation set.
        if model and (field := model.model_fields.get(component)):
            classes = [field.annotation, *get_args(field.annotation)]
            models = [c for c in classes if isinstance(c, type) and issubclass(c, BaseModel)]
            model = models[0] if models else None
    text = describe_key(model, name) if model else ""
    return f"has no value. Add {key}=VALUE. {text}".rstrip()


def _grouped(composed: ComposedConfig, mistakes: list[Mistake]) -> list[Mistake]:
    """Say it in one line when neither a recipe nor a model nor a dataset was chosen."""
    bare = {mistake.key for mistake in mistakes} >= {"model", "dataset"}
    if not bare or composed.chain.files or "recipe" in composed.unsure:
        return mistakes
    other_mistakes = [mistake for mistake in mistakes if mistake.key not in ("model", "dataset")]
    text = (
        "nothing is chosen. Add recipe=NAME: recipe=quickstart trains a small model on any "
        "machine, and `luthier recipes` lists all. Or choose both model=NAME and dataset=NAME, "
        "such as model=hub model.path=Qwen/Qwen3-0.6B dataset=files dataset.path=my.jsonl."
    )
    return [Mistake("recipe", text), *other_mistakes]


def _hidden(mistake: Mistake, unsure: set[str]) -> bool:
    """Say whether a mistake may only follow from another one that is reported already."""
    group = mistake.key.split(".")[0]
    return (
        group in unsure or mistake.key in unsure or ("recipe" in unsure and _about_choice(mistake))
    )


def _about_choice(mistake: Mistake) -> bool:
    return mistake.key in (*GROUPS, "recipe") or "no value" in mistake.text


def _once(mistakes: list[Mistake], mentioned: set[str]) -> list[Mistake]:
    """Keep the first mistake of each key."""
    first = {mistake.key: mistake for mistake in reversed(mistakes) if mistake.key not in mentioned}
    return [mistake for mistake in mistakes if first.get(mistake.key) is mistake]
