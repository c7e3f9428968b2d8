"""Metrics that are not luthier's: a function of the user's own, or one of the package `evaluate`.

What they return is read in one way: a number, a mapping of names to numbers, or one number for
each reply (a list), of which the mean is taken.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from luthier.errors import UserError, suggest_options
from luthier.errors import format_value as shown
from luthier.metrics.metric import FUNCTION_PREFIX, Metric, MetricScores, Prediction, excerpt, mean

# A user's own function by its dotted path: looked for without running it, then loaded once.


def check_function_path(path: str) -> str | None:
    """What is wrong with `python:module.function`, as far as can be told without importing it.

    Modules are found among what is installed and in the working directory.
    """
    module, name = _split(path)
    if not module or not name:
        return f"{path!r} names no function. Write python:module.function."
    if module in sys.modules:
        defined_names: set[str] | None = set(vars(sys.modules[module]))
    elif spec := _spec(module):
        defined_names = _names(spec)
    else:
        return f"{path}: there is no module {module} (looked in {_searched()})."
    if defined_names is None or name in defined_names:
        return None
    suggestion = suggest_options(name, defined_names)
    return f"{path}: the module {module} has no function {name!r}. {suggestion}"


@cache
def load_function(path: str) -> Callable[..., Any]:
    """The function of `python:module.function`; raises UserError where there is none."""
    module_name, name = _split(path)
    # Behind what is installed, so that a file here called json.py replaces nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{path}: importing {module_name} failed: {describe_exception(error)}"
        ) from error
    function = vars(module).get(name)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(
            f"{path}: the module {module_name} has no function {name!r}. "
            f"{suggest_options(name, callables)}"
        )
    return function


def find_module_origin(path: str) -> str | None:
    """Return where the module of `python:module.function` comes from, without importing it.

    It is a file, or `built-in` or `frozen` for modules that are part of Python itself; None where
    there is no such module.
    """
    module, _ = _split(path)
    loaded = sys.modules.get(module)
    spec = _spec(module) if loaded is None else loaded.__spec__
    return None if spec is None else spec.origin


def describe_exception(error: Exception) -> str:
    """What an exception says, with the last place of the user's own code."""
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", str(Path(__file__).parent)))
    ]
    location = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {error}{location}"


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.removeprefix(FUNCTION_PREFIX).rpartition(".")
    return module, name


def _searched() -> str:
    return f"{Path.cwd()} and among the installed packages"


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is. Its parents are not run either, which importlib's own search would do."""
    first, *rest = module.split(".")
    if not all(component.isidentifier() for component in (first, *rest)):
        return None
    if first in sys.builtin_module_names:
        return None if rest else importlib.util.find_spec(first)
    importlib.invalidate_caches()
    # Other finders know packages that are installed in place (pip install -e).
    spec = PathFinder.find_spec(first, [*sys.path, str(Path.cwd())]) or importlib.util.find_spec(
        first
    )
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
        bound_names = _given(node)
        if bound_names is None:
            return None
        names |= bound_names
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


class FunctionMetric(Metric):
    """`python:module.function`, called with predictions, references and rows."""

    path: str
    """Where the function is."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments that it takes."""

    def prepare(self, references: Sequence[str]) -> None:
        """Load the function and see that it takes what it will get."""
        function = load_function(self.path)
        try:
            inspect.signature(function).bind([], [], [], **self.arguments)
        except ValueError:  # some built-in functions do not tell
            return
        except TypeError as error:
            raise UserError(
                f"metric {self.name}: {self.path} takes {inspect.signature(function)}, and is "
                f"called with predictions, references, rows and the metric's settings: {error}."
            ) from error

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """What the function returns."""
        try:
            returned = load_function(self.path)(
                [reply.prediction for reply in replies],
                [reply.reference for reply in replies],
                [dict(reply.row) for reply in replies],
                **self.arguments,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"metric {self.name}: it failed: {describe_exception(error)}"
            ) from error
        return read_returned_scores(returned, self.name, len(replies))


class HubMetric(Metric):
    """`evaluate:NAME`: a metric of the package `evaluate`, from the hub or a local folder."""

    packages: ClassVar[tuple[str, ...]] = ("evaluate",)

    path: str
    """The metric's name there, or a folder."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Passed to its `compute`."""

    def prepare(self, references: Sequence[str]) -> None:
        """Fetch the metric."""
        _evaluate(self.path)

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """What `compute` returns; what is no number there, such as a version, is left out."""
        try:
            returned = _evaluate(self.path).compute(
                predictions=[reply.prediction for reply in replies],
                references=[reply.reference for reply in replies],
                **self.arguments,
            )
        except Exception as error:
            raise UserError(
                f"metric {self.name}: {self.path} of evaluate failed: {describe_exception(error)}"
            ) from error
        return read_returned_scores(_numbers(returned, len(replies)), self.name, len(replies))


@cache
def _evaluate(path: str) -> Any:
    """The metric of that name; raises UserError where it cannot be had."""
    import evaluate

    try:
        return evaluate.load(path)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        why = " (HF_HUB_OFFLINE is set)" if offline else ""
        raise UserError(
            f"metric evaluate:{path}: it cannot be loaded{why}: {excerpt(str(error), 300)}\n"
            "Its code comes from the Hugging Face hub: check the name and the network, or use a "
            "metric of luthier's own."
        ) from error


def _numbers(returned: Any, count: int) -> Any:
    """The entries that are numbers, or one number for each reply."""
    if not isinstance(returned, Mapping):
        return returned
    return {
        key: value
        for key, value in returned.items()
        if isinstance(value, Real) or (_is_rows(value) and len(value) == count)
    }


def read_returned_scores(returned: Any, name: str, count: int) -> MetricScores:
    """The numbers in what a function returned for so many replies; raises UserError for others.

    Of a mapping, the key that is called as the metric is its main number; the others are called
    `name/key`.
    """
    if not isinstance(returned, Mapping):
        return _one(returned, name, name, count)
    if not returned:
        raise UserError(f"metric {name}: it returned no numbers.")
    values: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    for key, value in returned.items():
        scores = _one(value, name if key == name else f"{name}/{key}", name, count)
        values |= scores.values
        rows |= scores.rows
    return MetricScores(values, rows)


def _one(value: Any, key: str, name: str, count: int) -> MetricScores:
    if isinstance(value, Real):
        return MetricScores({key: _finite(value, key, name)})
    if not _is_rows(value):
        raise UserError(
            f"metric {name}: {key} is {shown(value)} ({type(value).__name__}). Return a "
            "number, a mapping of names to numbers, or a list with a number for each reply."
        )
    if len(value) != count:
        raise UserError(f"metric {name}: {key} has {len(value)} numbers for {count} replies.")
    rows = [_finite(item, key, name) for item in value]
    return MetricScores({key: mean(rows)}, {key: rows})


def _is_rows(value: Any) -> bool:
    """Whether it is a list, a tuple or an array of one dimension."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _finite(value: Any, key: str, name: str) -> float:
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise UserError(f"metric {name}: {key} is {shown(value)}, and must be a finite number.")
