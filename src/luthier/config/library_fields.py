"""The settings of a library's class, read from its source with `ast`: nothing is imported.

Importing trl takes seconds and pulls in torch; a typo should be found before that.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_HOMES = {("transformers", "TrainingArguments"): "training_args.py"}
"""Where a class lies that is imported from a package's (lazy) root."""

_SCALARS = {"int", "float", "bool", "str", "list", "dict"}
_OTHERS = {"tuple": "list", "Sequence": "list", "Dict": "dict", "List": "list", "Any": "any"}


@dataclass(frozen=True)
class FieldType:
    """What a setting takes: type names (`any` takes everything), and the texts it allows."""

    types: frozenset[str]
    choices: tuple[str, ...] = ()

    def __or__(self, other: "FieldType") -> "FieldType":
        """Return what takes the values of both."""
        return FieldType(self.types | other.types, self.choices + other.choices)


ANY_TYPE = FieldType(frozenset({"any"}))
FieldTypes = dict[str, FieldType]


@cache
def read_class_fields(package: str, file: str, name: str) -> FieldTypes | None:
    """Return a dataclass's fields with those it inherits; None if the source is not there."""
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    if tree is None or not isinstance(node, ast.ClassDef):
        return None
    fields: FieldTypes = {}
    for base in reversed(node.bases):
        fields |= _inherited(package, file, tree, base)
    return fields | dict(_declared(package, file, node))


@cache
def read_parameters(package: str, file: str, name: str) -> FieldTypes | None:
    """Return a function's parameters, or a class's `__init__` parameters if `name` is a class."""
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        node = inits[0] if inits else None
    if not isinstance(node, ast.FunctionDef):
        return None
    return dict(_parameters(package, file, node.args))


@cache
def read_field_docs(package: str, file: str, name: str) -> dict[str, str]:
    """Return the string under each field of a class: its documentation."""
    tree = _parse(package, file)
    node = _definition(tree, name) if tree else None
    texts: dict[str, str] = {}
    if isinstance(node, ast.ClassDef):
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                texts[field.target.id] = _text(after)
    return texts


def _text(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


@cache
def _parse(package: str, file: str) -> ast.Module | None:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _definition(tree: ast.Module, name: str) -> ast.stmt | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _inherited(package: str, file: str, tree: ast.Module, base: ast.expr) -> FieldTypes:
    if not isinstance(base, ast.Name):
        return {}
    where = _home(package, file, tree, base.id)
    return (read_class_fields(*where, base.id) or {}) if where else {}


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
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name, annotation = field.target.id, field.annotation
            if not name.startswith("_") and "ClassVar" not in ast.dump(annotation):
                yield name, _kind(package, file, annotation)


def _parameters(package: str, file: str, args: ast.arguments) -> Iterator[tuple[str, FieldType]]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    pairs = [*zip(positional, [*defaults, *args.defaults], strict=True)]
    for arg, default in [*pairs, *zip(args.kwonlyargs, args.kw_defaults, strict=True)]:
        if arg.arg != "self":
            yield arg.arg, _parameter(package, file, arg, default)


def _parameter(package: str, file: str, arg: ast.arg, default: ast.expr | None) -> FieldType:
    if arg.annotation is not None:
        return _kind(package, file, arg.annotation)
    if isinstance(default, ast.Constant) and type(default.value).__name__ in _SCALARS:
        return FieldType(frozenset({type(default.value).__name__}))
    return ANY_TYPE


def _kind(package: str, file: str, node: ast.expr) -> FieldType:
    """Read an annotation; what it does not surely say becomes `any`."""
    if isinstance(node, ast.BinOp):
        return _kind(package, file, node.left) | _kind(package, file, node.right)
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
        field_type |= _kind(package, file, argument)
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
