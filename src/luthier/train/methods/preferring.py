"""What the methods share that train on replies which are judged."""

from pathlib import Path
from typing import Any, ClassVar

from luthier.config.schema import RunConfig
from luthier.data.batching.settings import batching_of
from luthier.data.prepare import Prepared
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.arguments import trainer_arguments
from luthier.train.methods.method import Ingredients
from luthier.train.methods.tabled import evaluation_rows


class PairMethod:
    """A method whose rows are two replies to one prompt."""

    make: ClassVar[Any]
    """The class of the trainer's arguments."""
    reference: Any = None
    """The model that the trained one is compared with, if it is one of its own."""

    def own(self, config: RunConfig) -> dict[str, Any]:
        """What the arguments must say besides."""
        return {"max_length": None}

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The trainer's arguments."""
        own = {"remove_unused_columns": False} | self.own(config)
        return trainer_arguments(self.make, config, machine, folder, has_eval, own)

    def load_model(self, config: RunConfig, machine: Machine, prepared: Prepared) -> Any:
        """A causal language model."""
        return load_model(config.model, config.quantization, machine, full=not config.lora)

    def common(self, given: Ingredients) -> dict[str, Any]:
        """What every trainer takes."""
        return {
            "model": given.model,
            "args": given.args,
            "train_dataset": given.prepared.train,
            "eval_dataset": evaluation_rows(given.prepared.eval),
            "batching": batching_of(given.config),
            "processing_class": given.tokenizer,
            "callbacks": given.callbacks,
        }
