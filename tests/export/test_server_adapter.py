"""An adapter under a server's names adds what the adapter that it was made of adds."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from helpers.chatml import jsonl
from helpers.model_families import make_family_model, save_family
from luthier.cli.train import main, train
from luthier.errors import UserError
from luthier.export.server_adapter import build_server_adapter, export_adapter
from luthier.inspection.served import check_adapter_layers
from luthier.model.artifact import find_artifact
from luthier.model.experts import find_experts

BOTH = ("gate_up_proj", "down_proj")
RANKS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Saves an adapter of plain peft on a family's experts; what it adds to each weight."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    root = tmp_path_factory.mktemp("experts")

    def adapter(family, parameters=BOTH, **settings):
        base = root / family
        if not base.is_dir():
            save_family(base, family)
        model = make_family_model(family)
        targets = [f"experts.{name}" for name in parameters]
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings
        tuned = get_peft_model(model, LoraConfig(
            task_type="CAUSAL_LM", target_parameters=targets or None, **fields
        ))  # fmt: skip
        tuned.peft_config["default"].base_model_name_or_path = str(base)
        torch.manual_seed(1)
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape)
        folder = root / f"{family}-{len(list(root.iterdir()))}"
        tuned.save_pretrained(folder, save_embedding_layers=False)
        deltas = {}
        for name, layer in tuned.named_modules():
            if isinstance(layer, LoraLayer):
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                parameter = getattr(layer, "parameter_name", "weight")
                deltas[f"{name}.{parameter}"] = layer.get_delta_weight("default").detach()
        return find_artifact(str(folder)), deltas

    return adapter


def products(made):
    """B A of each layer, by the names in the file, with the one scale that servers know."""
    scale = made.config["lora_alpha"] / made.config["r"]
    names = [name for name in made.tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * made.tensors[name.replace("lora_A", "lora_B")].double() @ made.tensors[name].double()
        for name in names
    }  # fmt: skip


FAMILIES = {
    "qwen3_moe": ("mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("mlp.experts", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v3": ("mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "lfm2_moe": ("feed_forward.experts", "feed_forward.experts", ("w1", "w3", "w2")),
    "gpt_oss": ("mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "llama4": ("feed_forward.experts", "feed_forward.experts", ("gate_proj", "up_proj",
                                                                "down_proj")),
    "qwen3_vl_moe": ("mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}  # fmt: skip
"""The experts' module in transformers and in the files, and the files' names of the matrices."""


@pytest.mark.parametrize("settings", [{}, RANKS], ids=["one rank", "ranks by layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_gets_the_change_that_it_had(adapter, family, settings):
    if family == "deepseek_v3":
        settings = {**settings, "target_modules": ["o_proj"]}
    artifact, deltas = adapter(family, **settings)
    changes = products(build_server_adapter(artifact, "per-expert"))
    module, written, (gate, up, down) = FAMILIES[family]
    model = make_family_model(family)
    for layer in find_experts(model):
        name = layer.name.replace(module, written)
        both, last = (deltas.pop(f"{layer.name}.{each}").double() for each in BOTH)
        if layer.is_transposed:
            both, last = both.transpose(1, 2), last.transpose(1, 2)
        half = both.shape[1] // 2
        for number in range(both.shape[0]):
            # By hand: gpt-oss has a row of the gate before each row of the other.
            rows = both[number]
            halves = (rows[::2], rows[1::2]) if family == "gpt_oss" else (rows[:half], rows[half:])
            for leaf, expected in zip((gate, up, down), (*halves, last[number]), strict=True):
                change = changes.pop(f"{name}.{number}.{leaf}")
                torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
    # And the layers that are no experts.
    assert {f"{name}.weight" for name in changes} == set(deltas)
    for name, change in changes.items():
        torch.testing.assert_close(change, deltas[f"{name}.weight"].double(), rtol=1e-5, atol=1e-6)


def test_files_with_all_experts_in_one_tensor_keep_pefts_names(adapter):
    artifact, _ = adapter("gpt_oss", **RANKS)
    made = build_server_adapter(artifact, "vllm")
    before = load_file(artifact.adapter / "adapter_model.safetensors")
    assert set(made.tensors) == set(before)
    # One rank and one scale stand in the configuration; B has each layer's own.
    assert (made.config["r"], made.config["lora_alpha"]) == (4, 4)
    assert not made.config["rank_pattern"] and not made.config["alpha_pattern"]
    for name, tensor in made.tensors.items():
        factor = 1 if ".lora_A." in name else 8 if "q_proj" in name else 2
        assert torch.equal(tensor, before[name] * factor)


@pytest.mark.parametrize("only", BOTH)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_matrix_without_an_adapter_gets_zeros(adapter, family, only):
    """vLLM wants all matrices of an expert, and takes a lone one for down_proj."""
    artifact, _ = adapter(family, [only])
    made = build_server_adapter(artifact, "vllm")
    if family == "qwen3_moe":
        leaves = {re.split(r"experts\.\d+\.", name)[-1] for name in products(made)}
        assert leaves >= {"gate_proj", "up_proj", "down_proj"}
        for name, change in products(made).items():
            is_adapted = "q_proj" in name or ("down" in name) == (only == "down_proj")
            assert bool(change.any()) == is_adapted, name
        return
    parts = {"gate_up_proj": "experts.base_layer.lora_B", "down_proj": "experts.lora_B"}
    for parameter, part in parts.items():
        tensors = [tensor for name, tensor in made.tensors.items() if part in name]
        assert len(tensors) == 2
        assert all(bool(tensor.any()) == (parameter == only) for tensor in tensors)
    assert len(made.config["target_parameters"]) == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_plain_peft_reads_the_names_of_each_expert_where_it_knows_the_model(
    adapter, family, tmp_path, luthier
):
    from peft import PeftModel

    artifact, _ = adapter(family)
    code, out, err = luthier(
        "merge", artifact.name, "--adapter-for", "vllm", "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert "of rank 4 for vllm" in out
    ids = torch.tensor([[5, 80, 81, 100, 12, 7]])
    folders = [artifact.adapter, tmp_path / "out"]
    models = [PeftModel.from_pretrained(make_family_model(family), each) for each in folders]
    first, second = (model.eval()(ids).logits for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None


RUNS = {
    # Of the run's adapter: its tensors, and those that vLLM would look for by other names; then
    # the tensors with one adapter for each expert, or None where vLLM reads the run's own.
    "qwen3_moe": (24, 8, 64),
    "mixtral": (24, 8, 64),
    "deepseek_v3": (36, 4, 56),
    "gpt_oss": (24, 0, None),
}


@pytest.mark.train
@pytest.mark.parametrize(("family", "counts"), RUNS.items(), ids=RUNS)
def test_the_adapter_of_a_run_is_counted_and_written_for_a_server(
    family, counts, tmp_path, luthier, capsys
):
    saved, joined, written = counts
    save_family(tmp_path / "base", family)
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "two and two", "completion": "four"}] * 4)
    assert main(train, [
        "model=hub", f"model.path={tmp_path / 'base'}", "model.device=cpu", "model.dtype=float32",
        "lora=default", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}",
        "dataset.eval.share=null", "chat.max_length=64", f"output_dir={tmp_path / 'run'}",
        "trainer.args.max_steps=1", "trainer.evaluation.samples=0",
        "trainer.args.disable_tqdm=true",
    ]) == 0  # fmt: skip
    capsys.readouterr()
    code, out, _ = luthier("check", tmp_path / "run", "--served", "--json")
    rule = json.loads(out)["rules"][-1]
    assert (rule["checked"], rule["broken"]) == (saved, joined)
    assert code == (1 if joined else 0)
    target = tmp_path / "served"
    code, out, err = luthier("merge", tmp_path / "run", "--adapter-for", "vllm", "--out", target)
    if written is None:
        assert code == 2 and "is read by vLLM as it is" in err
        return
    assert code == 0 and f"{written} tensors of rank 16 for vllm" in out
    rule = check_adapter_layers(find_artifact(str(target)))
    assert (rule.checked, rule.broken) == (written, 0)


REFUSED = {
    "nothing to change": ((), {}, "is read by vLLM as it is"),
    "DoRA": ((), {"use_dora": True}, "this adapter is more: it uses use_dora"),
    "whole layers": (BOTH, {"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
}


@pytest.mark.parametrize(("parameters", "settings", "words"), REFUSED.values(), ids=REFUSED)
def test_what_servers_do_not_read_is_refused(adapter, tmp_path, parameters, settings, words):
    artifact, _ = adapter("qwen3_moe", parameters, **settings)
    with pytest.raises(UserError, match=re.escape(words)):
        export_adapter(artifact, tmp_path / "out", "vllm", print)
    assert not (tmp_path / "out").exists()


WORDS = {
    "a model's flag": (["--dtype", "float16"], "--dtype: --adapter-for writes no model"),
    "another server": (["--adapter-for", "tgi"], "--adapter-for tgi: there are vllm, per-expert"),
    "two adapters": (["{run}"], "--adapter-for takes one adapter"),
}


@pytest.mark.parametrize(("more", "words"), WORDS.values(), ids=WORDS)
def test_a_mistake_is_said_in_words(adapter, luthier, more, words):
    artifact, _ = adapter("qwen3_moe")
    more = [word.format(run=artifact.name) for word in more]
    given = more if "--adapter-for" in more else ["--adapter-for", "vllm", *more]
    code, _, err = luthier("merge", artifact.name, *given)
    assert code == 2 and words in err
