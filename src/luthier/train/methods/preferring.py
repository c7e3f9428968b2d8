"""What the methods share that train on replies which are judged."""

from pathlib import Path
from typing import Any, ClassVar

from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders import RowEncoder
from luthier.data.judged_encoders import PreferenceEncoder
from luthier.data.prepare import Prepared
from luthier.model.machine import Machine
from luthier.model.tokenizer import end_token_ids
from luthier.model.weights import load_model
from luthier.train.arguments import trainer_arguments
from luthier.train.batching import batching_of
from luthier.train.methods.method import Ingredients
from luthier.train.methods.tabled import evaluation_rows


def chat_settings(config: RunConfig, source: SourceConfig) -> dict[str, Any]:
    """The settings of the chat encoder for a source."""
    chat = config.chat.model_dump() | {"eos_token_ids": end_token_ids(config.model)}
    return chat if source.train_on is None else chat | {"train_on": source.train_on}


class PairMethod:
    """A method whose rows are two replies to one prompt."""

    make: ClassVar[Any]
    """The class of the trainer's arguments."""
    reference: Any = None
    """The model that the trained one is compared with, if it is one of its own."""

    def encoder(
        self, config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
    ) -> RowEncoder:
        """Both replies behind the ids that generation starts from."""
        return PreferenceEncoder(tokenizer, chat_settings(config, source))

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
