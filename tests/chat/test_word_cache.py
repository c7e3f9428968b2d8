"""ASCII that is cut into words by Python has the ids that the tokenizer gives it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from helpers.conversations import LLAMA_3_WORDS, TOKENIZERS, base_tokenizer
from luthier.chat import tokens, word_cache
from luthier.chat.tokens import TokenEncoder
from luthier.chat.types import unpack_ids
from luthier.chat.word_cache import make_word_encoder

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NOT_BY_WORDS = ("sentencepiece", "metaspace", "llama2")
ASCII = st.one_of(
    st.text(st.characters(max_codepoint=127)),
    st.text("aBsStTlLrReE'7 .,/\n\r\t"),
    st.lists(st.sampled_from(["it's", "WE'LL", " a", "  ", "\n\n", "1234", "x=[1]", "-"])).map(
        "".join
    ),
)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in NOT_BY_WORDS])
def test_any_ascii(name):
    encoder = TokenEncoder(base_tokenizer(name))
    assert encoder._word_encoder is not None

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(ASCII.filter(lambda text: not encoder.pattern.search(text)), max_size=5))
    def holds(texts):
        known = encoder.encode_plain(texts)
        plain = encoder.backend.encode_batch(texts, add_special_tokens=False)
        assert [unpack_ids(known[text]) for text in texts] == [one.ids for one in plain]

    holds()


@pytest.mark.parametrize(
    ("steps", "by_words"),
    [
        pytest.param([GPT2], True, id="GPT-2's words"),
        pytest.param([split(LLAMA_3_WORDS), BYTES], True, id="Llama 3's words"),
        pytest.param([split(TEKKEN), BYTES], True, id="Tekken's words, by case"),
        pytest.param([pre_tokenizers.Digits(True), GPT2], True, id="digits alone"),
        pytest.param([pre_tokenizers.Digits(False), GPT2], True, id="numbers alone"),
        pytest.param([BYTES], True, id="the whole text is one word"),
        pytest.param([split(r"\p{N}+"), BYTES], False, id="matches are not all of the text"),
        pytest.param([split(r"\S+", "removed"), BYTES], False, id="matches are thrown away"),
        pytest.param([split(r"\s+", invert=True), BYTES], False, id="what is no match"),
        pytest.param([split(r"[[:alpha:]]+|[^a-z]"), BYTES], False, id="a set in a set"),
        pytest.param([split(r"[\w&&[^a]]+|a|\W"), BYTES], False, id="what two sets share"),
        pytest.param([split(r"\p{P}+|\P{P}+"), BYTES], False, id="a class that is not known"),
        pytest.param([split(r"\h+|\H+"), BYTES], False, id="an escape that is not known"),
        pytest.param([split(r"(\w)+|\W+"), BYTES], False, id="a group that captures"),
        pytest.param([GPT2, pre_tokenizers.Digits(True)], False, id="a step behind the bytes"),
        pytest.param([pre_tokenizers.ByteLevel()], False, id="a space before each text"),
        pytest.param([pre_tokenizers.Whitespace(), BYTES], False, id="another kind of step"),
        pytest.param([pre_tokenizers.Whitespace()], False, id="no bytes"),
    ],
)
def test_only_what_is_cut_alike_is_cut_by_words(steps, by_words):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.normalizer = normalizers.NFC()
    states = [json.loads(step.__getstate__()) for step in steps]
    assert (make_word_encoder(backend, states) is not None) == by_words


def test_too_many_words_are_forgotten(monkeypatch):
    monkeypatch.setattr(word_cache, "_MAX_CACHED_CHARS", 20)
    encoder = TokenEncoder(base_tokenizer("gpt2-words"))
    texts = ["a lute", "the luthier makes lutes", "a lute and a luthier"]
    for text in texts * 2:
        assert [unpack_ids(ids) for ids in encoder._word_encoder.encode([text])] == [
            encoder.backend.encode(text, add_special_tokens=False).ids
        ]
        assert sum(map(len, encoder._word_encoder._cache)) <= 20


def test_too_many_texts_are_forgotten(monkeypatch):
    monkeypatch.setattr(tokens, "_CACHE_BYTES", 400)
    encoder = TokenEncoder(base_tokenizer("gpt2-words"))
    texts = ["a lute", "naïve", "the luthier makes lutes", "a lute"]
    for text in texts * 2:
        ids = encoder.backend.encode(text, add_special_tokens=False).ids
        assert unpack_ids(encoder.encode_plain([text])[text]) == ids
        assert len(encoder._cache) <= 2
