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

from luthier.chat.types import packed

Cut = Callable[[str], list[str]]
_KEPT = 2_000_000
"""Characters of all words that are kept."""
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the step `ByteLevel` cuts."""
_NONE = "\u0300"
"""Stands for classes of which ASCII has no character."""
_CLASSES = {
    "L": "a-zA-Z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "N": "0-9",
    "Nd": "0-9",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "Nl", "No"), _NONE),
}
_SYNTAX = re.compile(r"\\p\{(\w+)\}|\\([a-zA-Z])|\\.|[^\\]", re.DOTALL)
_ESCAPES = frozenset("rntsSdw")
"""Escapes of a letter that mean the same in Python."""
NORMAL_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave ASCII as it is."""


class _Unknown(Exception):
    """A step that `re` is not known to take as the tokenizer does."""


class Words:
    """Encodes ASCII texts in which no added token stands."""

    def __init__(self, backend: Any, cut: Cut) -> None:
        """`cut`: how the backend cuts texts into words."""
        self._cut = cut
        self._known = _KnownWords(backend)

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, packed."""
        ids = self._known.__getitem__
        found = [b"".join(map(ids, self._cut(text))) for text in texts]
        self._known.bound()
        return found


class _KnownWords(dict[str, bytes]):
    """The packed ids of words; those of a new one are found when it is first asked for."""

    def __init__(self, backend: Any) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        super().__init__()
        self._size = 0
        # The same model, which takes each text as one word.
        self._backend = type(backend)(backend.model)
        self._backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        ids = self[word] = packed(self._backend.encode(word, add_special_tokens=False).ids)
        self._size += len(word)
        return ids

    def bound(self) -> None:
        """Forget all words where they have become too many."""
        if self._size > _KEPT:
            self.clear()
            self._size = 0


def words_of(backend: Any, steps: list[dict[str, Any]]) -> Words | None:
    """What encodes ASCII word by word; None for a tokenizer that is not known to cut it so.

    `steps`: those that the backend takes before its model.
    """
    steps = [step for step in steps if step["type"] not in NORMAL_FORMS]
    if not steps or steps[-1]["type"] != "ByteLevel":
        return None
    try:
        cut = _cut_by([_pattern(step) for step in steps if step.get("use_regex", True)])
    except (_Unknown, re.error):
        return None
    probe = _probe()
    # Behind that last step characters have other names, but of ASCII as many as before.
    theirs = [len(word) for word, _ in backend.pre_tokenizer.pre_tokenize_str(probe)]
    return Words(backend, cut) if list(map(len, cut(probe))) == theirs else None


def _cut_by(patterns: list[re.Pattern[str]]) -> Cut:
    """Cut by the first pattern, and what comes of that by the others."""
    if not patterns:
        return lambda text: [text]
    if len(patterns) == 1:
        return patterns[0].findall
    first, behind = patterns[0].findall, _cut_by(patterns[1:])
    return lambda text: [word for part in first(text) for word in behind(part)]


def _pattern(step: dict[str, Any]) -> re.Pattern[str]:
    """The pattern whose matches are the words that a step makes of ASCII."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        pattern = _in_ascii(_GPT2)
    elif kind == "Digits":
        pattern = "[0-9]|[^0-9]+" if step["individual_digits"] else "[0-9]+|[^0-9]+"
    elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = _in_ascii(step["pattern"].get("Regex", ""))
    else:
        raise _Unknown
    compiled = re.compile(pattern, re.ASCII)
    if compiled.groups or not pattern:
        raise _Unknown
    return compiled


def _in_ascii(pattern: str) -> str:
    """A pattern of the tokenizer in the words of `re`, for ASCII."""
    found = []
    in_set = False
    for match in _SYNTAX.finditer(pattern):
        part, name, letter = match[0], match[1], match[2]
        if (name and name not in _CLASSES) or (letter and letter not in _ESCAPES):
            raise _Unknown
        # Sets in sets, and what two of them share, are not in `re`.
        if in_set and part in "[&":
            raise _Unknown
        if name:
            part = _CLASSES[name] if in_set else f"[{_CLASSES[name]}]"
        found.append(part)
        in_set = part == "[" or (in_set and part != "]")
    return "".join(found)


def _probe() -> str:
    """A text in which each ASCII character stands beside each kind, and each three of them."""
    kinds = "aZs7'. /\n\t"
    beside = product(map(chr, range(128)), kinds)
    threes = product(kinds, repeat=3)
    return "".join(map("".join, (*beside, *threes, "we'LL say you're I've 1234567 aB AAb BA")))
