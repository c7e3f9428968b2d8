"""ASCII texts to token ids a word at a time: each different word is encoded once.

Byte-level tokenizers (GPT-2, Llama 3, Qwen, Mistral's Tekken) cut a text into words by patterns and
encode every word by itself. Texts have few different words, so most are looked up, which takes a
sixth of the time. The patterns speak of Unicode's letters and numbers; of these ASCII has so few
that Python's own `re` cuts as the tokenizer does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

from luthier.chat.types import pack_ids

WordSplitter = Callable[[str], list[str]]
_LONG_WORD = 4096
"""Characters of a word that takes a millisecond to encode."""
_MAX_CACHED_CHARS = 2_000_000
"""Characters of all words in the cache: beyond them it begins anew."""
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the step `ByteLevel` cuts."""
_NOT_ASCII = "\u0300"
"""Stands for classes of which ASCII has no character."""
_CLASSES = {
    "L": "a-zA-Z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "N": "0-9",
    "Nd": "0-9",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "Nl", "No"), _NOT_ASCII),
}
_PATTERN_SYNTAX = re.compile(r"\\p\{(\w+)\}|\\([a-zA-Z])|\\.|[^\\]", re.DOTALL)
_ESCAPES = frozenset("rntsSdw")
"""Escapes of a letter that mean the same in Python."""
UNICODE_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave ASCII as it is."""


class _UnsupportedStep(Exception):
    """A step that `re` is not known to take as the tokenizer does."""


class WordEncoder:
    """Encodes ASCII texts in which no added token stands."""

    def __init__(self, backend: Any, split: WordSplitter) -> None:
        """`split`: cuts texts into words as the backend does."""
        self._split = split
        self._cache = _WordCache(backend)

    def encode(self, texts: list[str]) -> list[bytes]:
        """Return the ids of each text, packed."""
        ids = self._cache.__getitem__
        encoded = [b"".join(map(ids, self._split(text))) for text in texts]
        self._cache.bound()
        return encoded


class _WordCache(dict[str, bytes]):
    """The packed ids of words; those of a new one are found when it is first asked for."""

    def __init__(self, backend: Any) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        super().__init__()
        self._size = 0
        # The same model, which takes each text as one word.
        # Words are cut by then, so neither normalizer nor patterns are run once more.
        self._backend = type(backend)(backend.model)
        self._backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        # tokenizers 0.23 encodes one text without giving up the interpreter lock: a word of a
        # megabyte would stop every other thread for seconds.
        if len(word) < _LONG_WORD:
            encoding = self._backend.encode(word, add_special_tokens=False)
        else:
            (encoding,) = self._backend.encode_batch_fast([word], add_special_tokens=False)
        ids = self[word] = pack_ids(encoding.ids)
        self._size += len(word)
        return ids

    def bound(self) -> None:
        """Forget all words where they have become too many."""
        if self._size > _MAX_CACHED_CHARS:
            self.clear()
            self._size = 0


def make_word_encoder(backend: Any, steps: list[dict[str, Any]]) -> WordEncoder | None:
    """Return what encodes ASCII word by word; None for a tokenizer that is not known to cut it so.

    `steps`: those that the backend takes before its model.
    """
    steps = [step for step in steps if step["type"] not in UNICODE_NORMALIZERS]
    if not steps or steps[-1]["type"] != "ByteLevel":
        return None
    try:
        cut = _make_splitter([_step_pattern(step) for step in steps if step.get("use_regex", True)])
    except (_UnsupportedStep, re.error):
        return None
    # Where both cut the probe alike, they cut all ASCII alike; elsewhere the tokenizer does all.
    probe = _make_probe_text()
    # Behind the step `ByteLevel` characters have other names, but of ASCII as many as before.
    backend_lengths = [len(word) for word, _ in backend.pre_tokenizer.pre_tokenize_str(probe)]
    return WordEncoder(backend, cut) if list(map(len, cut(probe))) == backend_lengths else None


def _make_splitter(patterns: list[re.Pattern[str]]) -> WordSplitter:
    """Cut by the first pattern, and what comes of that by the others."""
    if not patterns:
        return lambda text: [text]
    if len(patterns) == 1:
        return patterns[0].findall
    first, behind = patterns[0].findall, _make_splitter(patterns[1:])
    return lambda text: [word for segment in first(text) for word in behind(segment)]


def _step_pattern(step: dict[str, Any]) -> re.Pattern[str]:
    """Return the pattern whose matches are the words that a step makes of ASCII."""
    step_type = step["type"]
    if step_type == "ByteLevel" and not step["add_prefix_space"]:
        pattern = _to_ascii_pattern(_GPT2)
    elif step_type == "Digits":
        pattern = "[0-9]|[^0-9]+" if step["individual_digits"] else "[0-9]+|[^0-9]+"
    elif step_type == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = _to_ascii_pattern(step["pattern"].get("Regex", ""))
    else:
        raise _UnsupportedStep
    compiled = re.compile(pattern, re.ASCII)
    if compiled.groups or not pattern:
        raise _UnsupportedStep
    return compiled


def _to_ascii_pattern(pattern: str) -> str:
    """Return a pattern of the tokenizer in the words of `re`, for ASCII."""
    translated = []
    in_set = False
    for match in _PATTERN_SYNTAX.finditer(pattern):
        symbol, name, letter = match[0], match[1], match[2]
        if (name and name not in _CLASSES) or (letter and letter not in _ESCAPES):
            raise _UnsupportedStep
        # Sets in sets, and what two of them share, are not in `re`.
        if in_set and symbol in "[&":
            raise _UnsupportedStep
        if name:
            symbol = _CLASSES[name] if in_set else f"[{_CLASSES[name]}]"
        translated.append(symbol)
        in_set = symbol == "[" or (in_set and symbol != "]")
    return "".join(translated)


def _make_probe_text() -> str:
    """Return a text with each ASCII character beside each kind, and each three of the kinds."""
    samples = "aZs7'. /\n\t"
    beside = product(map(chr, range(128)), samples)
    threes = product(samples, repeat=3)
    return "".join(map("".join, (*beside, *threes, "we'LL say you're I've 1234567 aB AAb BA")))
