"""Card, notes and plot beside saved weights."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.trust import EVERYTHING
from luthier.errors import UserError
from luthier.export import model_facts
from luthier.export.card import write_model_card
from luthier.export.model_facts import ModelFacts
from luthier.export.ollama import translate_template
from luthier.export.usage_snippets import ChatFormat, serving_notes
from luthier.model.artifact import Artifact, build_chat_encoder, find_artifact, training_method_of
from luthier.model.model_files import read_generation_file
from luthier.model.processor import PROCESSOR_FILES, ProcessorFile, find_processor_files
from luthier.redaction import redact_text

if TYPE_CHECKING:
    from luthier.chat.template import ChatTemplate

_CHATS = ("dpo", "kto", "orpo", "cpo", "grpo", "rloo", "distill")
"""Methods whose models cannot be talked to without a template; `sft` may train plain text."""
CARD, NOTES, PLOT = "README.md", "EXPORT.md", "loss.png"


def write_card(run: Path) -> str | None:
    """Write the card of a finished run into its model/ folder; return what went wrong, or None.

    Weights are saved by then: a card that cannot be written is said and fails nothing.
    """
    try:
        # This process has just trained the run: its code has run already.
        artifact = find_artifact(str(run), trust=EVERYTHING)
        facts = model_facts.collect_facts(artifact)
        if artifact.folder is not None:
            write_descriptions(artifact.folder, facts, chat_format_of(artifact), plot=run / PLOT)
    except Exception as error:  # whatever it is, hours of training must not end with it
        return f"{type(error).__name__}: {error}"
    return None


def write_descriptions(
    folder: Path, facts: ModelFacts, chat_format: ChatFormat, plot: Path | None = None
) -> None:
    """Write README.md, EXPORT.md, card.json and the plot beside the weights in `folder`."""
    if plot is not None and plot.is_file() and plot.parent != folder:
        shutil.copyfile(plot, folder / PLOT)
    facts.save(folder)
    for name, text in description_texts(facts, chat_format).items():
        (folder / name).write_text(text, encoding="utf-8")


def description_texts(
    facts: ModelFacts, chat_format: ChatFormat, repository: str = "."
) -> dict[str, str]:
    """Return the card and the notes by their files' names, for a model in `repository`."""
    has_template = chat_format.template is not None
    return {
        CARD: redact_text(write_model_card(facts, chat_format.stop_ids, has_template, repository)),
        NOTES: redact_text(serving_notes(facts, chat_format, repository)),
    }


def chat_format_of(artifact: Artifact) -> ChatFormat:
    """Return the template and the stop tokens that an artifact was trained with."""
    from luthier.model.tokenizer import end_token_ids, load_tokenizer

    tokenizer: Any = load_tokenizer(artifact.base)
    has_template = artifact.chat is not None or tokenizer.chat_template is not None
    # The base's tokenizer may have no template; these methods cannot have trained without one.
    has_template |= training_method_of(artifact) in _CHATS
    if artifact.task != "CAUSAL_LM" or artifact.is_reward or not has_template:
        # Without a conversation the model stops where its base does; dict.fromkeys drops repeats.
        ends = [tokenizer.eos_token_id, *end_token_ids(artifact.base)]
        ids = [number for number in dict.fromkeys(ends) if number is not None]
        return ChatFormat(ids, tokenizer.convert_ids_to_tokens(ids), None)
    encoder = build_chat_encoder(artifact, tokenizer)
    template = _load_template(encoder.settings(), tokenizer)
    bos = _find_automatic_bos(tokenizer)
    ids = encoder.stop_token_ids
    # A server that puts the BOS token itself would put a second one before such a template's text.
    greeting = [{"role": "user", "content": "Hi"}]
    writes_bos = bos is not None and str(template.render(greeting, None, True)).startswith(bos)
    return ChatFormat(
        ids,
        tokenizer.convert_ids_to_tokens(ids),
        template.source,
        translate_template(lambda messages, asks: str(template.render(messages, None, asks)), bos),
        bos if bos and writes_bos else None,
        "strftime_now" in template.source,
    )


def _load_template(settings: dict[str, Any], tokenizer: Any) -> "ChatTemplate":
    from luthier.chat.template import ChatTemplate

    source = settings["template"]
    if isinstance(source, dict):
        # A tokenizer may hold several templates by name; training takes the default one.
        source = source["default"]
    variables = {**tokenizer.special_tokens_map, **settings["variables"]}
    return ChatTemplate(source, variables, settings["date"])


def _find_automatic_bos(tokenizer: Any) -> str | None:
    """Return the BOS token if the tokenizer puts it before every text, as llama.cpp then does."""
    first = tokenizer("a")["input_ids"][0]
    return tokenizer.bos_token if first == tokenizer.bos_token_id else None


# What a model's folder holds besides weights. The lists name files instead of copying everything:
# a checkpoint also holds the optimizer and the trainer's state, which are no part of a model.

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"),
    *("merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("chat_template.jinja", "chat.json"),
)
"""Files of a tokenizer and its template."""
TEMPLATES = "additional_chat_templates"
GENERATION = "generation_config.json"


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer with its processor, its templates and the chat settings."""
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def find_missing_processor(artifact: Artifact) -> tuple[ProcessorFile, ...]:
    """Return the processor's files of the model that an artifact began with, which it lacks.

    An older luthier saved none, and others do not where they train text.
    """
    # Of a full fine-tuning `base` is the trained model itself.
    is_whole = artifact.adapter is None and artifact.config is not None
    began = artifact.config.model if is_whole and artifact.config is not None else artifact.base
    try:
        files = find_processor_files(began)
    except UserError:  # a package that is no longer installed
        return ()
    folder = artifact.folder
    return tuple(file for file in files if folder is None or not (folder / file.name).exists())


def copy_generation_config(
    base: Path, adapter_folder: Path | None, target: Path, chat_format: ChatFormat
) -> None:
    """Write the generation config: the base's (or what was saved), with the stop tokens trained."""
    # What was saved with the run is newer than the base's, so it is looked at first.
    for folder in (adapter_folder, base):
        settings = None if folder is None else read_generation_file(folder)
        if settings is not None:
            break
    settings = settings or {}
    if chat_format.stop_ids:
        settings["eos_token_id"] = (
            chat_format.stop_ids if len(chat_format.stop_ids) > 1 else chat_format.stop_ids[0]
        )
    # Otherwise transformers would make it anew from config.json, which knows no stop tokens.
    settings.pop("_from_model_config", None)
    write_config(target / GENERATION, settings)


def write_config(file: Path, settings: dict[str, Any]) -> None:
    """Write a JSON configuration as transformers does."""
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def model_config(config: Any, architecture: str, dtype: str, rows: int | None, tied: bool) -> None:
    """Set in a `PretrainedConfig` what a merge changes."""
    config.architectures = [architecture]
    config.dtype = dtype
    if rows is not None:
        # A multimodal model keeps these in the configuration of its language model, not at the top.
        config.get_text_config().vocab_size = rows
    if not tied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
