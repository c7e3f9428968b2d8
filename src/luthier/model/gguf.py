"""A GGUF file as a Hugging Face folder, converted once into the cache.

GGUF is the format of llama.cpp: one file with metadata, vocabulary and (mostly quantized) weights.
Training needs plain weights, so they are unpacked to bfloat16: half of float32's size, and finer
than what the 4- to 8-bit blocks of such a file keep.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from luthier.errors import UserError
from luthier.storage import cache
from luthier.storage.manifest import hash_file

CONVERSION_VERSION = 1
"""Raise it when the conversion's result changes: folders of an older version are not used."""

INSTALL_COMMAND = "pip install 'luthier[gguf]'"


def convert_model(file: Path) -> Path:
    """Return the folder with the file's weights, configuration and (where known) tokenizer.

    The first call takes some 12 s for 135M parameters; later ones check the folder's hashes.
    Raises UserError for a file that cannot be read or an architecture that is not supported.
    """
    folder = converted_folder(file)
    return cache.make_once(folder, lambda new: _write_model(file, new))


def convert_tokenizer(file: Path) -> Path:
    """Return a folder with the file's tokenizer alone: a few seconds, without torch.

    Raises UserError for a file that cannot be read or a tokenizer that is not converted exactly.
    """

    folder = _folder(file, "tokenizer")
    return cache.make_once(folder, lambda new: save_tokenizer(read_metadata(file), new))


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the file's metadata, by llama.cpp's key names; raises UserError if it is no GGUF."""
    reader = _open(file)
    return {name: field.contents() for name, field in reader.fields.items()}


def converted_folder(file: Path) -> Path:
    """The folder that a file is converted into, there or not yet; its name has the file's hash."""
    return _folder(file, "model")


def _folder(file: Path, part: str) -> Path:
    name = f"{file.stem}-{hash_file(file)[:16]}-v{CONVERSION_VERSION}"
    return cache.cache_root() / "gguf" / name / part


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"Reading {file.name} needs the package gguf: {INSTALL_COMMAND}") from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{file} is damaged or no GGUF file: {error}.\nDownload or install it again."
        ) from error


def _write_model(file: Path, folder: Path) -> None:

    reader = _open(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_stretched_rope(file, metadata, {tensor.name for tensor in reader.tensors})
    _unpack(file).save_pretrained(folder)
    if has_supported_tokenizer(metadata):
        save_tokenizer(metadata, folder)


def _refuse_stretched_rope(file: Path, metadata: Mapping[str, Any], tensors: set[str]) -> None:
    """Stop where the file stretches its positions: transformers drops that without a word."""
    key = f"{metadata['general.architecture']}.rope.scaling.type"
    if "rope_freqs.weight" in tensors or metadata.get(key, "none") != "none":
        raise UserError(
            f"{file.name} scales its rotary positions (as Llama 3.1 does), which is lost in the "
            "conversion from GGUF.\nUse the model's own repository: model.path=ORGANISATION/MODEL."
        )


def _unpack(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"transformers cannot read the model in {file.name}: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:5])
        raise UserError(
            f"{file.name} lacks weights that its architecture has ({some}): it cannot be used."
        )
    return model


# The tokenizer that a GGUF file describes, as Hugging Face files; needs no torch.
#
# A GGUF names the rule that cuts text before the merges (`tokenizer.ggml.pre`) but does not
# hold it. With the wrong rule most texts still come out right, so nobody notices: each rule
# here is held token for token against the model's own tokenizer in the tests, and an unknown
# name is refused.

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` whose tokens are matched whole: special and plain."""


@dataclass(frozen=True)
class PreTokenizerRule:
    """How one family of byte-level tokenizers cuts text before it merges."""

    split: str | None = None
    """The regular expression of the pieces; None for GPT-2's."""
    single_digits: bool = False
    """Cut every digit off first."""
    nfc: bool = False
    """Compose the text's characters first."""
    whole_words: bool = False
    """A piece that is a token as it stands is not merged (`ignore_merges`)."""


LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZER_RULES: Mapping[str, PreTokenizerRule] = {
    "gpt-2": PreTokenizerRule(),
    "smollm": PreTokenizerRule(single_digits=True),
    "starcoder": PreTokenizerRule(single_digits=True),
    "llama-bpe": PreTokenizerRule(LLAMA_3_SPLIT, whole_words=True),
    "qwen2": PreTokenizerRule(QWEN_2_SPLIT, nfc=True),
    "tekken": PreTokenizerRule(TEKKEN_SPLIT, whole_words=True),
}
"""`tokenizer.ggml.pre` -> the rule."""


def has_supported_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file's tokenizer is of a kind that is converted exactly."""
    kind = metadata.get("tokenizer.ggml.model")
    return kind == "gpt2" and metadata.get("tokenizer.ggml.pre") in PRE_TOKENIZER_RULES


def save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template that `metadata` describes.

    Raises UserError for a kind of tokenizer that is not converted exactly.
    """
    if not has_supported_tokenizer(metadata):
        raise UserError(_unknown(metadata))
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    settings = json.dumps(_settings(metadata), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_bytes(template.encode())


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a byte-level GGUF vocabulary whose rule is in `RULES`."""
    rule = PRE_TOKENIZER_RULES[metadata["tokenizer.ggml.pre"]]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pairs = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata)
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def _pre_tokenizer(rule: PreTokenizerRule) -> PreTokenizer:
    if rule.split:
        pieces = Split(Regex(rule.split), behavior="isolated")
        return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    bytes_of_words = ByteLevel(add_prefix_space=False, use_regex=True)
    if rule.single_digits:
        return Sequence([Digits(individual_digits=True), bytes_of_words])
    return bytes_of_words


def _post_processor(metadata: Mapping[str, Any]) -> Any:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not metadata.get("tokenizer.ggml.add_bos_token"):
        return byte_level
    number = metadata["tokenizer.ggml.bos_token_id"]
    token = metadata["tokenizer.ggml.tokens"][number]
    begin = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )
    return processors.Sequence([byte_level, begin])


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {f"{name}_token": tokens[n] for name, n in numbers.items() if n is not None}
    architecture = metadata["general.architecture"]
    return special | {
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _unknown(metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("tokenizer.ggml.model")
    rule = metadata.get("tokenizer.ggml.pre")
    return (
        f"The GGUF file's tokenizer (kind {kind!r}, rule {rule!r}) is none that luthier converts "
        f"exactly: kind 'gpt2' with one of the rules {', '.join(PRE_TOKENIZER_RULES)}.\n"
        "Name the model's own tokenizer: model.tokenizer=ORGANISATION/MODEL."
    )
