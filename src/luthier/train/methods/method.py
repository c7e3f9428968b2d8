"""What a training method is: which model is loaded, and which trainer runs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.prepare import PreparedData
from luthier.model.device import Machine


@dataclass(frozen=True)
class TrainerInputs:
    """All that a trainer is made of."""

    config: RunConfig
    args: Any
    """The trainer's own arguments, as `Method.arguments` gave them."""
    model: Any
    """On its machine, with its adapter."""
    tokenizer: Any
    prepared: PreparedData
    callbacks: list[Any]


class TrainingMethod(Protocol):
    """One value of `trainer.method`."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The trainer's own arguments; UserError for what they do not allow."""
        ...

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """The model without an adapter."""
        ...

    def build_trainer(self, given: TrainerInputs) -> Any:
        """The trainer; a `transformers.Trainer`."""
        ...


def load_method(name: str) -> TrainingMethod:
    """The method of this name."""
    module, kind = METHODS[name].place.split(":")
    make: Callable[[], TrainingMethod] = getattr(import_module(module), kind)
    return make()
