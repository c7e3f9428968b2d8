"""What a training method is: the arguments, the model and the trainer of one `trainer.method`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.config.methods import BASE_METHOD, METHODS, base_method
from luthier.config.schema import RunConfig
from luthier.data.batching.image_collators import ImageInputs
from luthier.data.batching.settings import read_batching_settings
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.model.loader import check_log_probs
from luthier.python_code import describe_exception, is_python_path, load_python_object
from luthier.train.arguments import build_trainer_arguments


@dataclass(frozen=True)
class TrainerInputs:
    """All that a trainer is built from."""

    config: RunConfig
    args: Any
    """The trainer's own arguments, as `TrainingMethod.build_arguments` returned them."""
    model: Any
    """The model on its device, with its adapter."""
    tokenizer: Any
    prepared: PreparedData
    callbacks: list[Any]
    images: ImageInputs | None = None
    """What makes the inputs of pictures; None where no row has an image."""

    def common_arguments(self) -> dict[str, Any]:
        """The arguments that every trainer takes, by name."""
        return {
            "model": self.model,
            "args": self.args,
            "processing_class": self.tokenizer,
            "callbacks": self.callbacks,
        }

    def table_arguments(self) -> dict[str, Any]:
        """The arguments of a trainer over rows of a table, which has luthier's own loaders."""
        sets = name_eval_sets(self.prepared.eval)
        images = {} if self.images is None else {"images": self.images}
        return (
            self.common_arguments()
            | images
            | {
                "train_dataset": self.prepared.train,
                # Trainer evaluates a dataset that is no dict under no name.
                "eval_dataset": sets[""] if list(sets) == [""] else sets or None,
                "batching": read_batching_settings(self.config),
            }
        )


def name_eval_sets(sets: dict[str, TokenRows]) -> dict[str, TokenRows]:
    """The evaluation sets by name; a single one has none, and so its metrics have none either."""
    return {"": next(iter(sets.values()))} if len(sets) == 1 else sets


class TrainingMethod:
    """One value of `trainer.method`: its functions are called in the order in which they stand.

    As they stand here they are those of a method that trains a causal language model.
    """

    arguments_class: Any
    """The class of the trainer's arguments."""
    own_trainer: type | None = None
    """The class of `trainer.method` where that is one of the user's own."""

    def extend_trainer(self, trainer_class: Any) -> Any:
        """Return the class of a method's trainer, with the user's own before it.

        What that overrides comes first, and its `super()` is luthier's trainer. Raises UserError
        where it derives from the trainer of another method.
        """
        own = self.own_trainer
        if own is None:
            return trainer_class
        inherited = trainer_class.__mro__
        foreign = [
            each
            for each in own.__mro__
            if each.__module__.partition(".")[0] in ("trl", "transformers")
            and each not in inherited
        ]
        if foreign:
            library_class = next(each for each in inherited if each.__module__.startswith("trl."))
            raise UserError(
                f"trainer.method: {own.__name__} derives from {foreign[0].__name__}, and its "
                f"{BASE_METHOD} is trained by {library_class.__name__}. Derive from that."
            )
        overridden = {
            name: _guard(name)
            for name in _GUARDED
            if any(name in vars(each) for each in own.__mro__ if each not in inherited)
        }
        return type(own.__name__, (own, trainer_class), {"__module__": own.__module__} | overridden)

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """The arguments that luthier sets for this method, whatever the user says."""
        raise NotImplementedError

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """Return an instance of `arguments_class`; UserError for what that does not allow.

        `folder` is the run's, and `has_eval` says whether there are rows to evaluate on.
        """
        required, make = self.required_arguments(config), self.arguments_class
        return build_trainer_arguments(make, config, machine, folder, has_eval, required)

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return the model on its device, without an adapter."""
        return load_trained_model(config, machine)

    def build_trainer(self, inputs: TrainerInputs) -> Any:
        """Return the trainer, a `transformers.Trainer`."""
        raise NotImplementedError


def load_trained_model(
    config: RunConfig, machine: Machine, task: str = "CAUSAL_LM", **settings: Any
) -> Any:
    """Return the model that a run trains, without an adapter, as `luthier.model.load` loads it.

    `task` is a key of its `TASK_CLASSES`, and `settings` are further arguments of
    `from_pretrained`.
    """
    full = not config.lora.is_enabled
    model = load_model(config.model, config.quantization, machine, full, task, **settings)
    if config.model.loader is not None:
        check_log_probs(model)
    return model


def load_method(name: str) -> TrainingMethod:
    """Return the method of this name, importing its module."""
    module, class_name = METHODS[base_method(name)].method_class.split(":")
    method_class: Callable[[], TrainingMethod] = getattr(import_module(module), class_name)
    method = method_class()
    if is_python_path(name):
        method.own_trainer = load_own_trainer(name)
    return method


_GUARDED = ("__init__", "compute_loss")
"""Methods of a trainer of the user's own whose mistakes are told in words."""


def _guard(name: str) -> Callable[..., Any]:
    """Return a method that calls the one above it; it raises UserError for mistakes in code."""

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(type(self), self), name)(*args, **kwargs)
        except _CODE_ERRORS as error:
            raise UserError(
                f"trainer.method: {name} of {type(self).__name__} failed: "
                f"{describe_exception(error)}"
            ) from error

    return guarded


_CODE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(TypeError, ValueError),
)


def load_own_trainer(path: str) -> type:
    """Return the class of the user's own that `trainer.method` names; UserError for another."""
    import transformers

    try:
        own_trainer: type = load_python_object(path, base=transformers.Trainer)
    except UserError as error:
        raise UserError(f"trainer.method: {error}") from error
    return own_trainer
