"""Code that a setting names: `python:package.module.name`, or `python:file.py:name`.

What a path names is first read from its source, without running it: whether it exists, can be
called, takes the arguments that it will get, or is a class of the base that is needed. Only then it
is imported. Modules are found among what is installed and in the working folder; a file is relative
to the working folder (`luthier.config` looks beside the recipe first, and writes the path so).
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.errors import UserError, suggest_options

PYTHON_PREFIX = "python:"
"""What a setting begins with that names code of the user's own."""

PYTHON_FORMS = "python:module.name or python:file.py:name"
"""How such a setting is written, for messages."""

_IN_FILE = re.compile(r"(?P<file>[^\r\n]+\.py):(?P<name>[^\s:/\\]*)")
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class PythonPath:
    """A path of code, taken apart: the module or the file, and the name in it."""

    text: str
    """As it is written, with `python:`."""
    module: str
    """The dotted module; empty for a file."""
    file: Path | None
    """The file; None for a module."""
    name: str
    """The function or class; empty where the path names none."""

    @property
    def container(self) -> str:
        """Return what holds the name, in words."""
        return f"the file {self.file}" if self.file else f"the module {self.module}"


def is_python_path(value: object) -> bool:
    """Return whether a setting names code; a text such as a prompt may begin with `python:`, too.

    The path of a file may have spaces, that of a module has none.
    """
    if not isinstance(value, str) or not value.startswith(PYTHON_PREFIX):
        return False
    rest = value.removeprefix(PYTHON_PREFIX)
    return _IN_FILE.fullmatch(rest) is not None or not re.search(r"\s", rest)


def split_python_path(path: str) -> PythonPath:
    """Return the path taken apart; it may lack the prefix."""
    rest = path.removeprefix(PYTHON_PREFIX)
    if match := _IN_FILE.fullmatch(rest):
        return PythonPath(path, "", Path(match["file"]).expanduser(), match["name"])
    module, _, name = rest.rpartition(".")
    return PythonPath(path, module, None, name)


# Without running it: where it is, and what is wrong with it.


def check_python_path(
    path: str,
    arguments: Iterable[str] | None = None,
    *,
    positional: Sequence[str] = (),
    by_name: Sequence[str] | None = (),
    base: str | None = None,
) -> str | None:
    """Return what is wrong with a path of code, as far as can be told without running it.

    `arguments` are the names with which it will be called, behind those that are passed by their
    position; None checks no call. Of `by_name` it gets those that it takes, and whatever it names
    where that is None. `base` is the dotted class, such as
    `transformers.TrainerCallback`, of which it must be a class.
    The text begins with the path; None where nothing is wrong.
    """
    parsed = split_python_path(path)
    if problem := _find_missing(parsed):
        return problem
    definition = _find_definition(parsed)
    if definition is None:
        return None
    if isinstance(definition.node, ast.Constant):
        return f"{path} is {ast.unparse(definition.node)[:60]}, and nothing that can be called."
    if base is not None and not _may_derive(definition):
        is_function = not isinstance(definition.node, ast.ClassDef)
        what = "a function" if is_function else "a class of another base"
        return (
            f"{path} is {what}, and a class of {base} is needed: "
            f"class {parsed.name}({base.rpartition('.')[2]})."
        )
    signature = None if arguments is None else _static_signature(definition)
    if arguments is None or signature is None:
        return None
    names = [*arguments, *_named_parameters(signature, by_name, len(positional))]
    return _describe_misfit(path, signature, names, positional)


def find_python_file(path: str) -> str | None:
    """Return where the code of a path comes from, without importing it.

    It is a file, or `built-in` or `frozen` for modules that are part of Python itself; None where
    there is no such module or file.
    """
    parsed = split_python_path(path)
    if parsed.file is not None:
        return str(parsed.file.resolve()) if parsed.file.is_file() else None
    loaded = sys.modules.get(parsed.module)
    spec = _find_spec(parsed.module) if loaded is None else loaded.__spec__
    return None if spec is None else spec.origin


