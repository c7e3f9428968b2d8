"""luthier: config-driven fine-tuning with exact chat tokenization.

From Python: `run = luthier.train("quickstart", "lora.r=8")`, and `luthier.Run(folder)` for a run
that is there already (docs/python.md).
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from luthier.errors import UserError
    from luthier.notebook import Run, TrainingStopped

__version__ = "0.1.0"
__all__ = ["Run", "TrainingStopped", "UserError", "__version__", "train"]

_PLACES = {"Run": "notebook", "TrainingStopped": "notebook", "UserError": "errors"}
"""Public names -> the modules that they come from, of which none is imported before it is used."""


class CallablePackage(ModuleType):
    """The package `luthier.train`, which is also the function that trains."""

    def __call__(
        self,
        recipe: "str | Mapping[str, Any]",
        *settings: "str | Mapping[str, Any]",
        trust: bool = False,
    ) -> "Run":
        """Train as `python train.py` does, in this process, and return the run.

        See `luthier.notebook.train`.
        """
        from luthier.notebook import train

        return train(recipe, *settings, trust=trust)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "train":
        return import_module("luthier.train")
    if name in _PLACES:
        return getattr(import_module(f"luthier.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
