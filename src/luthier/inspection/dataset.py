"""A recipe's dataset opened to be looked at, without a model; no bad row stops the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import data
from luthier.config import load_config
from luthier.config.methods import check_example_type
from luthier.config.recipes import DATA_PATHS, check_recipe_files
from luthier.config.schema import RunConfig
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.examples import OpenedSource, eval_set_name, format_key
from luthier.environment import set_environment
from luthier.inspection.readers import Readers
from luthier.model.positions import check_max_length
from luthier.model.source import check_model_path
from luthier.model.tokenizer import (
    check_vocabulary_in_files,
    end_token_ids,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedDataset:
    """A valid configuration with its tokenizer and the opened sources of its dataset."""

    config: RunConfig
    tokenizer: "PreTrainedTokenizerBase"
    trained: dict[str, OpenedSource]
    """The training sources by name; the only one that has none is `dataset`."""
    evaluated: dict[str, OpenedSource]
    """The evaluation sets that have rows of their own, by config key."""
    readers: Readers
    """What makes sequences of their rows."""
    batching: BatchingSettings

    @property
    def name(self) -> str:
        """What the configuration is called: the recipe, or the model."""
        return self.config.recipe or self.config.model.path


def load_dataset(
    overrides: list[str], bad_rows: bool = False, is_trusted: bool = False
) -> LoadedDataset:
    """Open what a run with these overrides would read, less the weights.

    `bad_rows`: do not stop at rows that cannot be read. `is_trusted`: recipes may name code that
    is not the user's own. Raises UserError for mistakes in the configuration or the files, before
    anything large is imported where it can be known, and for rows that the method does not take.
    """
    return open_dataset(load_config(overrides, is_trusted).config, bad_rows)


def open_dataset(config: RunConfig, bad_rows: bool = False) -> LoadedDataset:
    """Open what a run with this config would read, as `load_dataset` does."""
    # A folder that holds a tokenizer and nothing else is enough here.
    needs_model = not Path(config.model.tokenizer or config.model.path).is_dir()
    check_recipe_files(config, [*(["model.path"] if needs_model else []), *DATA_PATHS])
    lenient = {"on_bad_row": "drop"} if bad_rows else {}
    sources = data.check_sources(config.dataset.model_copy(update=lenient))
    batching = read_batching_settings(config)
    if needs_model:
        check_model_path(config.model)
    check_max_length(config)
    set_environment(config)
    trained, evaluated = sources.open_train(), sources.open_eval()
    for opened in (*trained.values(), *evaluated.values()):
        type_key = format_key(opened.key)
        check_example_type(
            config.trainer.method, opened.row_format.example_type, opened.key, type_key
        )
    tokenizer = _quiet_tokenizer(config)
    check_vocabulary_in_files(tokenizer, config.model)
    readers = Readers(tokenizer, config, end_token_ids(config.model))
    return LoadedDataset(config, tokenizer, trained, evaluated, readers, batching)


def split_name(key: str) -> str:
    """What an evaluation set is called, by its config key: its name, or `held out`."""
    return eval_set_name(key) or "held out"


def _quiet_tokenizer(config: RunConfig) -> Any:
    """The tokenizer, without the library's remarks on long texts: here they are the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load_tokenizer(config.model)