def is_own_file(file: str | Path) -> bool:
    """Return whether a file is the user's own: no part of Python, of a package, or of luthier."""
    resolved = Path(file).resolve()
    if any(resolved.is_relative_to(folder) for folder in _installed_folders()):
        return False
    return {"site-packages", "dist-packages"}.isdisjoint(resolved.parts)


@cache
def _installed_folders() -> tuple[Path, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return (*(Path(path).resolve() for path in paths), _PACKAGE)


def _find_missing(parsed: PythonPath) -> str | None:
    """Return the words for a path that leads nowhere."""
    if not parsed.name or not (parsed.module or parsed.file):
        return f"{parsed.text!r} names no function or class. Write {PYTHON_FORMS}."
    if parsed.file is not None and not parsed.file.is_file():
        return f"{parsed.text}: there is no file {parsed.file} (looked in {Path.cwd()})."
    if parsed.file is None and parsed.module in sys.modules and not _module_file(parsed):
        names: set[str] | None = set(vars(sys.modules[parsed.module]))
    elif parsed.file is None and _find_spec(parsed.module) is None:
        return (
            f"{parsed.text}: there is no module {parsed.module} (looked in {Path.cwd()} and among "
            "the installed packages)."
        )
    else:
        file = _module_file(parsed)
        try:
            names = _top_level_names(_parse(file)) if file else None
        except SyntaxError as error:
            return (
                f"{parsed.text}: {file}, line {error.lineno}: this is no valid Python: {error.msg}."
            )
    if names is None or parsed.name in names:
        return None
    return _no_such_name(parsed, names)


def _no_such_name(parsed: PythonPath, names: Iterable[str]) -> str:
    public = [name for name in names if not name.startswith("_")]
    return (
        f"{parsed.text}: {parsed.container} has no function or class {parsed.name!r}. "
        f"{suggest_options(parsed.name, public)}"
    )


def _module_file(parsed: PythonPath) -> Path | None:
    """Return the Python file of a path; None for what is built in or compiled."""
    origin = find_python_file(parsed.text)
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


def _parse(file: Path) -> ast.Module:
    """Return a file's syntax tree; raises SyntaxError for what Python cannot read."""
    try:
        return _parse_text(file.read_bytes())
    except ValueError as error:  # a null byte, or bytes that are no text
        raise SyntaxError(str(error)) from error


@cache
def _parse_text(source: bytes) -> ast.Module:
    return ast.parse(source)


def _find_spec(module: str) -> ModuleSpec | None:
    """Return where a module is. Its parents are not run, which importlib's own search would do."""
    first, *rest = module.split(".")
    if not all(component.isidentifier() for component in (first, *rest)):
        return None
    if first in sys.builtin_module_names:
        return None if rest else importlib.util.find_spec(first)
    importlib.invalidate_caches()
    # Other finders know packages that are installed in place (pip install -e).
    try:
        spec = PathFinder.find_spec(first, [*sys.path, str(Path.cwd())])
        spec = spec or importlib.util.find_spec(first)
    except ValueError:  # `__main__` and modules that were put together by hand have no spec
        return None
    for n in range(2, len(rest) + 2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join([first, *rest][:n])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


# What a module's source says of a name.


@dataclass(frozen=True)
class _Definition:
    """Where a name gets its value: the statement or the value, and the module around it."""

    node: ast.AST
    module: ast.Module


def _top_level_names(module: ast.Module) -> set[str] | None:
    """Return the names that a module gives; None where that cannot be read from its source."""
    names: set[str] = set()
    for node in module.body:
        bound = _bound_names(node)
        if bound is None:
            return None
        names |= bound
    return None if "__getattr__" in names else names


def _bound_names(node: ast.stmt) -> set[str] | None:
    """Return the names that a statement of a module binds; None if that is not plain to see."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        return None if "*" in names else names
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    is_main = isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ ==")
    return set() if is_main or isinstance(node, ast.Expr | ast.Pass) else None


def _find_definition(parsed: PythonPath) -> _Definition | None:
    """Return the one definition of a name in its own module; None where there is no such one."""
    file = _module_file(parsed)
    module = _parse(file) if file else None
    return None if module is None else _definition_in(module, parsed.name)


def _definition_in(module: ast.Module, name: str) -> _Definition | None:
    if _top_level_names(module) is None:
        return None
    bindings = [node for node in module.body if name in (_bound_names(node) or ())]
    if len(bindings) != 1:
        return None
    node: ast.AST = bindings[0]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return _Definition(node.value, module) if isinstance(node.value, ast.Constant) else None
    is_plain = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return _Definition(node, module) if is_plain else None


def read_class_constant(path: str, name: str) -> Any:
    """Return the constant that a class of a path, or one above it in its module, gives a name.

    It is read from the source, without running it; None where there is no such class or constant.
    """
    parsed = split_python_path(path)
    try:
        return None if _find_missing(parsed) else _constant_of(_find_definition(parsed), name)
    except SyntaxError:
        return None


def _constant_of(definition: _Definition | None, name: str) -> Any:
    if definition is None or not isinstance(definition.node, ast.ClassDef):
        return None
    for node in definition.node.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in (_bound_names(node) or ()):
            return node.value.value if isinstance(node.value, ast.Constant) else None
    for base in definition.node.bases:
        above = _definition_in(definition.module, base.id) if isinstance(base, ast.Name) else None
        if above is not None and above.node is not definition.node:
            value = _constant_of(above, name)
            if value is not None:
                return value
    return None


def _may_derive(definition: _Definition) -> bool:
    """Return whether a definition may be a class of a base outside of its module."""
    node = definition.node
    if not isinstance(node, ast.ClassDef):
        return bool(getattr(node, "decorator_list", None))
    for base in node.bases:
        above = _definition_in(definition.module, base.id) if isinstance(base, ast.Name) else None
        if above is None:
            # A name that the module does not define may be imported; `object` is no base to want.
            if ast.unparse(base) != "object":
                return True
        elif above.node is not node and _may_derive(above):
            return True
    return False


def _static_signature(definition: _Definition) -> inspect.Signature | None:
    """Return how a definition is called, as its source says; None where something decorates it."""
    node = definition.node
    if getattr(node, "decorator_list", None):
        return None
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _signature_of(node.args)
    if not isinstance(node, ast.ClassDef) or node.keywords:
        return None
    inits = [each for each in node.body if getattr(each, "name", "") == "__init__"]
    if inits and isinstance(inits[-1], ast.FunctionDef) and not inits[-1].decorator_list:
        signature = _signature_of(inits[-1].args)
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return None if inits or node.bases else inspect.Signature()


class _Source(str):
    """A default as it is written."""

    __repr__ = str.__str__


def _signature_of(arguments: ast.arguments) -> inspect.Signature:
    """Return a definition's arguments as a signature, with defaults as they are written."""
    empty = inspect.Parameter.empty
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[Any] = [_Source(ast.unparse(each)) for each in arguments.defaults]
    defaults = [empty] * (len(positional) - len(defaults)) + defaults
    parameters = [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.POSITIONAL_ONLY
            if number < len(arguments.posonlyargs)
            else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=default,
        )
        for number, (argument, default) in enumerate(zip(positional, defaults, strict=True))
    ]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = empty if node is None else _Source(ast.unparse(node))
        parameters.append(
            inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default)
        )
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _describe_misfit(
    path: str, signature: inspect.Signature, arguments: Iterable[str], positional: Sequence[str]
) -> str | None:
    """Return the words for a call that does not fit; None for one that does."""
    names = list(dict.fromkeys(arguments))
    try:
        # Bound without a call: the code may work long before it stumbles over a name.
        signature.bind(*positional, **dict.fromkeys(names))
    except TypeError as error:
        call = ", ".join([*positional, *names]) or "nothing"
        return f"{path} takes {signature}, and is called with {call}: {error}."
    return None


