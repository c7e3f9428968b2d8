"""The settings of a library's class, read from its source with `ast`: nothing is imported.

Importing trl takes seconds and pulls in torch; a typo should be found before that. Reading the
source takes 20 to 50 ms a class, so what was read is kept in luthier's cache folder for as long as
the source files are the same.
"""

import ast
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.storage.cache import cache_root

_HOMES = {("transformers", "TrainingArguments"): "training_args.py"}
"""Where a class lies that is imported from a package's (lazy) root."""

_SCALARS = {"int", "float", "bool", "str", "list", "dict"}
_OTHERS = {"tuple": "list", "Sequence": "list", "Dict": "dict", "List": "list", "Any": "any"}


UNKNOWN = "???"
"""The default of a setting that has none, or whose default is not a plain value."""


@dataclass(frozen=True)
class FieldType:
    """What a setting takes: type names (`any` takes everything), and the texts it allows.

    With it comes what the source says about the setting, which two equal types may differ in.
    """

    types: frozenset[str]
    choices: tuple[str, ...] = ()
    default: Any = field(default=UNKNOWN, compare=False)
    help: str = field(default="", compare=False)
    """What the library's documentation says about it, as one line."""
    owner: str = field(default="", compare=False)
    """The class or function that declares it, such as `transformers.TrainingArguments`."""

    def __or__(self, other: "FieldType") -> "FieldType":
        """Return what takes the values of both."""
        return replace(self, types=self.types | other.types, choices=self.choices + other.choices)


ANY_TYPE = FieldType(frozenset({"any"}))
FieldTypes = dict[str, FieldType]


def read_class_fields(package: str, file: str, name: str) -> FieldTypes | None:
    """Return a dataclass's fields with those it inherits; None if the source is not there."""
    return _read_or_load(_class_fields, package, file, name)


def read_parameters(package: str, file: str, name: str) -> FieldTypes | None:
    """Return a function's parameters, or a class's `__init__` parameters if `name` is a class."""
    return _read_or_load(_function_parameters, package, file, name)


_Reader = Callable[[str, str, str], FieldTypes | None]
_read_files: set[Path] = set()
"""The source files that were read since the last setting was looked up."""
_READER_CHECKSUM = zlib.crc32(Path(__file__).read_bytes())
"""Of this file: what another version of it read is not taken from the cache."""


@cache
def _read_or_load(read: _Reader, package: str, file: str, name: str) -> FieldTypes | None:
    """Return what `read` finds in the source, from the cache folder if the source is unchanged."""
    if package == "luthier":
        return read(package, file, name)
    source_file = _find_source(package, file)
    if source_file is None:
        return None
    key = zlib.crc32(f"{_READER_CHECKSUM} {source_file} {read.__name__}".encode())
    cached = cache_root() / "library_fields" / f"{package}.{name}-{key:08x}.json"
    fields = _load_cached(cached)
    if fields is None:
        _read_files.clear()
        fields = read(package, file, name)
        if fields is not None:
            _store(cached, fields)
    return fields


