"""The key of encoded rows, and what a tokenizer's digest sees."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.data.store import cache_key, store, tokenizer_digest

PARTS = {"sources": ["ab12"], "settings": {"max_length": 512, "train_on": "all"}}


def test_the_key_is_64_hex_digits_that_do_not_hang_on_the_order():
    other = {"settings": {"train_on": "all", "max_length": 512}, "sources": ["ab12"]}
    assert cache_key(PARTS) == cache_key(other)
    assert len(cache_key(PARTS)) == 64
    assert set(cache_key(PARTS)) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "other",
    [
        {},
        {**PARTS, "sources": ["ab13"]},
        {**PARTS, "sources": ["ab12", "ab12"]},
        {**PARTS, "more": None},
        {**PARTS, "settings": {"max_length": "512", "train_on": "all"}},
        {**PARTS, "settings": {"max_length": 512, "train_on": ["all"]}},
    ],
)
def test_any_other_part_gives_another_key(other):
    assert cache_key(other) != cache_key(PARTS)


def test_another_encoding_version_gives_another_key(monkeypatch):
    before = cache_key(PARTS)
    monkeypatch.setattr(store, "ENCODING_VERSION", store.ENCODING_VERSION + 1)
    assert cache_key(PARTS) != before


@pytest.mark.parametrize("value", [Path("a"), {1, 2}, float("nan")], ids=["path", "set", "nan"])
def test_what_is_not_json_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        cache_key({"a": value})


VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefgh ", "ab", "cd"]
MERGES = [("a", "b"), ("c", "d")]


def backend(vocabulary=VOCABULARY, merges=MERGES):
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    return tokenizer


def wrapped(tokenizer=None, **settings):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or backend(),
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings},
    )


def swapped(words, one, other):
    words = list(words)
    i, j = words.index(one), words.index(other)
    words[i], words[j] = words[j], words[i]
    return words


def changed(what):
    """A backend with one thing changed."""
    tokenizer = backend()
    if what == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
    elif what == "pre-tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif what == "post-processor":
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    elif what == "added token":
        tokenizer.add_tokens([AddedToken("new")])
    elif what == "special token":
        tokenizer.add_special_tokens([AddedToken("ab", normalized=False)])
    elif what == "stripping":
        tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    elif what == "dropout":
        tokenizer.model.dropout = 0.1
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: wrapped(backend(swapped(VOCABULARY, "a", "b"))), id="ids"),
        pytest.param(lambda: wrapped(backend([*VOCABULARY, "gh"])), id="one-token-more"),
        pytest.param(lambda: wrapped(backend(merges=MERGES[:1])), id="one-merge-less"),
        pytest.param(lambda: wrapped(backend(merges=MERGES[::-1])), id="order-of-merges"),
        pytest.param(lambda: wrapped(changed("normalizer")), id="normalizer"),
        pytest.param(lambda: wrapped(changed("pre-tokenizer")), id="pre-tokenizer"),
        pytest.param(lambda: wrapped(changed("post-processor")), id="post-processor"),
        pytest.param(lambda: wrapped(changed("added token")), id="added-token"),
        pytest.param(lambda: wrapped(changed("special token")), id="special-token"),
        pytest.param(lambda: wrapped(changed("stripping")), id="stripping"),
        pytest.param(lambda: wrapped(changed("dropout")), id="dropout"),
        pytest.param(lambda: wrapped(eos_token="<s>"), id="end-token"),
        pytest.param(lambda: wrapped(pad_token="</s>"), id="padding-token"),
        pytest.param(lambda: wrapped(split_special_tokens=True), id="split-special-tokens"),
    ],
)
def test_what_decides_ids_or_the_templates_tokens_changes_the_digest(other):
    assert tokenizer_digest(other()) != tokenizer_digest(wrapped())


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ messages }}"},
        {"model_max_length": 7},
        {"padding_side": "left"},
        {"name_or_path": "elsewhere"},
    ],
    ids=["template", "length", "padding-side", "name"],
)
def test_what_decides_no_id_does_not(settings):
    assert tokenizer_digest(wrapped(**settings)) == tokenizer_digest(wrapped())


def test_calls_before_do_not_change_the_digest():
    tokenizer = wrapped(pad_token="</s>")
    before = tokenizer_digest(tokenizer)
    tokenizer(["ab cd", "a"], padding=True, truncation=True, max_length=1)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_digest(tokenizer) == before
    tokenizer.backend_tokenizer.enable_padding(pad_token=',"added_tokens":', pad_id=1)
    assert tokenizer_digest(tokenizer) == before


ASSETS = os.environ.get("LUTHIER_ASSETS")


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_the_same_files_elsewhere_have_the_same_digest(name, tmp_path):
    here = Path(ASSETS) / "tokenizers" / name
    shutil.copytree(here, tmp_path / "copy")
    first, second = (AutoTokenizer.from_pretrained(path) for path in (here, tmp_path / "copy"))
    assert tokenizer_digest(first) == tokenizer_digest(second)
    second.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer_digest(saved) == tokenizer_digest(first)


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_one_changed_token_in_the_file_changes_the_digest(tmp_path):
    here = Path(ASSETS) / "tokenizers" / "smollm2"
    shutil.copytree(here, tmp_path / "copy")
    (tmp_path / "copy").chmod(0o755)
    file = tmp_path / "copy" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.unlink()
    file.write_text(json.dumps(content))
    first, second = (AutoTokenizer.from_pretrained(path) for path in (here, tmp_path / "copy"))
    assert tokenizer_digest(first) != tokenizer_digest(second)
