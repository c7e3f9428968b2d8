"""Merged models hold against peft's own adapters, for every kind of adapter and base."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from helpers import quantized_checkpoints as qc
from helpers.adapter_models import INT8, NF4, load
from helpers.chatml import CHATML, byte_tokenizer
from helpers.export_runs import ids_of, make_base, make_run, read
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.export.merge_adapter import QUESTIONS, prompts_of
from luthier.export.weight_files import TensorEntry, WeightFiles, read_tensor_entries, write_weights
from luthier.model.artifact import Artifact
from luthier.storage.manifest import MANIFEST, verify_manifest, write_manifest

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
Q = LORA | {"target_modules": ["q_proj"]}
GPT2 = {"r": 4, "target_modules": ["c_attn", "c_proj"]}
NEW = {"add_tokens": ["<a>", "<b>"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": base,
        "tied": make_base(folder / "tied", tied=True),
        "gpt2": make_base(folder / "gpt-2", kind="gpt2"),
        "shards": make_base(folder / "shards", shard="60KB"),
    }


def with_adapter(base, run, quantization=None):
    """The logits of peft's own model."""
    from peft import PeftModel

    quantization = quantization and quantization | {"bnb_4bit_compute_dtype": "float32"}
    model = load(base, quantization)
    rows = len(read(run / "model" / "tokenizer.json")["added_tokens"]) + 256
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, run / "model"))


def logits(model):
    with torch.inference_mode():
        return model.eval()(ids_of()).logits.float()


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


CASES = {
    "LoRA": ("llama", {}),
    "LoRA with the scale of rsLoRA": ("llama", {"lora": LORA | {"use_rslora": True}}),
    "LoRA with ranks and scales by layer": (
        "llama",
        {"lora": LORA | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}},
    ),
    "LoRA that began as a part of the base": (
        "llama", {"lora": LORA | {"init_lora_weights": "pissa"}},
    ),
    "DoRA": ("llama", {"lora": LORA | {"use_dora": True}}),
    "a base in many files": ("shards", {"lora": LORA}),
    "whole embeddings beside LoRA": (
        "llama", {"lora": Q | {"modules_to_save": ["embed_tokens", "lm_head"]}},
    ),
    "whole embeddings that are tied": ("tied", {"lora": Q | {"modules_to_save": ["embed_tokens"]}}),
    "single rows": ("llama", {"lora": Q | {"trainable_token_indices": [5, 6]}}),
    "single rows that are tied": ("tied", {"lora": Q | {"trainable_token_indices": [5, 6]}}),
    "new tokens": ("llama", {"lora": Q, "model": NEW}),
    "new tokens on tied embeddings": ("tied", {"lora": Q, "model": NEW}),
    "LoRA on embeddings": ("llama", {"lora": Q | {"target_modules": ["q_proj", "embed_tokens"]}}),
    "LoRA on one side of tied embeddings": (
        "tied", {"lora": Q | {"target_modules": ["q_proj", "embed_tokens"]}},
    ),
    "GPT-2's turned matrices and biases": ("gpt2", {"lora": GPT2 | {"bias": "lora_only"}}),
    "GPT-2 with DoRA": ("gpt2", {"lora": GPT2 | {"use_dora": True}}),
    "a bias of LoRA's own": ("gpt2", {"lora": GPT2 | {"lora_bias": True}}),
    "nf4": ("llama", {"quantization": NF4, "lora": LORA}),
    "nf4 with DoRA": ("llama", {"quantization": NF4, "lora": LORA | {"use_dora": True}}),
    "nf4 on GPT-2": ("gpt2", {"quantization": NF4, "lora": GPT2}),
    "LoHa, by peft": ("llama", {"lora": {"method": "loha", "r": 4}}),
    "OFT on nf4, by peft": ("llama", {"quantization": NF4, "lora": {"method": "oft"}}),
}  # fmt: skip


SLOW = {
    "LoRA that began as a part of the base",
    "whole embeddings beside LoRA",
    "single rows",
    "new tokens",
    "LoRA on embeddings",
    "GPT-2 with DoRA",
    "a bias of LoRA's own",
    "nf4 with DoRA",
    "nf4 on GPT-2",
    "OFT on nf4, by peft",
    "whole embeddings that are tied",
    "LoRA with ranks and scales by layer",
}
"""Left to the longer check, for time."""


