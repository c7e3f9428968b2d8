"""A user's own function by its dotted path: looked for without running it, then loaded once."""

import ast
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from luthier.errors import UserError, choice

PREFIX = "python:"


def missing(path: str) -> str | None:
    """What is wrong with `python:module.function`, as far as can be told without importing it.

    Modules are found among what is installed and in the working directory.
    """
    module, name = _split(path)
    if not module or not name:
        return f"{path!r} names no function. Write python:module.function."
    if module in sys.modules:
        known: set[str] | None = set(vars(sys.modules[module]))
    elif spec := _spec(module):
        known = _names(spec)
    else:
        return f"{path}: there is no module {module} (looked in {_searched()})."
    if known is None or name in known:
        return None
    return f"{path}: the module {module} has no function {name!r}. {choice(name, known)}"


@cache
def load(path: str) -> Callable[..., Any]:
    """The function of `python:module.function`; raises UserError where there is none."""
    module_name, name = _split(path)
    # Behind what is installed, so that a file here called json.py replaces nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{path}: importing {module_name} failed: {described(error)}") from error
    found = vars(module).get(name)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(
            f"{path}: the module {module_name} has no function {name!r}. {choice(name, known)}"
        )
    return found


def described(error: Exception) -> str:
    """What an exception says, with the last place of the user's own code."""
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", str(Path(__file__).parent)))
    ]
    place = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {error}{place}"


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.removeprefix(PREFIX).rpartition(".")
    return module, name


def _searched() -> str:
    return f"{Path.cwd()} and among the installed packages"


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is. Its parents are not run either, which importlib's own search would do."""
    first, *rest = module.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    if first in sys.builtin_module_names:
        return None if rest else importlib.util.find_spec(first)
    importlib.invalidate_caches()
    spec = PathFinder.find_spec(first, [*sys.path, str(Path.cwd())])
    for n in range(2, len(rest) + 2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join([first, *rest][:n])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _names(spec: ModuleSpec) -> set[str] | None:
    """The names that a module's source gives; None where that cannot be read from it."""
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # importing it will say so, with the line
        return None
    names: set[str] = set()
    for node in tree.body:
        found = _given(node)
        if found is None:
            return None
        names |= found
    return None if "__getattr__" in names else names


def _given(node: ast.stmt) -> set[str] | None:
    """The names that a statement at the top of a module gives; None if that is not plain to see."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        return None if "*" in names else names
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return set() if isinstance(node, ast.Expr | ast.Pass) else None
