"""What a training saves, loaded in a fresh process by plain transformers and peft."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import adapter_runs as material
from helpers.chatml import CHATML, jsonl

ROOT = Path(__file__).parents[2]
PLAIN = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, questions = sys.argv[1], json.loads(sys.argv[2])
kind = AutoPeftModelForCausalLM if sys.argv[3] == "adapter" else AutoModelForCausalLM
model = kind.from_pretrained(folder, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
for question in questions:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    config = GenerationConfig.from_pretrained(folder, max_new_tokens=14)
    out = model.generate(**ids, generation_config=config)
    new = out[0, ids["input_ids"].shape[1] :]
    print(json.dumps(tokenizer.decode(new, skip_special_tokens=True)))
"""


def python(*words, folder):
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.train
@pytest.mark.parametrize("kind", ["adapter", pytest.param("whole", marks=pytest.mark.long)])
def test_a_saved_run_answers_alike_everywhere(tmp_path, base_model, luthier, kind, monkeypatch):
    from luthier.infer import LLM

    monkeypatch.chdir(tmp_path)
    asked = material.questions(24)
    jsonl(tmp_path / "rows.jsonl", [{"prompt": q, "completion": q[:4]} for q in asked])
    template = tmp_path / "template.jinja"
    template.write_text("{{ '!' }}" + CHATML, encoding="utf-8")
    python(
        str(ROOT / "train.py"), "model=hub", f"model.path={base_model}", "dataset=jsonl",
        "dataset.path=rows.jsonl", "dataset.eval.count=4", "output_dir=run", "chat.max_length=128",
        f"chat.template={template}", "model.device=cpu", "model.dtype=float32",
        "trainer.args.max_steps=6", "trainer.args.learning_rate=1e-2",
        "trainer.args.activation_checkpointing=false",
        *(["lora=default"] if kind == "adapter" else []), folder=tmp_path,
    )  # fmt: skip
    run = tmp_path / "run"
    code, out, err = luthier("check", run, "--served")
    assert code == 0, out + err
    code, out, err = luthier("evaluate", run, "--json", "metrics=[]")
    assert code == 0, err
    (measured,) = json.loads(out)["sets"]
    known = json.loads((run / "run.json").read_text())["results"]["eval_loss"]
    for when, name in (("before", "base"), ("after", "tuned")):
        assert measured["numbers"]["loss"][name]["value"] == pytest.approx(known[when], rel=1e-5)
    with LLM(str(run)) as llm:
        expected = llm.generate(asked[:6], max_new_tokens=14)
        if kind == "adapter":
            with llm.as_base():
                assert llm.generate(asked[:6], max_new_tokens=14) != expected
    printed = python(
        "-c", PLAIN, str(run / "model"), json.dumps(asked[:6]), kind, folder=tmp_path
    )  # fmt: skip
    assert [json.loads(line) for line in printed.splitlines()] == expected