def cases():
    for name, case in CASES.items():
        yield pytest.param(*case, id=name, marks=[pytest.mark.train] if name in SLOW else [])


@pytest.mark.parametrize("kind, groups", cases())
def test_a_merged_model_says_what_the_adapter_says(kind, groups, bases, tmp_path, luthier):
    run = make_run(tmp_path / "run", bases[kind], **groups)
    code, out, _ = luthier("merge", run)
    assert code == 0
    wanted = with_adapter(bases[kind], run, groups.get("quantization"))
    got = logits(loaded(run / "merged"))
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < 2e-6
    # The adapter does something: without it the logits are far from these.
    plain = logits(loaded(bases[kind]))[..., : wanted.shape[-1]]
    assert (plain - wanted[..., : plain.shape[-1]]).abs().max() > 1e-3
    assert "the likeliest token is the same at 100.0% of positions" in out
    assert ("whole  " in out) == ("method" in groups.get("lora", {}))


def test_a_merge_onto_an_fp8_base_is_whole_and_in_the_format_of_its_config(base, tmp_path, luthier):
    packed, whole = qc.quantize_checkpoint(base, tmp_path, qc.pack_fp8, qc.FP8)
    content = read(packed / "config.json") | {"dtype": "bfloat16"}
    (packed / "config.json").write_text(json.dumps(content))
    run = make_run(tmp_path / "run", packed, quantization={"dequantize": True}, lora=LORA)
    code, out, _ = luthier("merge", run)
    assert code == 0
    assert "its base comes quantized" in out
    config = read(run / "merged" / "config.json")
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    merged = load_file(run / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert set(merged) == set(load_file(whole / "model.safetensors"))
    assert (logits(loaded(run / "merged")) - with_adapter(whole, run)).abs().max() < 0.01


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 0.01), ("float16", 0.001)])
def test_a_merged_model_in_16_bits_is_as_near_as_rounding_lets_it(
    dtype, bound, base, tmp_path, luthier
):
    run = make_run(tmp_path / "run", base, lora=LORA)
    assert luthier("merge", run, "--dtype", dtype)[0] == 0
    merged = run / "merged"
    assert {entry.dtype for entry in read_tensor_entries(merged / "model.safetensors")} == {
        {"bfloat16": "BF16", "float16": "F16"}[dtype]
    }
    assert read(merged / "config.json")["dtype"] == dtype
    assert (logits(loaded(merged)) - with_adapter(base, run)).abs().max() < bound


@pytest.mark.train
def test_8_bits_are_unpacked_and_only_their_rounded_inputs_are_lost(base, tmp_path, luthier):
    run = make_run(tmp_path / "run", base, quantization=INT8, lora=LORA)
    assert luthier("merge", run)[0] == 0
    assert (logits(loaded(run / "merged")) - with_adapter(base, run, INT8)).abs().max() < 0.02


@pytest.mark.train
def test_an_adapter_from_4_bits_goes_onto_the_original_weights_on_request(base, tmp_path, luthier):
    run = make_run(tmp_path / "run", base, quantization=NF4, lora=LORA)
    assert luthier("merge", run, "--onto", "original")[0] == 0
    got = logits(loaded(run / "merged"))
    assert (got - with_adapter(base, run)).abs().max() < 2e-6
    # And these are not the weights that it was trained on.
    assert (got - with_adapter(base, run, NF4)).abs().max() > 1e-3
    assert "which it was not trained on" in (run / "merged" / "README.md").read_text()


@pytest.mark.train
def test_several_adapters_add_up_by_their_weights(base, tmp_path, luthier):
    first = make_run(tmp_path / "first", base, lora=LORA)
    second = make_run(tmp_path / "second", base, lora=Q | {"modules_to_save": ["lm_head"]}, seed=7)
    out = tmp_path / "both"
    assert luthier("merge", f"{first}:0.25", f"{second}:0.5", "--out", out, "--no-verify")[0] == 0
    assert luthier("merge", first)[0] == luthier("merge", second)[0] == 0
    plain, one, two, both = (
        load_file(folder / "model.safetensors")
        for folder in (base, first / "merged", second / "merged", out)
    )
    for name, weight in both.items():
        wanted = plain[name] + 0.25 * (one[name] - plain[name]) + 0.5 * (two[name] - plain[name])
        assert torch.allclose(weight, wanted, atol=1e-6)


