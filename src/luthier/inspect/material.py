"""What the tools look at: the recipe's conversations and tokenizer, and no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import data, model
from luthier.config import load
from luthier.config.schema import RunConfig
from luthier.data.files import forget
from luthier.data.prepare import Source, read_conversations
from luthier.model.tokenizer import end_token_ids, load_tokenizer
from luthier.train.run import set_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Material:
    """A valid configuration with its tokenizer and both sides of its dataset."""

    config: RunConfig
    tokenizer: "PreTrainedTokenizerBase"
    end_tokens: list[int]
    """Those of the model's generation config."""
    train: Source
    heldout: Source
    equal: int
    """Rows left out of training because they equal a held-out row."""

    @property
    def name(self) -> str:
        """What the configuration is called: the recipe, or the model."""
        return self.config.recipe or self.config.model.path


def gather(overrides: list[str]) -> Material:
    """Read what a run with these overrides would read, less the weights.

    Raises UserError for mistakes in the configuration or the files, before anything large is
    imported where it can be known.
    """
    config = load(overrides).config
    data.check_files(config.dataset)
    # A folder that holds a tokenizer and nothing else is enough here.
    if not Path(config.model.tokenizer or config.model.path).is_dir():
        model.check_path(config.model)
    set_environment(config)
    train, heldout, equal = read_conversations(config.dataset, config.seed)
    forget()
    tokenizer = _quiet_tokenizer(config)
    return Material(config, tokenizer, end_token_ids(config.model), train, heldout, equal)


def _quiet_tokenizer(config: RunConfig) -> Any:
    """The tokenizer, without the library's remarks on long texts: here they are the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load_tokenizer(config.model)
