"""Supervised fine-tuning: conversations and plain texts, through `TokenTrainer`."""

from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.data.batching.rows import TokenRows
from luthier.data.batching.settings import Batching, batching_of
from luthier.data.prepare import Prepared
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.arguments import sft_arguments
from luthier.train.batching_stream import StreamRows
from luthier.train.methods.method import Ingredients
from luthier.train.sft import TokenTrainer


class Supervised:
    """Trains the replies of conversations, and every token of plain texts."""

    def arguments(self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool) -> Any:
        """The `trl.SFTConfig`."""
        return sft_arguments(config, machine, folder, has_eval)

    def load_model(self, config: RunConfig, machine: Machine, prepared: Prepared) -> Any:
        """A causal language model."""
        return load_model(config.model, config.quantization, machine, full=not config.lora)

    def trainer(self, given: Ingredients) -> TokenTrainer:
        """TRL's SFTTrainer over token rows."""
        batching = batching_of(given.config)
        return TokenTrainer(
            given.model,
            args=given.args,
            train_dataset=_training_rows(given.config, given.prepared, batching),
            eval_dataset=_evaluation_tables(given.prepared.eval),
            batching=batching,
            processing_class=given.tokenizer,
            callbacks=given.callbacks,
        )


def _training_rows(config: RunConfig, prepared: Prepared, batching: Batching) -> Any:
    """The rows to train on, as the trainer takes them."""
    if isinstance(prepared.train, TokenRows):
        return prepared.train
    return StreamRows(
        prepared.train,
        seed=config.seed,
        shuffle_buffer=config.dataset.shuffle_buffer,
        length=batching.length if batching.packing else None,
    )


def _evaluation_tables(sets: dict[str, TokenRows]) -> Any:
    """The evaluation sets as the trainer takes them: the only one has no name."""
    return next(iter(sets.values())) if len(sets) == 1 else sets or None
