"""What a training method is: how rows are encoded, which model is loaded, which trainer runs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from luthier.config.methods import METHODS, check_rows
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders import KeepingColumns, RowEncoder
from luthier.data.parts import key_of_shape
from luthier.data.prepare import Encoders, Prepared
from luthier.model.machine import Machine


@dataclass(frozen=True)
class Ingredients:
    """All that a trainer is made of."""

    config: RunConfig
    args: Any
    """The trainer's own arguments, as `Method.arguments` gave them."""
    model: Any
    """On its machine, with its adapter."""
    tokenizer: Any
    prepared: Prepared
    callbacks: list[Any]


class Method(Protocol):
    """One value of `trainer.method`."""

    def encoder(
        self, config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
    ) -> RowEncoder:
        """What makes token rows of a source's rows, which are of one of the method's kinds."""
        ...

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The trainer's own arguments; UserError for what they do not allow."""
        ...

    def load_model(self, config: RunConfig, machine: Machine, prepared: Prepared) -> Any:
        """The model without an adapter."""
        ...

    def trainer(self, given: Ingredients) -> Any:
        """The trainer; a `transformers.Trainer`."""
        ...


def load(name: str) -> Method:
    """The method of this name."""
    module, kind = METHODS[name].place.split(":")
    make: Callable[[], Method] = getattr(import_module(module), kind)
    return make()


def encoders(config: RunConfig, tokenizer: Any) -> Encoders:
    """The encoder for each source of a run; UserError for rows that its method does not take."""
    name = config.trainer.method
    method = load(name)

    def encoder(kind: str, source: SourceConfig, key: str) -> RowEncoder:
        check_rows(name, kind, key, key_of_shape(key))
        made = method.encoder(config, tokenizer, kind, source)
        return KeepingColumns(made) if _reads_columns(config) else made

    return encoder


def _reads_columns(config: RunConfig) -> bool:
    """Whether a reward or a metric of the user's own reads the columns of the rows."""
    evaluation = config.trainer.evaluation
    metrics = chain(evaluation.metrics, *evaluation.sets.values())
    names = (metric if isinstance(metric, str) else next(iter(metric)) for metric in metrics)
    return bool(config.trainer.rewards) or any(name.startswith("python:") for name in names)
