"""A resolved config against the schema: the mistakes that pydantic finds, in luthier's words."""

import difflib
import os
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from luthier.config import library_fields
from luthier.config.foreign_settings import FOREIGN_SETTINGS, explain_foreign_key
from luthier.config.passthrough import PASS_THROUGH_KEYS
from luthier.config.recipes import list_options
from luthier.config.renamed_settings import new_key, new_value
from luthier.config.schema import GROUPS, RunConfig
from luthier.errors import Mistake, format_override, format_value, nearest_option, suggest_options
from luthier.storage.typed_files import parse_config_yaml

_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (put it in quotes)",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def validate_config(resolved: dict[str, Any]) -> tuple[RunConfig | None, list[Mistake]]:
    """Return the config, or what keeps it from being one."""
    _build_models()
    try:
        return RunConfig.model_validate(resolved), []
    except ValidationError as error:
        return None, list(_mistakes(error.errors(include_url=False)))


@cache
def _build_models() -> None:
    """Build pydantic's validator of a config.

    pydantic (2.14) reads the metadata of every installed package for plugins when it builds the
    first model: 25 ms for 200 packages. Models that are built later look for them again.
    """
    name = "PYDANTIC_DISABLE_PLUGINS"
    disabled = os.environ.get(name)
    os.environ[name] = "__all__"
    try:
        RunConfig.model_rebuild()
    finally:
        os.environ.pop(name)
        if disabled is not None:
            os.environ[name] = disabled


def _mistakes(errors: Sequence[ErrorDetails]) -> Iterator[Mistake]:
    seen = set()
    for error in errors:
        model, path = _locate_error(error["loc"])
        key = ".".join(path)
        if key not in seen:
            yield Mistake(key, _describe_error(error, model, path))
        seen.add(key)


