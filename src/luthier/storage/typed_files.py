"""JSON, YAML and JSONL files read as the types that they must have, or an error in words.

Whatever luthier reads from a folder that it or somebody else wrote comes through here: a file may
be cut, edited, replaced by a folder or made to do harm, and then the error says which file, which
key, what is wrong with it and what to do.
"""

import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from luthier.errors import UserError, format_value

MAX_BYTES = 2**28
"""Bytes of the largest file that is read whole."""
MAX_LINE_BYTES = 2**24
"""Bytes of the longest line of a JSONL file."""
MAX_VALUES = 2_000_000
"""Values in one file: a few lines of YAML with aliases can stand for billions."""
MAX_DEPTH = 100
"""Lists and mappings within each other: what walks them goes one call deeper for each."""

TOO_DEEP = f"lists and mappings stand within each other in it, more than {MAX_DEPTH} deep"
_EXPECTED = {
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}
"""Words for the types of JSON and YAML, by the name of pydantic's error."""
FEW_VALUES = 1_000
"""Values that YAML may stand for by its aliases, however short it is."""


class ExcessiveYamlError(yaml.MarkedYAMLError):
    """A text of YAML stands for more values than anybody writes, or for endless ones."""


def parse_yaml(text: str, name: str = "", limit: int | None = None) -> Any:
    """Return the value of a text of YAML that stands for at most `limit` values.

    Without a limit that is as many as it could hold without aliases, a character each.
    Some lines of aliases (`*name`) or merges (`<<`) stand for billions of values, so they are
    counted before any is made. `name` is the file's, for the error. Raises yaml.YAMLError, and
    ValueError for a number or a date that is none.
    """
    check_yaml_size(text, name, limit)
    return yaml.safe_load(text)


def check_yaml_size(text: str, name: str = "", limit: int | None = None) -> None:
    """Raise yaml.YAMLError, by the rules of `parse_yaml`, for a text that stands for too much."""
    try:
        root = compose_yaml(text, name)
    except RecursionError:
        raise _excessive_yaml(TOO_DEEP, name) from None
    check_tree_size(root, limit or max(len(text), FEW_VALUES), name)


def check_tree_size(root: yaml.Node | None, limit: int, name: str = "") -> None:
    """Raise yaml.YAMLError for the tree of a text that stands for more than `limit` values."""
    try:
        count, depth = (0.0, 0.0) if root is None else _measure_yaml(root, {})
    except RecursionError:
        count, depth = 0.0, math.inf
    if count > limit:
        many = f"it stands for more than {limit:,} values; aliases (*name) repeat many"
        raise _excessive_yaml(many, name)
    if depth > MAX_DEPTH:
        raise _excessive_yaml(TOO_DEEP, name)


def _excessive_yaml(problem: str, name: str) -> ExcessiveYamlError:
    return ExcessiveYamlError(problem=problem, problem_mark=yaml.Mark(name, 0, 0, 0, None, 0))


_MOST_CHARS, _MOST_OPENED = 100_000, 2_000
"""Texts of so many characters and brackets or dashes at most are read by libyaml: it follows every
level with a call of its own, and these have two thousand levels at most."""


@lru_cache(maxsize=64)
def compose_yaml(text: str, name: str = "", loader: Any = None) -> yaml.Node | None:
    """Return the tree of a text of YAML, read by libyaml where that is safe: ten times as fast.

    `name` is the file's, for the error. Errors of libyaml have other words than those of
    `yaml.SafeLoader`, so a text with an error is read by that. Raises yaml.YAMLError.
    """
    opened = sum(text.count(mark) for mark in ("[", "{", "- ", "? "))
    if yaml.__with_libyaml__ and len(text) < _MOST_CHARS and opened < _MOST_OPENED:
        with suppress(yaml.YAMLError):
            return yaml.compose(text, loader or yaml.CSafeLoader)
    stream = io.StringIO(text)
    # What yaml calls the text in its errors.
    stream.name = name
    return yaml.compose(stream, yaml.SafeLoader)


