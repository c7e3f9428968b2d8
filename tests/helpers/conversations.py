"""Templates, tokenizers and conversations that the tests of `luthier.chat` share."""

import copy
import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ASSETS = Path(os.environ["LUTHIER_ASSETS"]) if os.environ.get("LUTHIER_ASSETS") else None
TRL_TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The lute is a plucked string instrument; a luthier makes lutes, violins and guitars.",
    "user assistant system tool function model\n\nHello there, how are you today?\n I am fine.",
    '{"name": "look_up", "arguments": {"word": "lute", "n": 12}}\n<b>1+2=3</b> [[1, 2], [3, 4]]',
    "Thinking about it: first\nsecond\n\nthird. Naïve café, 琵琶 and ελ.",
] * 4

# How the tokens of a template look in its source; a model's own tokenizer has them all.
_CONTROL = re.compile(
    r"<\|[\w▁ .-]+\|>|<｜[^｜\n]+｜>|\[/?[A-Z_]{3,}\]|<(?:start|end)_of_(?:turn|image)>|</?s>|<sop>"
    r"|\[gMASK\]|<(?:bos|eos)>|<end_of_utterance>|<\|\w+>|<\w+\|>"
)
_TAGS = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")


def _trained(tokenizer, alphabet):
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_level(words):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece():
    """A tokenizer as Llama-2 has it: a space in front of every text, one word for a whole text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["▁"],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


_TINY = {
    "gpt2-words": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3-words": lambda: _byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "sentencepiece": _sentencepiece,
    "metaspace": _metaspace,
}
ASSET_TOKENIZERS = ["smollm2", "qwen3", "llama3_1", "llama2", "mistral_tekken_v3"] if ASSETS else []
TOKENIZERS = [*_TINY, *ASSET_TOKENIZERS]


@functools.cache
def base_tokenizer(name):
    """A tokenizer trained here, or one of the assets, without chat template."""
    if name in _TINY:
        return PreTrainedTokenizerFast(tokenizer_object=_TINY[name]())
    return AutoTokenizer.from_pretrained(ASSETS / "tokenizers" / name)


def asset_tokenizer(name):
    """An asset's tokenizer with its own template."""
    return AutoTokenizer.from_pretrained(ASSETS / "tokenizers" / name)


def pair(name, source, eos="</s>", bos="<s>", rstrip=False):
    """A tokenizer for a template: with the tokens that the template writes, as models have them."""
    tokenizer = copy.deepcopy(base_tokenizer(name))
    tokenizer.chat_template = source
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    have = tokenizer.added_tokens_encoder
    control = [token for token in dict.fromkeys(_CONTROL.findall(source)) if token not in have]
    tokenizer.add_tokens(
        [AddedToken(t, rstrip=rstrip, normalized=False) for t in control], special_tokens=True
    )
    tags = [token for token in dict.fromkeys(_TAGS.findall(source)) if token not in have]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer


def trl(name):
    """The source of a template that TRL ships."""
    return (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def all_templates():
    """Every template at hand by name."""
    files = sorted(TRL_TEMPLATES.glob("*.jinja"))
    files += sorted((ASSETS / "chat_templates").glob("*/*.jinja")) if ASSETS else []
    return {f"{file.parent.name}/{file.stem}": file.read_text(encoding="utf-8") for file in files}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text, **more):
    return {"role": "tool", "content": text, "name": "look_up", "tool_call_id": "call00001", **more}


def call(word="lute", **more):
    arguments = {"word": word, **more}
    return {
        "id": "call00001",
        "type": "function",
        "function": {"name": "look_up", "arguments": arguments},
    }


LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


def replies(tokenizer, sequences):
    """The trained text of each trained turn, in the order of the messages."""
    found = [
        (message, tokenizer.decode(sequence.input_ids[start:stop], skip_special_tokens=False))
        for sequence in sequences
        for message, start, stop in sequence.replies
    ]
    return [text for _, text in sorted(found)]


def assert_labels(sequence):
    """Labels are ids in the replies and -100 elsewhere."""
    expected = [-100] * len(sequence.input_ids)
    for _, start, stop in sequence.replies:
        expected[start:stop] = sequence.input_ids[start:stop]
    assert sequence.labels == expected


FAMILIES = [
    "qwen2_5",
    "qwen3",
    "llama3",
    "gemma3",
    "phi3",
    "deepseek_r1_distill",
    "gptoss",
    "cohere",
]


SPACE = st.sampled_from(["", "", "", " ", "\n", "\n\n", "  \n"])


WORDS = st.text(
    st.sampled_from("abcdeé琵 .,:!?'\"<>[]{}()/|0123456789\n\t-_ABC")
    | st.characters(codec="utf-8"),
    max_size=20,
)