# Importing it.


def load_python_object(
    path: str,
    arguments: Iterable[str] | None = None,
    *,
    positional: Sequence[str] = (),
    by_name: Sequence[str] | None = (),
    base: type | None = None,
) -> Any:
    """Import and return the function or class of a path.

    The arguments are those of `check_python_path`, and `base` is the class itself. Raises UserError
    in words: for a path that leads nowhere, for code that fails while it is imported (with its file
    and line), for what cannot be called, is called otherwise, or is no class of that base.
    """
    parsed = split_python_path(path)
    if problem := _find_missing(parsed):
        raise UserError(problem)
    module = _import_code(parsed)
    if parsed.name not in vars(module) and not hasattr(module, parsed.name):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(_no_such_name(parsed, callables))
    value = getattr(module, parsed.name)
    if base is not None and not (isinstance(value, type) and issubclass(value, base)):
        base_name = f"{base.__module__.partition('.')[0]}.{base.__name__}"
        raise UserError(
            f"{path} is {_describe_object(value)}, and a class of {base_name} is needed."
        )
    if not callable(value):
        raise UserError(f"{path} is {_describe_object(value)}, and nothing that can be called.")
    signature = None if arguments is None else _read_signature(value)
    if arguments is None or signature is None:
        return value
    names = [*arguments, *_named_parameters(signature, by_name, len(positional))]
    if misfit := _describe_misfit(path, signature, names, positional):
        raise UserError(misfit)
    return value