def test_two_weighted_loras_are_checked_against_peft(base, tmp_path, luthier):
    first = make_run(tmp_path / "first", base, lora=LORA)
    second = make_run(tmp_path / "second", base, lora=Q, seed=7)
    code, out, _ = luthier("merge", f"{first}:0.25", f"{second}:-0.5", "--out", tmp_path / "both")
    assert code == 0
    assert "e-07 (" in out or "e-08 (" in out
    card = (tmp_path / "both" / "README.md").read_text()
    assert "Several adapters were added up (first by 0.25, second by -0.5)." in card


def test_a_merged_folder_is_whole(base, tmp_path, luthier):
    run = make_run(tmp_path / "run", base, lora=LORA)
    (run / "model" / "chat_template.jinja").unlink()
    assert luthier("merge", run)[0] == 0
    merged = run / "merged"
    assert {path.name for path in merged.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "chat.json", "README.md", "EXPORT.md",
        "card.json", "loss.png", "manifest.json",
    }  # fmt: skip
    assert verify_manifest(merged) == {"kind": "model"}
    assert (merged / "chat_template.jinja").read_text() == CHATML
    assert read(merged / "generation_config.json")["eos_token_id"] == 2
    head = (merged / "README.md").read_text()
    assert "library_name: transformers" in head
    assert "The adapter was merged in float32" in head
    assert not list(run.glob(".*"))


@pytest.mark.train
def test_a_merged_folder_is_read_by_plain_transformers_in_a_fresh_process(base, tmp_path, luthier):
    """The Python of its card, as it stands there."""
    import re

    run = make_run(tmp_path / "run", base, lora=LORA)
    assert luthier("merge", run)[0] == 0
    text = (run / "merged" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert "peft" not in code
    code += "\nprint('RESULT' + str([inputs['input_ids'][0].tolist(), reply.tolist()]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run / "merged", capture_output=True, text=True,
        check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    prompt, reply = json.loads(done.stdout.split("RESULT")[1])
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base), run / "model").eval()
    ids = torch.tensor([prompt])
    wanted = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False,
        eos_token_id=[2],
    )  # fmt: skip
    assert reply == wanted[0, len(prompt) :].tolist()


@pytest.mark.train
@pytest.mark.parametrize("form, bits, bound", [("nf4", 4, 0.2), ("int8", 8, 0.05)])
def test_a_merged_model_is_packed_for_serving(form, bits, bound, base, tmp_path, luthier):
    run = make_run(tmp_path / "run", base, lora=LORA)
    assert luthier("merge", run, "--quantize", form)[0] == 0
    merged = run / "merged"
    config = read(merged / "config.json")["quantization_config"]
    assert config[f"load_in_{bits}bit"] is True
    from transformers import AutoModelForCausalLM

    got = logits(AutoModelForCausalLM.from_pretrained(merged, device_map={"": "cpu"}))
    assert (got - with_adapter(base, run)).abs().max() < bound
    assert read(merged / "generation_config.json")["eos_token_id"] == 2
    card = (merged / "README.md").read_text()
    assert f"with weights in {bits} bits (bitsandbytes)" in card
    assert "pip install torch transformers accelerate bitsandbytes" in card


@pytest.mark.train
@pytest.mark.skipif(
    not (find_spec("gptqmodel") and find_spec("optimum")), reason="gptqmodel is not installed"
)
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_merged_model_is_packed_by_gptqmodel(form, tmp_path, luthier):
    from transformers import AutoModelForCausalLM

    wide = make_base(tmp_path / "base", hidden_size=256, intermediate_size=256)
    said = [{"prompt": f"What is {n}, in words?", "completion": "so " * 9} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, said)))
    data = {"path": str(tmp_path / "rows.jsonl"), "eval": {"count": 4}}
    run = make_run(tmp_path / "run", wide, dataset=data, lora=Q)
    assert luthier("merge", run, "--quantize", form)[0] == 0
    merged = run / "merged"
    assert read(merged / "config.json")["quantization_config"]["quant_method"] == form
    assert str(tmp_path) not in (merged / "config.json").read_text()
    got = logits(AutoModelForCausalLM.from_pretrained(merged, device_map={"": "cpu"}))
    wanted = with_adapter(wide, run)
    assert (got - wanted).abs().mean() < 0.2 * wanted.std()