def parse_config_yaml(text: str) -> Any:
    """Return the value of a text of YAML as OmegaConf reads it; an empty mapping for no text.

    Raises yaml.YAMLError, for a text that stands for too much as well, and ValueError for a key
    that stands twice.
    """
    node = compose_yaml(text, loader=_config_loader())
    # Before a value is made: a few lines of aliases stand for billions.
    check_tree_size(node, max(len(text), FEW_VALUES))
    value = _config_loader()("").construct_document(node) if node else None
    return {} if value is None else value


@cache
def _config_loader() -> Any:
    """Return a YAML loader that reads as OmegaConf's does (2.3), on libyaml where that is there.

    As there, numbers may have an exponent without a dot (1e-4), dates stay texts, and no key stands
    twice in a mapping.
    """
    base: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

    class ConfigLoader(base):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, regex) for tag, regex in resolvers if not tag.endswith("timestamp")]
            for first, resolvers in base.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            names = [name.value for name, _ in node.value]
            if len(names) != len({str(name) for name in names}):
                raise ValueError("a key stands twice")
            return super().construct_mapping(node, deep=deep)

    ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return ConfigLoader


_FLOAT = re.compile(
    r"^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?"
    r"|[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN))$"
)


def _measure_yaml(node: yaml.Node, sizes: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return how many values a node stands for with each alias written out, and how deep they are.

    `sizes` has those of the nodes that were measured, by their ids.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) not in sizes:
        sizes[id(node)] = math.inf, math.inf  # for an alias of the node within itself
        is_mapping = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if is_mapping else node.value
        inner = [_measure_yaml(child, sizes) for child in children]
        depth = 1 + max((depth for _, depth in inner), default=0)
        sizes[id(node)] = 1 + sum(count for count, _ in inner), depth
    return sizes[id(node)]


_PARSERS: dict[str, Callable[[str], Any]] = {
    "JSON": json.loads,
    "YAML": lambda text: parse_yaml(text, limit=MAX_VALUES),
}


class DamagedFileError(UserError):
    """A file cannot be read as what it should be; the text names it and says what is wrong."""


def has_entry(path: Path) -> bool:
    """Return whether a folder has this name, be it a file, a folder, a pipe or a broken link.

    Where a name says what a folder is, something else under it is damage and not absence.
    """
    return path.is_symlink() or path.exists()


def load_json(path: Path, schema: Any, advice: str = "") -> Any:
    """Return the value of a JSON file as it stands there; None where there is no such file.

    `schema` is the type that the value must have, to the letter (no text for a number): a model of
    pydantic, a dataclass, a TypedDict, `list[int]` and so on. `advice` is a sentence on what to do
    about a damaged file. Raises DamagedFileError for everything else.
    """
    return _load(path, schema, advice, "JSON")


def load_yaml(path: Path, schema: Any, advice: str = "") -> Any:
    """Return the value of a YAML file, by the rules of `load_json`."""
    return _load(path, schema, advice, "YAML")


def load_json_lines(path: Path, schema: Any, advice: str = "") -> list[Any]:
    """Return the values of a file with one JSON value a line; none where there is no such file.

    The rest of a line that its writer was killed in (the last one, without a line feed) is left
    out. Raises DamagedFileError for any other line that does not have the type of `schema`.
    """
    if _size(path, advice) is None:
        return []
    values = []
    for number, line in enumerate(_read_lines(path, advice), start=1):
        if line.endswith(b"\n") and not line.isspace():
            values.append(_parse(f"{path}:{number}", line, schema, advice, "JSON"))
    return values


def parse_json(where: str, content: bytes, schema: Any, advice: str = "") -> Any:
    """Return the value of JSON that is no file of its own, by the rules of `load_json`.

    `where` is what the error begins with.
    """
    return _parse(where, content, schema, advice, "JSON")


def check_value(where: str, value: Any, schema: Any, advice: str = "") -> None:
    """Raise DamagedFileError, beginning with `where`, unless a value has the type of `schema`."""
    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise _damage(where, _describe_mistake(error, value), advice) from error


