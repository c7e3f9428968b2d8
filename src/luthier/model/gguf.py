"""A GGUF file as a Hugging Face folder, converted once into the cache.

GGUF is the format of llama.cpp: one file with metadata, vocabulary and (mostly quantized) weights.
Training needs plain weights, so they are unpacked to bfloat16: half of float32's size, and finer
than what the 4- to 8-bit blocks of such a file keep. The tokenizer is made from the file's metadata
and needs no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import UserError
from luthier.storage import cache
from luthier.storage.manifest import hash_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

CONVERSION_VERSION = 1
"""Raise it when the conversion's result changes: folders of an older version are not used."""

INSTALL_COMMAND = "pip install 'luthier[gguf]'"

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` for added tokens: special ones and plain ones."""


@dataclass(frozen=True)
class PreTokenizerRule:
    """The rule by which a family of byte-level tokenizers cuts text before it merges."""

    split: str | None = None
    """The regular expression of the pieces; None for GPT-2's."""
    single_digits: bool = False
    """Whether every digit is cut off first."""
    nfc: bool = False
    """Whether the text's characters are composed first (Unicode NFC)."""
    ignore_merges: bool = False
    """Whether a piece that is a token as it stands is not merged."""


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

# A GGUF file names the rule that cuts text before the merges (`tokenizer.ggml.pre`) but does not
# hold it. With the wrong rule most texts still come out right, so nobody notices: each rule here is
# held token for token against the model's own tokenizer in the tests, and an unknown name is
# refused.
PRE_TOKENIZER_RULES: Mapping[str, PreTokenizerRule] = {
    "gpt-2": PreTokenizerRule(),
    "smollm": PreTokenizerRule(single_digits=True),
    "starcoder": PreTokenizerRule(single_digits=True),
    "llama-bpe": PreTokenizerRule(LLAMA_3_SPLIT, ignore_merges=True),
    "qwen2": PreTokenizerRule(QWEN_2_SPLIT, nfc=True),
    "tekken": PreTokenizerRule(TEKKEN_SPLIT, ignore_merges=True),
}
"""`tokenizer.ggml.pre` -> the rule."""


def convert_model(file: Path) -> Path:
    """Return the folder with the file's weights, configuration and (where known) tokenizer.

    The first call takes some 12 s for 135M parameters; later ones check the folder's hashes.
    Raises UserError for a file that cannot be read or an architecture that is not supported.
    """
    return cache.make_once(converted_folder(file), lambda new: write_model(file, new))


def convert_tokenizer(file: Path) -> Path:
    """Return a folder with the file's tokenizer alone: a few seconds, without torch.

    Raises UserError for a file that cannot be read or a tokenizer that is not converted exactly.
    """
    folder = converted_folder(file, "tokenizer")
    return cache.make_once(folder, lambda new: save_tokenizer(read_metadata(file), new))


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the file's metadata, by llama.cpp's key names; raises UserError if it is no GGUF."""
    reader = open_reader(file)
    return {name: field.contents() for name, field in reader.fields.items()}


@lru_cache
def _hash_once(file: Path, size: int, modified: int) -> str:
    """Return the hash of a file, which may be gigabytes, once for each of its states."""
    return hash_file(file)


def converted_folder(file: Path, content: str = "model") -> Path:
    """Return the folder that a file is converted into, there or not yet; its name has its hash.

    `content`: `model` for everything, `tokenizer` for the tokenizer alone.
    """
    state = file.stat()
    name = f"{file.stem}-{_hash_once(file, state.st_size, state.st_mtime_ns)[:16]}"
    name += f"-v{CONVERSION_VERSION}"
    return cache.cache_root() / "gguf" / name / content


def has_supported_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Tell whether a file's tokenizer is one that is converted exactly."""
    tokenizer_model = metadata.get("tokenizer.ggml.model")
    return tokenizer_model == "gpt2" and metadata.get("tokenizer.ggml.pre") in PRE_TOKENIZER_RULES


def save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template that `metadata` describes.

    Raises UserError for a kind of tokenizer that is not converted exactly.
    """
    if not has_supported_tokenizer(metadata):
        raise UserError(_unsupported_message(metadata))
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    settings = json.dumps(_tokenizer_settings(metadata), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_bytes(template.encode())


def build_tokenizer(metadata: Mapping[str, Any]) -> "Tokenizer":
    """Return the tokenizer of a byte-level GGUF vocabulary whose rule is in `RULES`."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    rule = PRE_TOKENIZER_RULES[metadata["tokenizer.ggml.pre"]]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pairs = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata)
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def _pre_tokenizer(rule: PreTokenizerRule) -> "PreTokenizer":
    """Return the tokenizers component that cuts text by a rule, before the merges."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if rule.split:
        pieces = Split(Regex(rule.split), behavior="isolated")
        return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
    if rule.single_digits:
        return Sequence([Digits(individual_digits=True), byte_level])
    return byte_level


def _post_processor(metadata: Mapping[str, Any]) -> Any:
    """Return the tokenizers component that puts the begin token in front, where the file has it."""
    from tokenizers import processors

    byte_level = processors.ByteLevel(trim_offsets=False)
    if not metadata.get("tokenizer.ggml.add_bos_token"):
        return byte_level
    number = metadata["tokenizer.ggml.bos_token_id"]
    token = metadata["tokenizer.ggml.tokens"][number]
    begin = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )
    return processors.Sequence([byte_level, begin])


def _tokenizer_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json."""
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


def _unsupported_message(metadata: Mapping[str, Any]) -> str:
    """Return the error's text for a tokenizer that is not converted exactly."""
    tokenizer_model = metadata.get("tokenizer.ggml.model")
    rule = metadata.get("tokenizer.ggml.pre")
    return (
        f"The GGUF file's tokenizer (kind {tokenizer_model!r}, rule {rule!r}) is none that luthier "
        f"converts exactly: kind 'gpt2' with one of the rules {', '.join(PRE_TOKENIZER_RULES)}.\n"
        "Name the model's own tokenizer: model.tokenizer=ORGANISATION/MODEL."
    )


def check_gguf_installed() -> None:
    """Raise UserError where the package that reads GGUF files is missing."""
    if find_spec("gguf") is None:
        raise UserError(f"Reading the file back needs the package gguf: {INSTALL_COMMAND}")


def open_reader(file: Path, mode: Literal["r", "r+"] = "r") -> Any:
    """Return the reader of a GGUF file; with `r+` its values can be set in place.

    Raises UserError where the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"Reading {file.name} needs the package gguf: {INSTALL_COMMAND}") from error
    try:
        return GGUFReader(file, mode)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{file} is damaged or no GGUF file: {error}.\nDownload or install it again."
        ) from error


def write_model(file: Path, folder: Path) -> None:
    """Write weights, configuration and, where it can be converted, the tokenizer."""
    reader = open_reader(file)
    # Read by hand: read_metadata would open the file a second time.
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_scaled_rope(file, metadata, {tensor.name for tensor in reader.tensors})
    _load_dequantized(file).save_pretrained(folder)
    if has_supported_tokenizer(metadata):
        save_tokenizer(metadata, folder)


def _refuse_scaled_rope(file: Path, metadata: Mapping[str, Any], tensors: set[str]) -> None:
    """Raise UserError where the file scales its positions.

    transformers 5 reads no scaling from a GGUF file, and loads the model without it.
    """
    key = f"{metadata['general.architecture']}.rope.scaling.type"
    if "rope_freqs.weight" in tensors or metadata.get(key, "none") != "none":
        raise UserError(
            f"{file.name} scales its rotary positions (as Llama 3.1 does), which is lost in the "
            "conversion from GGUF.\nUse the model's own repository: model.path=ORGANISATION/MODEL."
        )


def _load_dequantized(file: Path) -> Any:
    """Return the model of a GGUF file in bfloat16; raises UserError where weights are missing."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, modeling_gguf_pytorch_utils

    # transformers 5.23 shows a bar of its own here, even where its bars are switched off.
    setattr(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors)  # noqa: B010
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