def _load_cached(cached: Path) -> FieldTypes | None:
    """Return the settings in a file of the cache; None where it is missing, damaged or old."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(cached.read_bytes())
        if all(_stamp(Path(file)) == stamp for file, stamp in content["files"].items()):
            return {
                name: FieldType(frozenset(types), tuple(choices), *others)
                for name, (types, choices, *others) in content["fields"].items()
            }
    return None


def _store(cached: Path, fields: FieldTypes) -> None:
    """Write settings to the cache; a folder that cannot be written is no error."""
    content = {
        "files": {str(file): _stamp(file) for file in _read_files},
        "fields": {
            name: [sorted(each.types), each.choices, each.default, each.help, each.owner]
            for name, each in fields.items()
        },
    }
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        new = cached.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(content), encoding="utf-8")
        new.replace(cached)


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_mtime_ns, status.st_size]


def _class_fields(package: str, file: str, name: str) -> FieldTypes | None:
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    if tree is None or not isinstance(node, ast.ClassDef):
        return None
    fields: FieldTypes = {}
    for base in reversed(node.bases):
        fields |= _inherited(package, file, tree, base)
    declared = dict(_declared(package, file, node))
    docs = _argument_docs(ast.get_docstring(node) or "")
    for setting, text in docs.items():
        if each := declared.get(setting):
            declared[setting] = replace(each, help=text)
    together = fields | declared
    # A private base class is no name that a reader could look up.
    return {
        setting: replace(each, owner=f"{package}.{name}") if "._" in each.owner else each
        for setting, each in together.items()
    }


def _function_parameters(package: str, file: str, name: str) -> FieldTypes | None:
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    text = ast.get_docstring(node) or "" if isinstance(node, _DOCUMENTED) else ""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        node = inits[0] if inits else None
    if not isinstance(node, ast.FunctionDef):
        return None
    docs, owner = _argument_docs(text), f"{package}.{name}"
    return {
        parameter: replace(each, help=docs.get(parameter, ""), owner=owner)
        for parameter, each in _parameters(package, file, node.args)
    }


_DOCUMENTED = ast.ClassDef | ast.FunctionDef
_ARGUMENT = re.compile(r"( +)(\w+) ?(?:\(.*\)|\[.*\])?: *(.*)")
_MARKUP = re.compile(r"\[`~?([^`]+)`\]|\[([^\]]+)\]\([^)]+\)|</?a[^>]*>")


def _argument_docs(docstring: str) -> dict[str, str]:
    """Return the paragraph about each argument in a docstring of Google's style, as one line."""
    texts: dict[str, list[str]] = {}
    indent, name = 0, ""
    for line in docstring.splitlines():
        match = _ARGUMENT.fullmatch(line)
        if match and (not indent or len(match[1]) == indent):
            indent, name = len(match[1]), match[2]
            texts[name] = [match[3]]
        elif name and line.strip() and len(line) - len(line.lstrip()) > indent:
            texts[name].append(line.strip())
        else:
            # A blank line, or a heading between two arguments.
            name = name if not line.strip() else ""
    return {
        name: _MARKUP.sub(lambda match: match[1] or match[2] or "", " ".join(lines)).strip()
        for name, lines in texts.items()
    }


@cache
def read_field_docs(package: str, file: str, name: str) -> dict[str, str]:
    """Return the string under each field of a class: its documentation."""
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    texts: dict[str, str] = {}
    if isinstance(node, ast.ClassDef):
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                texts[statement.target.id] = _text(after)
    return texts