def _locate_error(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """Return the innermost model on the way, and the key without pydantic's names of unions."""
    model: type[BaseModel] = RunConfig
    path = []
    location = iter(loc)
    for component in location:
        path.append(str(component))
        field = model.model_fields.get(str(component))
        inner = None if field is None else _inner(field.annotation)
        if inner is None:
            break
        model, is_named = inner
        if is_named:
            # A mapping of names to groups, such as dataset.sources.
            path += [str(name) for name in islice(location, 1)]
    return model, path


def _inner(annotation: Any) -> tuple[type[BaseModel], bool] | None:
    """The group that a field holds, and whether it holds several by name; None for a value."""
    is_named = get_origin(annotation) is dict
    inner_type = get_args(annotation)[1] if is_named else annotation
    is_group = isinstance(inner_type, type) and issubclass(inner_type, BaseModel)
    return (inner_type, is_named) if is_group else None


def _describe_error(error: ErrorDetails, model: type[BaseModel], path: list[str]) -> str:
    error_type, typed_value = error["type"], format_value(error["input"])
    if error_type == "missing":
        return _missing(path, describe_key(model, path[-1]))
    if error_type == "extra_forbidden":
        return _extra(model, path, error["input"])
    if error_type == "literal_error":
        if new := new_value(".".join(path), error["input"]):
            return f"{typed_value} is called {new} now. Write {path[-1]}: {new}."
        allowed = _allowed(model, path[-1])
        return f"{typed_value} is not an option. {suggest_options(str(error['input']), allowed)}"
    if error_type == "value_error":
        return f"{typed_value} does not fit: {error['ctx']['error']}."
    if error_type in _BOUNDS:
        bound, than = _BOUNDS[error_type]
        limit = error["ctx"][bound]
        limit_text = f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
        return f"{typed_value} is out of range: it must be {than} {limit_text}."
    expected = _TYPE_NAMES.get(error_type.split("_")[0])
    one_of_several = len(error["loc"]) > len(path) and isinstance(error["loc"][len(path)], str)
    if expected is None or one_of_several:
        return f"{typed_value} does not fit. {describe_key(model, path[-1])}"
    return f"{typed_value} is not {expected}.{_show_form('.'.join(path), expected, error['input'])}"


def _show_form(key: str, expected: str, value: object) -> str:
    """Return a sentence with a list or a mapping as it is typed, where a text stands for one."""
    if not isinstance(value, str) or not value:
        return ""
    if expected == _TYPE_NAMES["list"]:
        return f" Write {format_override(key, [value])}."
    # bash takes {a: b,c: d} without quotes apart, into two settings.
    if expected == _TYPE_NAMES["dict"]:
        name, _, text = (part.strip() for part in value.partition(":"))
        is_pair = name.isidentifier() and text
        form = format_override(key, {name: text} if is_pair else {"name": "value"})
        return f" Write it in quotes: {form}."
    return ""


def describe_key(model: type[BaseModel], name: str) -> str:
    """Return what the schema says about a key."""
    for each in model.__mro__:
        if each.__module__.startswith("luthier."):
            file = f"{each.__module__.removeprefix('luthier.').replace('.', '/')}.py"
            texts = library_fields.read_field_docs("luthier", file, each.__name__)
            if text := texts.get(name):
                return " ".join(text.split())
    return ""


def _missing(path: list[str], text: str) -> str:
    (group, *rest) = path
    if not rest and group in GROUPS:
        return f"nothing is chosen. Add {group}=NAME: {', '.join(list_options(group))}."
    return f"has no value. Add {'.'.join(path)}=VALUE. {text}".rstrip()


def _extra(model: type[BaseModel], path: list[str], value: object) -> str:
    key = ".".join(path)
    if new := new_key(key):
        return f"this key is called {new} now."
    if answer := explain_foreign_key(key, value):
        return f"there is no such key. {answer}"
    name, field_names = path[-1], list(model.model_fields)
    if elsewhere := [key for key in _all_keys() if key.split(".")[-1] == name]:
        return f"there is no such key. Did you mean {elsewhere[0]}?"
    close = nearest_option(name, field_names)
    if close:
        return f"there is no such key. Did you mean {'.'.join([*path[:-1], close])}?"
    if len(path) == 1 and (answer := _nearest_elsewhere(name, value)):
        return f"there is no such key. {answer}"
    return f"there is no such key. Keys here: {', '.join(field_names)}."


def _nearest_elsewhere(name: str, value: object) -> str | None:
    """Return the answer to a name that is nearly one of a key in a group, or of another trainer."""
    keys = {key.rpartition(".")[2]: key for key in reversed(list(_all_keys()))}
    # Among so many names only a slip of the finger is surely meant: pad_token is not add_tokens.
    near = difflib.get_close_matches(name.lower(), [*keys, *FOREIGN_SETTINGS], n=1, cutoff=0.88)
    if not near:
        return None
    key = keys.get(near[0])
    return f"Did you mean {key}?" if key else explain_foreign_key(near[0], value)


def suggest_setting(flag: str, value: str) -> str | None:
    """Return the setting that was meant by a flag such as `--model x` or `--batch-size=4`.

    None where no key has its name, here or in another trainer.
    """
    name = flag.lstrip("-").replace("-", "_")
    key = name if name in (*GROUPS, *RunConfig.model_fields) else None
    if foreign := None if key else FOREIGN_SETTINGS.get(name):
        words = foreign.overrides(read_value(value)) if value else []
        if not value and "true" in foreign.values:
            words = foreign.overrides(True)
        return " ".join(words) or f"{foreign.keys[0]}=VALUE" if foreign.keys else None
    keys = [each for each in _all_keys() if name in (each, each.split(".")[-1])]
    key = key or next(iter(keys), None)
    if key and not value:
        is_switch = key in RunConfig.model_fields and RunConfig.model_fields[key].annotation is bool
        return f"{key}={'true' if is_switch else 'VALUE'}"
    return key and format_override(key, read_value(value))


def read_value(text: str) -> Any:
    """Return what a typed value is as YAML; the text itself where it is none."""
    try:
        return parse_config_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text


def _all_keys() -> Iterator[str]:
    yield from _keys_below(RunConfig, "")
    for library in PASS_THROUGH_KEYS:
        yield from (f"{library.key}.{name}" for name in library.fields() or {})


def _keys_below(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys_below(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _allowed(model: type[BaseModel], name: str) -> list[str]:
    field = model.model_fields[name]
    return [text for text in _literals(field.annotation) if isinstance(text, str)]


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is typing.Literal:
        yield from get_args(annotation)
        return
    for argument in get_args(annotation):
        if argument is not NoneType:
            yield from _literals(argument)
