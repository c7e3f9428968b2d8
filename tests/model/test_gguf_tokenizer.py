import functools
import json

import pytest
import tiny_gguf
from tokenizers import Tokenizer

from luthier.errors import UserError
from luthier.model import gguf_tokenizer

RULES_OF_ASSETS = {
    "smollm2": "smollm",
    "starcoder2": "starcoder",
    "gpt2": "gpt-2",
    "llama3_1": "llama-bpe",
    "qwen3": "qwen2",
    "mistral_tekken_v3": "tekken",
}
HARD = [
    "\n\n1.",
    "2024-05-06",
    "  hi",
    "é e\u0301",
    "don't DON'T",
    "日本 2 ١٢",
    "a\r\n\tb  ",
    "🙂👍🏽",
]


def strings_in(value):
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


@functools.cache
def texts_of(assets):
    """Texts of all datasets, the hard cases first."""
    found = dict.fromkeys(HARD)
    for file in sorted((assets / "datasets").glob("*/*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines()[:150]:
            found |= dict.fromkeys(text[:4000] for text in strings_in(json.loads(line)))
    return list(found)


def metadata_of(folder, pre):
    return tiny_gguf.metadata(folder / "tokenizer.json", pre) | {"general.architecture": "llama"}


@pytest.mark.parametrize(("name", "pre"), RULES_OF_ASSETS.items(), ids=RULES_OF_ASSETS.values())
def test_every_rule_gives_the_tokens_of_the_models_own_tokenizer(assets, name, pre):
    folder = assets / "tokenizers" / name
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rebuilt = gguf_tokenizer.build(metadata_of(folder, pre))
    texts = texts_of(assets)
    assert len(texts) > 5000
    wanted = own.encode_batch(texts, add_special_tokens=False)
    got = rebuilt.encode_batch(texts, add_special_tokens=False)
    wrong = [text for text, a, b in zip(texts, wanted, got, strict=True) if a.ids != b.ids]
    assert wrong == []
    assert rebuilt.decode_batch([b.ids for b in got[:500]]) == own.decode_batch(
        [a.ids for a in wanted[:500]]
    )


def test_byte_level_alone_is_wrong_for_smollm(assets):
    folder = assets / "tokenizers" / "smollm2"
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    naive = gguf_tokenizer.build(metadata_of(folder, "gpt-2"))
    assert naive.encode("\n\n1.").ids != own.encode("\n\n1.").ids


CUTS = [
    ("gpt-2", "it's 12 or", ["it", "'s", "Ġ12", "Ġor"]),
    ("smollm", "it's 12\n\n3", ["it", "'s", "Ġ", "1", "2", "ĊĊ", "3"]),
    ("starcoder", "x12", ["x", "1", "2"]),
    ("llama-bpe", "IT'S 12345", ["IT", "'S", "Ġ", "123", "45"]),
    ("qwen2", "IT'S 12", ["IT", "'S", "Ġ", "1", "2"]),
    ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
]


@pytest.mark.parametrize(("pre", "text", "pieces"), CUTS, ids=[cut[0] for cut in CUTS])
def test_each_rule_cuts_text_its_own_way(tiny_model, pre, text, pieces):
    built = gguf_tokenizer.build(metadata_of(tiny_model, pre))
    assert [piece for piece, _ in built.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_every_rule_has_a_case():
    assert {cut[0] for cut in CUTS} == set(gguf_tokenizer.RULES) == set(RULES_OF_ASSETS.values())


UNKNOWN = [
    ({"tokenizer.ggml.pre": "martian"}, "rule 'martian'"),
    ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
    ({"tokenizer.ggml.pre": None}, "rule None"),
]


@pytest.mark.parametrize(("change", "said"), UNKNOWN, ids=[case[1] for case in UNKNOWN])
def test_an_unknown_kind_is_refused_with_the_way_out(tiny_model, tmp_path, change, said):
    with pytest.raises(UserError, match=r"model\.tokenizer=") as raised:
        gguf_tokenizer.save(metadata_of(tiny_model, "smollm") | change, tmp_path)
    assert said in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_begin_token_is_added_where_the_file_asks_for_it(tiny_model):
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    built = gguf_tokenizer.build(metadata_of(tiny_model, "smollm") | asked)
    assert built.encode("the").ids[0] == 1
    assert built.encode("the", add_special_tokens=False).ids[0] != 1


def test_the_settings_name_special_tokens_and_the_template(tiny_model, tmp_path):
    described = metadata_of(tiny_model, "smollm") | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "llama.context_length": 77,
        "tokenizer.chat_template": "{{ messages }}\n",
    }
    gguf_tokenizer.save(described, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["model_max_length"] == 77
    assert "pad_token" not in settings
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}\n"