def _load(path: Path, schema: Any, advice: str, language: str) -> Any:
    size = _size(path, advice)
    if size is None:
        return None
    if size > MAX_BYTES:
        raise _damage(path, f"it has {size:,} bytes, and no such file is so large", advice)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damage(path, f"it cannot be read: {error.strerror or error}", advice) from error
    return _parse(path, content, schema, advice, language)


def _parse(where: object, content: bytes, schema: Any, advice: str, language: str) -> Any:
    """Return the value of the content, which has the type of `schema`."""
    if not content.strip():
        raise _damage(where, "it is empty", advice)
    try:
        value = _PARSERS[language](content.decode("utf-8"))
        problem = find_excess(value)
    except UnicodeDecodeError as error:
        raise _damage(where, f"byte {error.start + 1:,} is no UTF-8 text", advice) from error
    except yaml.YAMLError as error:
        raise _damage(where, f"it is no YAML: {_one_line(error)}", advice) from error
    except RecursionError as error:
        raise _damage(where, TOO_DEEP, advice) from error
    except ValueError as error:
        raise _damage(where, f"it is no {language}: {error}", advice) from error
    if problem is not None:
        raise _damage(where, problem, advice)
    try:
        if language == "JSON":
            # From its text, a dataclass may be an object and a tuple an array.
            _adapter(schema).validate_json(content, strict=True)
        else:
            _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise _damage(where, _describe_mistake(error, value), advice) from error
    return value


def _size(path: Path, advice: str) -> int | None:
    """Return the bytes of a file; None where the folder has no such name.

    Raises DamagedFileError for what is no file: a pipe, for one, would be read without an end.
    """
    try:
        state = path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        problem = f"it cannot be opened: {os.strerror(error.errno or 0)}"
        raise _damage(path, problem, advice) from error
    if not stat.S_ISREG(state.st_mode):
        is_folder = stat.S_ISDIR(state.st_mode)
        raise _damage(path, f"it is {'a folder' if is_folder else 'a device'}, no file", advice)
    return state.st_size


def _read_lines(path: Path, advice: str) -> Iterator[bytes]:
    """Yield the lines of a file with their line feeds."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    problem = f"a line of it is longer than {MAX_LINE_BYTES:,} bytes"
                    raise _damage(path, problem, advice)
                yield line
    except OSError as error:
        raise _damage(path, f"it cannot be read: {error.strerror or error}", advice) from error


def find_excess(value: Any, most_values: int = MAX_VALUES) -> str | None:
    """Return why a value of lists and mappings is too deep or too large to walk; None if not."""
    waiting, count = [(value, 0)], 0
    while waiting:
        parent, depth = waiting.pop()
        if not isinstance(parent, list | dict):
            continue
        # An alias of YAML counts as often as it is used, as that is how often it is walked.
        count += len(parent)
        if count > most_values:
            return f"it stands for more than {most_values:,} values"
        if depth > MAX_DEPTH:
            return TOO_DEEP
        children = parent.values() if isinstance(parent, dict) else parent
        waiting += [(child, depth + 1) for child in children]
    return None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _describe_mistake(error: ValidationError, value: Any) -> str:
    """Return the first mistake in `value`: the key, what it should be and what it is."""
    first = error.errors(include_url=False)[0]
    names = []
    for name in first["loc"]:
        # pydantic also names the member of a union that it tried, which is no key.
        if isinstance(value, list | dict) and (isinstance(value, dict) or isinstance(name, int)):
            names.append(str(name))
            value = value.get(name) if isinstance(value, dict) else value[int(name)]
    key = ".".join(names)
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        return f"{key} is none of its keys"
    if first["type"] == "invalid_key":
        return f"{format_value(first['input'])} is no key"
    expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{key or 'it'} must be {expected}, and is {format_value(first['input'])}"


def _damage(where: object, problem: str, advice: str) -> DamagedFileError:
    return DamagedFileError(f"{where}: {problem}." + (f"\n{advice}" if advice else ""))


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)
