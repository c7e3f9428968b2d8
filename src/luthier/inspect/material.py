"""What the tools look at: the recipe's sources and tokenizer, and no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import data, model
from luthier.config import load
from luthier.config.schema import DatasetConfig, RunConfig
from luthier.data.batching.settings import Batching, batching_of
from luthier.data.examples import Opened, eval_sources, open_rows, set_name, train_sources
from luthier.data.mixture import key_of
from luthier.environment import set_environment
from luthier.errors import UserError
from luthier.inspect.readers import Readers
from luthier.model.tokenizer import end_token_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHERS = {
    "preference": "pairs of a chosen and a rejected reply",
    "unpaired": "replies with a verdict",
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


@dataclass(frozen=True)
class Material:
    """A valid configuration with its tokenizer and the opened sources of its dataset."""

    config: RunConfig
    tokenizer: "PreTrainedTokenizerBase"
    trained: dict[str, Opened]
    """The training sources by name; the only one that has none is `dataset`."""
    evaluated: dict[str, Opened]
    """The evaluation sets that have rows of their own, by config key."""
    readers: Readers
    """What makes sequences of their rows."""
    batching: Batching

    @property
    def name(self) -> str:
        """What the configuration is called: the recipe, or the model."""
        return self.config.recipe or self.config.model.path


def gather(overrides: list[str], command: str, bad_rows: bool = False) -> Material:
    """Open what a run with these overrides would read, less the weights.

    `bad_rows`: do not stop at rows that cannot be read. Raises UserError for mistakes in the
    configuration or the files, before anything large is imported where it can be known, and for
    rows that are neither conversations nor plain text.
    """
    config = load(overrides).config
    data.check_files(_lenient(config.dataset) if bad_rows else config.dataset)
    batching = batching_of(config)
    # A folder that holds a tokenizer and nothing else is enough here.
    if not Path(config.model.tokenizer or config.model.path).is_dir():
        model.check_path(config.model)
    set_environment(config)
    trained, evaluated = _opened(config.dataset, command)
    tokenizer = _quiet_tokenizer(config)
    readers = Readers(tokenizer, config, end_token_ids(config.model))
    return Material(config, tokenizer, trained, evaluated, readers, batching)


def side_name(key: str) -> str:
    """What an evaluation set is called, by its config key: its name, or `held out`."""
    return set_name(key) or "held out"


def _lenient(config: DatasetConfig) -> DatasetConfig:
    return config.model_copy(update={"on_bad_row": "drop"})


def _opened(config: DatasetConfig, command: str) -> tuple[dict[str, Opened], dict[str, Opened]]:
    sources = train_sources(config)
    trained = {
        name: open_rows(source, key_of(name, sources), config.streaming)
        for name, source in sources.items()
    }
    evaluated = {
        key: open_rows(source, key, config.streaming)
        for key, source in eval_sources(config).items()
    }
    for opened in (*trained.values(), *evaluated.values()):
        _check_kind(opened, command)
    return trained, evaluated


def _check_kind(opened: Opened, command: str) -> None:
    shape = opened.shape
    if shape.kind in _OTHERS:
        raise UserError(
            f"{opened.key}: its rows are {_OTHERS[shape.kind]} (shape {shape.name}), and luthier "
            f"{command} looks at conversations and plain texts for now. If they are conversations "
            f"all the same, say so: {opened.key}.shape=messages."
        )


def _quiet_tokenizer(config: RunConfig) -> Any:
    """The tokenizer, without the library's remarks on long texts: here they are the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load_tokenizer(config.model)
