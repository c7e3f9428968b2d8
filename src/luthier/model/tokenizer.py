"""The tokenizer of a model, with a padding token that stops no reply from training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import embeddings, gguf, source
from luthier.model.model_files import read_generation_file
from luthier.model.untrained_tokens import find_embeddings, find_weights_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING_NAMES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|PAD|>",
    "<|endoftext|>",
    "<unk>",
)
"""Tokens that stand for padding where a tokenizer names none, the best first."""


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """Return the configured tokenizer with the configured new tokens; it always can pad.

    Raises UserError if it cannot be found or fetched, or cannot be read, and for a new token that
    is none. A tokenizer that belongs to another model is refused.
    """
    from luthier.data.encoders.chat import share_templates_that_passed

    share_templates_that_passed()
    key = "model.path" if config.tokenizer is None else "model.tokenizer"
    tokenizer = _read_tokenizer(config, config.tokenizer or config.path, key)
    if config.tokenizer is not None:
        _check_same_ids(tokenizer, config)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = _read_processor_template(config)
    ensure_padding_token(tokenizer)
    embeddings.add_tokens(tokenizer, config)
    return tokenizer


def _read_tokenizer(config: ModelConfig, path: str, key: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer at `path`; `key` is the setting that names it, for errors."""
    from transformers import AutoTokenizer

    file = source.find_gguf_file(path, key)
    try:
        return AutoTokenizer.from_pretrained(
            path if file is None else gguf.convert_tokenizer(file),
            revision=config.revision if path == config.path else None,
            trust_remote_code=config.trust_remote_code,
            local_files_only=source.needs_hub(path) and source.is_hub_unreachable(),
        )
    except UserError:
        raise
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        problem = source.explain_hub_error(error, path, key)
        text = source.OWN_CODE if "trust_remote_code" in str(error) else error
        raise problem or UserError(f"{key}={path}: the tokenizer cannot be read: {text}") from error


def _read_processor_template(config: ModelConfig) -> str | None:
    """Return the chat template that only a model's processor has; None where it has none, either.

    Older image-text models (LLaVA 1.5) have it in a file that transformers' tokenizers pass over.
    """
    from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file

    if source.find_gguf_file(config.path) is not None:
        return None
    file = cached_file(
        config.path,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        revision=config.revision,
        local_files_only=source.needs_hub(config.path) and source.is_hub_unreachable(),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        template = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.path={config.path}: {LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE} cannot be read: "
            f"{error!r}"
        ) from error
    return template if isinstance(template, str) else None


def _check_same_ids(tokenizer: "PreTrainedTokenizerBase", config: ModelConfig) -> None:
    """Raise UserError where a token of the model's own tokenizer has another id in this one.

    Further tokens are fine. A model that comes without a tokenizer has nothing to compare with.
    """
    try:
        vocabulary = _read_tokenizer(config, config.path, "model.path").get_vocab()
    except UserError:
        return
    other_ids = tokenizer.get_vocab()
    differing = [token for token, number in vocabulary.items() if other_ids.get(token) != number]
    if not differing:
        return
    first = min(differing, key=vocabulary.__getitem__)
    there = f"has the id {other_ids[first]}" if first in other_ids else "is unknown"
    raise UserError(
        f"model.tokenizer={config.tokenizer} belongs to another model than {config.path}: of its "
        f"{len(vocabulary):,} tokens {len(differing):,} differ. {first!r}, for the model "
        f"{vocabulary[first]}, {there} there.\nLeave model.tokenizer out, or name one that has all "
        "tokens of the model's own; it may have more."
    )


def end_token_ids(config: ModelConfig) -> list[int]:
    """Return the end tokens of the model's generation config; none where there is no such file.

    The token that ends a turn is often there and not in the tokenizer (Gemma, GLM, Llama 3).
    """
    from transformers import GenerationConfig

    file = source.find_gguf_file(config.path)
    if file is not None:
        return []
    if source.is_local(config.path):
        # transformers takes a damaged file for none.
        read_generation_file(Path(config.path).expanduser())
    try:
        generation = GenerationConfig.from_pretrained(
            config.path,
            revision=config.revision,
            local_files_only=source.needs_hub(config.path) and source.is_hub_unreachable(),
        )
    except OSError:
        return []
    ids = generation.eos_token_id
    return ids if isinstance(ids, list) else [ids] if ids is not None else []


def ensure_padding_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set the padding token of a tokenizer without one to an existing token, never to a new one.

    The vocabulary stays as it is, so the embeddings keep their size. As the last resort it is the
    end token: labels are masked by length, so the true end of a reply still trains.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    candidates = [name for name in PADDING_NAMES if name in vocabulary]
    tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            "The tokenizer has neither a padding token nor an end token, so rows of different "
            "lengths cannot be put side by side.\n"
            "Set pad_token in its tokenizer_config.json, or name another: model.tokenizer=..."
        )


def describe_padding(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return what rows are padded with, where that token is from, and that it never trains."""
    number = tokenizer.pad_token_id
    text = f"padding is {tokenizer.pad_token} (id {number})"
    if number == tokenizer.eos_token_id:
        text += ", the end token: padding is masked by length, so the ends of replies still train"
    if tokenizer.init_kwargs.get("pad_token") is None:
        text += "; luthier chose it, because the tokenizer names none"
    return text


def check_vocabulary_in_files(tokenizer: "PreTrainedTokenizerBase", config: ModelConfig) -> None:
    """Raise UserError if the model's files have no embedding for an id of the tokenizer.

    Tokens that the config adds get rows of their own. Nothing is checked where the files are not on
    this machine, or are read by code of the user's own; `check_vocabulary_fits` looks at the model.
    """
    folder = find_weights_folder(config)
    stored = find_embeddings(folder) if folder is not None and config.loader is None else None
    if stored is None:
        return
    added = {*config.add_tokens, *config.add_special_tokens}
    ids = (number for text, number in tokenizer.get_vocab().items() if text not in added)
    _check_highest_id(max(ids), stored.shape[0])


def check_vocabulary_fits(tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Raise UserError if the tokenizer can produce ids for which the model has no embedding."""
    _check_highest_id(max(tokenizer.get_vocab().values()), embeddings.count_embedding_rows(model))


def _check_highest_id(highest: int, rows: int) -> None:
    if highest >= rows:
        raise UserError(
            f"The tokenizer's ids go up to {highest}, but the model has embeddings for {rows} "
            "tokens only, so tokenizer and model do not belong together.\n"
            "Leave model.tokenizer out to use the model's own, or name a model made for this "
            "tokenizer."
        )