def _describe_object(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "a function" if inspect.isroutine(value) else f"a {type(value).__name__}"


def _read_signature(value: Any) -> inspect.Signature | None:
    """Return how a function or class is called; None for those built-in ones that do not tell."""
    try:
        return inspect.signature(value)
    except (ValueError, TypeError):
        return None


_LOADED_SOURCES: dict[str, bytes] = {}
"""Module -> its source when it was loaded here: a notebook's process outlives an edited file."""


def _import_code(parsed: PythonPath) -> ModuleType:
    """Return the module of a path, run anew where its file has changed since."""
    file = _module_file(parsed)
    source = file.read_bytes() if file else b""
    try:
        if parsed.file is not None:
            module = _import_file(parsed.file.resolve(), source)
        else:
            # Behind what is installed, so that a file here called json.py replaces nothing.
            _search_also(Path.cwd())
            was_loaded = parsed.module in sys.modules
            module = importlib.import_module(parsed.module)
            if was_loaded and _LOADED_SOURCES.get(parsed.module, source) != source:
                module = importlib.reload(module)
            _LOADED_SOURCES[parsed.module] = source
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # importing runs the user's module
        place = parsed.file or parsed.module
        raise UserError(
            f"{parsed.text}: importing {place} failed: {describe_exception(error)}"
        ) from error
    return module


def _import_file(file: Path, source: bytes) -> ModuleType:
    """Return the module of a file, which may import its neighbours."""
    # The path is in the name, as two folders may each have a rewards.py.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules and _LOADED_SOURCES.get(name) == source:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    _search_also(file.parent)
    # Known by its name before it runs, as dataclasses and pickle look there.
    sys.modules[name] = module
    try:
        # Not by the loader: its compiled files go by time and size, and miss an edit of a moment.
        exec(compile(source, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _LOADED_SOURCES[name] = source
    return module


def _search_also(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


# Calling it, and what it says when it fails.


def named_parameters(
    function: Callable[..., Any], names: Sequence[str], positional: Sequence[str] = ()
) -> list[str]:
    """Return those of some names that a function has parameters of, behind the positional ones."""
    signature = _read_signature(function)
    return [] if signature is None else _named_parameters(signature, names, len(positional))


def _named_parameters(
    signature: inspect.Signature, names: Sequence[str] | None, skipped: int
) -> list[str]:
    """Return the parameters behind the skipped ones that can be named: all of them, or of these."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(signature.parameters.values())[skipped:]
    return [
        each.name
        for each in parameters
        if each.kind in kinds and (names is None or each.name in names)
    ]


def select_arguments(
    function: Callable[..., Any], available: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Return what a function takes, by name, of all that is available.

    Raises UserError for an argument without default that is not among it.
    """
    signature = _read_signature(function)
    if signature is None:
        return dict(available)
    parameters = signature.parameters.values()
    lacking = [each.name for each in parameters if _is_required(each, available)]
    if lacking:
        raise UserError(
            f"{path} needs {', '.join(lacking)}, and there is no such column or setting. There "
            f"are: {', '.join(sorted(available))}."
        )
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(available)
    return {each.name: available[each.name] for each in parameters if each.name in available}


def _is_required(parameter: inspect.Parameter, available: Mapping[str, Any]) -> bool:
    is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return is_named and parameter.default is parameter.empty and parameter.name not in available


def describe_exception(error: BaseException) -> str:
    """Return what an exception of the user's code says, with the last line of that code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
        and not Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    own_frames = [frame for frame in frames if is_own_file(frame.filename)]
    last = (own_frames or frames)[-1:]
    location = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    text = str(error) if not isinstance(error, SystemExit) else f"it ends the program ({error})"
    return f"{type(error).__name__}: {text}{location}"


# Its hash.


def hash_python_source(path: str) -> str | None:
    """Return the SHA-256 of the code behind a path, without running it; None if it has no source.

    It covers the function or class, and whatever of the user's own files it refers to, in its own
    module and in those that it imports, without comments and blank lines. Installed packages are
    not part of it: their versions are recorded.
    """
    parsed = split_python_path(path)
    file = _module_file(parsed)
    if file is None:
        return None
    pieces: dict[tuple[str, str], str] = {}
    try:
        _collect_source(file.resolve(), parsed.name, parsed.module, pieces)
    except SyntaxError:
        return None
    digest = hashlib.sha256()
    # Without the folders, so that a project that has moved is the same.
    texts = sorted((Path(file).name, name, text) for (file, name), text in pieces.items())
    digest.update(repr(texts).encode())
    return digest.hexdigest()


def _collect_source(
    file: Path, name: str, module_name: str, pieces: dict[tuple[str, str], str]
) -> None:
    """Add a name's source and all that it refers to; an empty name is the whole module."""
    if (str(file), name) in pieces:
        return
    module = _parse(file)
    loose = [node for node in module.body if _bound_names(node) is None]
    nodes = [node for node in module.body if not name or name in (_bound_names(node) or ())]
    # What binds no plain name runs whenever the module is imported.
    nodes = list(dict.fromkeys([*nodes, *loose]))
    pieces[str(file), name] = "\n".join(map(ast.unparse, nodes))
    inner = [each for node in nodes for each in ast.walk(node)]
    for referred in sorted({each.id for each in inner if isinstance(each, ast.Name)}):
        if any(referred in (_bound_names(node) or ()) for node in module.body):
            _collect_source(file, referred, module_name, pieces)
    for each in inner:
        if isinstance(each, ast.Import | ast.ImportFrom):
            for target, target_name, target_module in _imported_files(each, file, module_name):
                _collect_source(target, target_name, target_module, pieces)


def _imported_files(
    node: ast.Import | ast.ImportFrom, file: Path, module_name: str
) -> Sequence[tuple[Path, str, str]]:
    """Return the user's own files that an import names, each with the name that it takes."""
    if isinstance(node, ast.Import):
        targets = [(alias.name, "") for alias in node.names]
    else:
        module = node.module or ""
        if node.level:
            is_package = file.name == "__init__.py"
            above = module_name.split(".")[: -(node.level - is_package) or None]
            module = ".".join([*above, *([module] if module else [])])
        targets = [(module, alias.name) for alias in node.names]
    files = []
    for module, name in targets:
        submodule = _own_module_file(f"{module}.{name}", file) if name else None
        target = submodule or _own_module_file(module, file)
        if target is not None:
            is_whole = submodule is not None or name == "*"
            target_module = f"{module}.{name}" if submodule else module
            files.append((target, "" if is_whole else name, target_module))
    return files


def _own_module_file(module: str, beside: Path) -> Path | None:
    """Return the file of a module where it is the user's own; it may lie beside another file."""
    if not module:
        return None
    spec = _find_spec(module)
    neighbour = beside.parent.joinpath(*module.split(".")).with_suffix(".py")
    origin = spec.origin if spec else str(neighbour) if neighbour.is_file() else None
    is_own = origin and origin.endswith(".py") and Path(origin).is_file() and is_own_file(origin)
    return Path(origin).resolve() if origin and is_own else None
