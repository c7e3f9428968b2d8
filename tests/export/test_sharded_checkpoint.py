"""Checkpoints in shards, written by real processes with torch's own FSDP."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.adapter_models import config_of
from helpers.export_runs import ids_of, make_base, read

SHARD = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

base, target = sys.argv[1:3]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
torch.manual_seed(5)
with torch.no_grad():
    for weight in model.parameters():
        weight.mul_(1.25)
state = {"model": model.state_dict()}
dcp.save(state, checkpoint_id=target)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[False, True], ids=["two matrices", "tied embeddings"])
def sharded(request, tmp_path_factory):
    """A full fine-tuning that two processes saved in shards, as accelerate names them."""
    folder = tmp_path_factory.mktemp("sharded")
    base = make_base(folder / "base", tied=request.param)
    run = folder / "run"
    checkpoint = run / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    config = config_of(base).model_dump() | {"output_dir": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    script = folder / "shard.py"
    script.write_text(SHARD)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--standalone", str(script), str(base), str(checkpoint / "pytorch_model_fsdp_0")],
        check=True, capture_output=True,
    )  # fmt: skip
    return base, checkpoint


@pytest.mark.parametrize(
    "words",
    [["--quantize", "nf4"], ["--to", "gguf"], ["--adapter-for", "vllm"], ["--onto", "original"]],
)
def test_flags_of_a_merge_are_refused_for_shards(words, tmp_path, luthier):
    (tmp_path / ".metadata").touch()
    code, _, err = luthier("merge", tmp_path, *words)
    assert code == 2 and f"{words[0]}: a checkpoint in shards is first put together." in err


@pytest.mark.train
def test_shards_of_fsdp_become_one_model(sharded, luthier):
    from transformers import AutoModelForCausalLM

    base, checkpoint = sharded
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    code, _, err = luthier("merge", checkpoint)
    assert code == 0, err
    merged = checkpoint.with_name("checkpoint-7-merged")
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, weight in before.items():
        assert torch.equal(after[name], 1.25 * weight)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    with torch.no_grad():
        for weight in {id(p): p for p in plain.parameters()}.values():
            weight.mul_(1.25)
        wanted, got = (one.eval()(ids_of()).logits for one in (plain, model))
    assert torch.equal(got, wanted)
    assert read(merged / "generation_config.json")["eos_token_id"] == 2
    assert (merged / "tokenizer.json").is_file() and (merged / "README.md").is_file()
    code, _, err = luthier("merge", checkpoint)
    assert code == 2 and "is not empty" in err


@pytest.mark.train
def test_shards_of_another_model_are_refused(sharded, tmp_path, luthier):
    _, checkpoint = sharded
    other = make_base(tmp_path / "other", attention_bias=True)
    code, _, err = luthier("merge", checkpoint, "--base", other, "--out", tmp_path / "out")
    assert code == 2 and "the checkpoint has no model.layers.0.self_attn.q_proj.bias" in err
    assert not (tmp_path / "out").exists()


ZERO = """
import sys
import deepspeed
import deepspeed.comm.torch
import torch
from transformers import AutoModelForCausalLM

deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled for minutes
base, target = sys.argv[1:3]
deepspeed.init_distributed(dist_backend="gloo")
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
engine.save_checkpoint(target)
"""


@pytest.mark.train
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_shards_of_zero_become_one_model(tmp_path, luthier, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    base = make_base(tmp_path / "base")
    (tmp_path / "zero.py").write_text(ZERO)
    checkpoint = tmp_path / "checkpoint-7"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         str(tmp_path / "zero.py"), str(base), str(checkpoint)],
        check=True, capture_output=True,
    )  # fmt: skip
    words = ("--base", base, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert luthier("merge", checkpoint, *words)[0] == 0
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    for name, weight in before.items():
        assert torch.equal(after[name], weight.to(torch.bfloat16))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Weights that were trained from base; how is not known here." in card


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_shards_of_zero_need_deepspeed(tmp_path, base, luthier):
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "global_step7").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step7")
    code, _, err = luthier("merge", checkpoint, "--base", base)
    assert code == 2 and "pip install deepspeed" in err


def test_shards_without_a_run_need_the_name_of_their_model(tmp_path, luthier):
    checkpoint = tmp_path / "pytorch_model_fsdp_0"
    checkpoint.mkdir()
    (checkpoint / ".metadata").write_bytes(b"")
    code, _, err = luthier("merge", checkpoint)
    assert code == 2 and "shards hold no configuration" in err and "--base" in err
