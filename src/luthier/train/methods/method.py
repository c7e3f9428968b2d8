"""What a training method is: how rows are encoded, which model is loaded, which trainer runs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders import KeepingColumns, RowEncoder
from luthier.data.prepare import Encoders, Prepared
from luthier.errors import UserError
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


_KINDS = {
    "conversation": "conversations",
    "text": "plain texts",
    "preference": "pairs of a chosen and a rejected reply",
    "unpaired": "replies with a verdict",
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


def encoders(config: RunConfig, tokenizer: Any) -> Encoders:
    """The encoder for each source of a run; UserError for rows that its method does not take."""
    name = config.trainer.method
    method, wanted = load(name), METHODS[name].rows

    def encoder(kind: str, source: SourceConfig, key: str) -> RowEncoder:
        if kind not in wanted:
            others = [other for other, facts in METHODS.items() if kind in facts.rows]
            fitting = f"trainer={' or trainer='.join(others)} does. " if others else ""
            raise UserError(
                f"{key}: its rows are {_KINDS[kind]}, and trainer.method={name} trains on "
                f"{' and '.join(_KINDS[one] for one in wanted)}. {fitting}If they are something "
                f"else, say so with {key}.shape."
            )
        made = method.encoder(config, tokenizer, kind, source)
        return KeepingColumns(made) if _reads_columns(config) else made

    return encoder


def _reads_columns(config: RunConfig) -> bool:
    """Whether a reward or a metric of the user's own reads the columns of the rows."""
    evaluation = config.trainer.evaluation
    metrics = chain(evaluation.metrics, *evaluation.sets.values())
    names = (metric if isinstance(metric, str) else next(iter(metric)) for metric in metrics)
    return bool(config.trainer.rewards) or any(name.startswith("python:") for name in names)