def test_a_whole_model_is_packed_for_serving(tmp_path, luthier):
    base, out = make_base(tmp_path / "base"), tmp_path / "packed"
    write_manifest(base, {})  # as the folder is that a GGUF file was converted into
    assert luthier("merge", base, "--quantize", "nf4", "--out", out)[0] == 0
    assert verify_manifest(out) == {"kind": "model"}
    assert read(out / "config.json")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (base, out)]
    assert sizes[1] < 0.6 * sizes[0]


def test_packing_that_fails_leaves_nothing(tmp_path, luthier, monkeypatch):
    from luthier.errors import UserError
    from luthier.export import quantize

    def fails(*_):
        raise UserError("no")

    base = make_base(tmp_path / "base")
    monkeypatch.setattr(quantize, "quantize_merged", fails)
    assert luthier("merge", base, "--quantize", "nf4", "--out", tmp_path / "packed")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weight_files_are_those_of_the_format(tmp_path):
    """Written tensor by tensor, read by the format's own library; and the other way round."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16), "c": torch.tensor(4),
        "d": torch.randn(2, 2).to(torch.float16), "e": torch.zeros(0, 3), "f": torch.tensor([True]),
    }  # fmt: skip
    names = {"a": "F32", "b": "BF16", "c": "I64", "d": "F16", "e": "F32", "f": "BOOL"}
    planned = [
        TensorEntry(name, names[name], tuple(value.shape)) for name, value in tensors.items()
    ]
    done = [entry.name for entry in write_weights(tmp_path, planned, tensors.__getitem__)]
    assert set(done) == set(tensors)
    read_back = load_file(tmp_path / "model.safetensors")
    ours = WeightFiles(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(read_back[name], value) and torch.equal(ours.read(name), value)


def test_large_models_are_written_in_shards_with_an_index(tmp_path):
    planned = [TensorEntry(name, "F32", (10,)) for name in "abc"]
    list(
        write_weights(tmp_path, planned, lambda name: torch.full((10,), float(ord(name))), most=90)
    )
    index = read(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["c"] == "model-00002-of-00002.safetensors"
    assert WeightFiles(tmp_path).read("c")[0] == ord("c")


# What cannot be done, in words.


def test_a_folder_that_is_no_run(tmp_path, luthier):
    code, _, err = luthier("merge", tmp_path)
    assert code == 2
    assert "this folder holds no run and no model" in err


def test_a_base_that_moved(tmp_path, luthier):
    moved = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", moved)
    moved.rename(tmp_path / "elsewhere")
    code, _, err = luthier("merge", run)
    assert code == 2
    assert "its base was moved or removed" in err and "--base" in err
    assert luthier("merge", run, "--base", tmp_path / "elsewhere")[0] == 0


def test_an_adapter_for_another_base(tmp_path, base, luthier):
    run = make_run(tmp_path / "run", base)
    other = make_base(tmp_path / "other", hidden_size=32)
    code, _, err = luthier("merge", run, "--base", other)
    assert code == 2
    assert "this adapter is for another base" in err and str(base) in err


def test_adapters_of_different_bases(tmp_path, base, bases, luthier):
    one, two = make_run(tmp_path / "one", base), make_run(tmp_path / "two", bases["tied"])
    code, _, err = luthier("merge", one, two, "--out", tmp_path / "both")
    assert code == 2
    assert "Only adapters of one base add up" in err


def test_a_target_that_is_not_empty(tmp_path, base, luthier):
    run = make_run(tmp_path / "run", base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    code, _, err = luthier("merge", run, "--out", tmp_path / "full")
    assert code == 2 and "is not empty" in err
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    code, _, err = luthier("merge", run, "--out", tmp_path / "full", "--overwrite")
    assert code == 2 and "holds other things than a model that luthier wrote (mine.txt)" in err
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"


def test_a_merged_model_is_replaced_and_the_files_of_others_stay(tmp_path, base, luthier):
    run, out = make_run(tmp_path / "run", base), tmp_path / "run" / "merged"
    assert luthier("merge", run, "--no-verify")[0] == 0
    (out / "mine.txt").write_text("precious")
    assert luthier("merge", run, "--no-verify")[0] == 2
    before = (out / "model.safetensors").stat().st_ino
    code, out_text, _ = luthier("merge", run, "--no-verify", "--overwrite")
    assert code == 0 and "in it, not luthier's, and left: mine.txt" in out_text
    assert (out / "model.safetensors").stat().st_ino != before
    assert (out / "mine.txt").read_text() == "precious"
    # As an earlier version left it, without a manifest.
    (out / MANIFEST).unlink()
    assert luthier("merge", run, "--no-verify", "--overwrite")[0] == 0
    assert (out / "mine.txt").read_text() == "precious"
    assert not list(run.glob(".*"))


def test_a_disk_that_is_full(tmp_path, base, luthier, monkeypatch):
    import shutil
    from collections import namedtuple

    run = make_run(tmp_path / "run", base)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    code, _, err = luthier("merge", run)
    assert code == 2 and "left. Name a folder on another disk: --out." in err
    assert not list(run.glob("*merged*"))


def test_a_model_that_does_not_say_the_same_is_not_written(tmp_path, base, luthier, monkeypatch):
    from luthier.export import merge_adapter

    run = make_run(tmp_path / "run", base)
    monkeypatch.setitem(merge_adapter.BOUNDS, "float32", 1e-9)
    code, _, err = luthier("merge", run)
    assert code == 2 and "does not say what the model with its adapter says" in err
    assert not (run / "merged").exists() and (run / ".merged.new").is_dir()
    assert luthier("merge", run, "--no-verify")[0] == 0


def test_a_method_that_cannot_be_merged(tmp_path, base, luthier):
    run = make_run(tmp_path / "run", base, lora={"method": "lily"})
    code, _, err = luthier("merge", run)
    assert code == 2 and "peft cannot merge this adapter" in err
    assert not list(run.glob("*merged*"))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name a run"),
        (["{run}", "--dtype", "int4"], "--dtype int4: there are float32, bfloat16, float16."),
        (["{run}", "--onto", "air"], "--onto air: there are trained, original."),
        (["{run}", "--quantize", "gptq"], "this needs gptqmodel"),
        (["{run}", "--quantise", "nf4"], "Did you mean --quantize?"),
        (["{base}", "--out", "x"], "is a whole model and no adapter"),
    ],
    ids=["nothing", "a dtype", "a target of the adapter", "a library that is not installed",
         "a flag", "a whole model"],
)  # fmt: skip
def test_a_wrong(words, said, tmp_path, base, luthier, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", base)
    code, _, err = luthier("merge", *(word.format(run=run, base=base) for word in words))
    assert code == 2 and said in err


LIMITED = """
import resource, sys
import torch, transformers, peft, bitsandbytes
from transformers import AutoModelForCausalLM
from luthier.cli.main import main
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + int(sys.argv[2]), resource.RLIM_INFINITY))
sys.argv = ["luthier", "merge", sys.argv[1]]
main()
"""


@pytest.mark.train
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_that_is_too_small_is_said_in_words(tmp_path, luthier):
    large = make_base(tmp_path / "large", intermediate_size=60_000)
    run = make_run(tmp_path / "run", large, lora=Q)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run), str(60 * 2**20)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-1500:]
    assert "does not fit into this machine's memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(run.glob("*merged*"))


def test_the_logits_are_compared_on_held_out_prompts_of_the_run(tmp_path):
    rows = [{"prompt": "ab", "expected": "c", "before": "", "after": "c", "scores": {}}]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact = Artifact("run", ModelConfig(path="base"), run=tmp_path, task="SEQ_CLS")
    prompts = prompts_of(artifact, byte_tokenizer(eos_token="<|endoftext|>"))
    assert len(prompts[0]) == len("ab")
    assert len(prompts) == 1 + len(QUESTIONS)
    (tmp_path / "replies.jsonl").write_text("{garbage\n")
    with pytest.raises(UserError, match=r"replies\.jsonl:1: it is no JSON"):
        prompts_of(artifact, None)