def _text(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _parse(package: str, file: str) -> ast.Module | None:
    path = _find_source(package, file)
    if path is None:
        return None
    _read_files.add(path)
    return _parse_file(path)


@cache
def _parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _find_source(package: str, file: str) -> Path | None:
    for folder in _package_folders(package):
        path = Path(folder) / file
        if path.is_file():
            return path
    return None


@cache
def _package_folders(package: str) -> list[str]:
    spec = find_spec(package)
    return list(spec.submodule_search_locations or []) if spec else []


def _definition(tree: ast.Module, name: str) -> ast.stmt | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _inherited(package: str, file: str, tree: ast.Module, base: ast.expr) -> FieldTypes:
    if not isinstance(base, ast.Name):
        return {}
    where = _home(package, file, tree, base.id)
    return (_class_fields(*where, base.id) or {}) if where else {}


def _home(package: str, file: str, tree: ast.Module, name: str) -> tuple[str, str] | None:
    """Return package and file in which a name that a module uses is defined."""
    if _definition(tree, name):
        return package, file
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            if node.level:
                return package, _relative(package, file, node)
            root, _, rest = (node.module or "").partition(".")
            return root, _HOMES.get((root, name)) or _file(root, rest)
    return None


def _relative(package: str, file: str, node: ast.ImportFrom) -> str:
    folder = Path(file)
    for _ in range(node.level):
        folder = folder.parent
    return _file(package, ".".join([*folder.parts, *(node.module or "").split(".")]).strip("."))


def _file(package: str, dotted: str) -> str:
    path = dotted.replace(".", "/")
    return f"{path}.py" if _parse(package, f"{path}.py") else f"{path}/__init__.py"


def _declared(package: str, file: str, node: ast.ClassDef) -> Iterator[tuple[str, FieldType]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name, annotation = statement.target.id, statement.annotation
            if not name.startswith("_") and "ClassVar" not in ast.dump(annotation):
                default, text = _field_value(statement.value)
                owner = f"{package}.{node.name}"
                each = _read_annotation(package, file, annotation)
                yield name, replace(each, default=default, help=text, owner=owner)


def _field_value(value: ast.expr | None) -> tuple[Any, str]:
    """Return the default of a dataclass's field, and the `help` of its metadata."""
    if not isinstance(value, ast.Call):
        return _literal_value(value), ""
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    factory = arguments.get("default_factory")
    default = _literal_value(arguments.get("default"))
    if isinstance(factory, ast.Name) and factory.id in ("list", "dict"):
        default = [] if factory.id == "list" else {}
    metadata = arguments.get("metadata")
    if isinstance(metadata, ast.Dict):
        for key, text in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                return default, " ".join(str(_literal_value(text)).split())
    return default, ""


def _literal_value(node: ast.expr | None) -> Any:
    """Return the value of an expression that JSON can hold; UNKNOWN for any other."""
    with suppress(ValueError, TypeError):
        value = ast.literal_eval(node) if node else UNKNOWN
        json.dumps(value)
        return value
    return UNKNOWN


def _parameters(package: str, file: str, args: ast.arguments) -> Iterator[tuple[str, FieldType]]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    pairs = [*zip(positional, [*defaults, *args.defaults], strict=True)]
    for arg, default in [*pairs, *zip(args.kwonlyargs, args.kw_defaults, strict=True)]:
        if arg.arg != "self":
            each = _parameter(package, file, arg, default)
            yield arg.arg, replace(each, default=_literal_value(default))


def _parameter(package: str, file: str, arg: ast.arg, default: ast.expr | None) -> FieldType:
    if arg.annotation is not None:
        return _read_annotation(package, file, arg.annotation)
    if isinstance(default, ast.Constant) and type(default.value).__name__ in _SCALARS:
        return FieldType(frozenset({type(default.value).__name__}))
    return ANY_TYPE


def _read_annotation(package: str, file: str, node: ast.expr) -> FieldType:
    """Read an annotation; what it does not surely say becomes `any`."""
    if isinstance(node, ast.BinOp):
        return _read_annotation(package, file, node.left) | _read_annotation(
            package, file, node.right
        )
    if isinstance(node, ast.Constant) and node.value is None:
        return FieldType(frozenset({"none"}))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return _subscript(package, file, node.value.id, node.slice)
    if isinstance(node, ast.Name):
        return _name(package, file, node.id)
    return ANY_TYPE


def _subscript(package: str, file: str, name: str, inner: ast.expr) -> FieldType:
    arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        return _literal(arguments)
    if name not in ("Optional", "Union"):
        return _name(package, file, name)
    field_type = FieldType(frozenset({"none"} if name == "Optional" else ()))
    for argument in arguments:
        field_type |= _read_annotation(package, file, argument)
    return field_type


def _literal(elements: list[ast.expr]) -> FieldType:
    values = [element.value for element in elements if isinstance(element, ast.Constant)]
    types = {"none" if v is None else type(v).__name__ for v in values} - {"str"}
    texts = tuple(value for value in values if isinstance(value, str))
    if any("[" in text for text in texts):  # a pattern such as "pissa_niter_[number of iters]"
        return FieldType(frozenset(types | {"str"}))
    return FieldType(frozenset(types), texts)


def _name(package: str, file: str, name: str) -> FieldType:
    if name in _SCALARS or name in _OTHERS:
        return FieldType(frozenset({_OTHERS.get(name, name)}))
    members = _members(package, file, name)
    return FieldType(frozenset(), members) if members else ANY_TYPE


def _members(package: str, file: str, name: str) -> tuple[str, ...]:
    """Return the texts of an enumeration that a module defines or imports."""
    tree = _parse(package, file)
    where = _home(package, file, tree, name) if tree else None
    home = _parse(*where) if where else None
    node = _definition(home, name) if home else None
    if not isinstance(node, ast.ClassDef) or "Enum" not in ast.dump(ast.Tuple(node.bases)):
        return ()
    values = [entry.value for entry in node.body if isinstance(entry, ast.Assign)]
    texts = [value.value for value in values if isinstance(value, ast.Constant)]
    return tuple(text for text in texts if isinstance(text, str))
