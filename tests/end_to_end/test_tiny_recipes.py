"""The tiny recipes: each trains a small model until what it is for gets better.

They run in one process, one after the other: half of what a run costs is to import the libraries.
"""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file

from luthier.cli.show import print_rollouts
from luthier.cli.train import main, train
from luthier.config.methods import METHODS

ROOT = Path(__file__).parents[2]
TINY = sorted(path.stem for path in (ROOT / "recipes").glob("tiny_*.yaml"))


class Aim(NamedTuple):
    """A result and by how much it has to change at least."""

    name: str
    change: float


AIMS = {
    "tiny_pretrain": [Aim("eval_loss", -0.4)],
    "tiny_dpo": [Aim("rewards/margins", 0.2), Aim("rewards/accuracies", 0.5)],
    "tiny_kto": [Aim("rewards/margins", 0.1)],
    "tiny_orpo": [Aim("rewards/margins", 0.02), Aim("eval_loss", -0.2)],
    "tiny_cpo": [Aim("rewards/margins", 0.5), Aim("eval_loss", -0.1)],
    "tiny_reward": [Aim("accuracy", 0.3), Aim("margin", 0.2)],
    "tiny_grpo": [Aim("reward", 0.1)],
    "tiny_rloo": [Aim("reward", 0.1)],
    "tiny_distill": [Aim("eval_loss", -0.05)],
    "tiny_classify": [Aim("accuracy", 0.2), Aim("macro_f1", 0.2)],
    "tiny_tag": [Aim("entity_f1", 0.3), Aim("accuracy", 0.5)],
    "tiny_seq2seq": [Aim("exact_match", 0.7), Aim("rouge1", 0.5)],
    "tiny_vision": [Aim("exact_match", 0.9)],
    "tiny_tools": [Aim("reward", 0.4)],
}
LIKE_OTHERS = ("tiny_classify", "tiny_kto", "tiny_orpo", "tiny_reward", "tiny_rloo")
"""Their losses and their learning are held by tests/train/methods, on smaller models."""
FROM_NOTHING = ("tiny_seq2seq", "tiny_vision", "tiny_tools")
"""Recipes whose models are made by a script."""


def trained(folder, name, *overrides):
    """Run a recipe; return the record, the logged steps and the folder of the model."""
    output = folder / name
    assert main(train, [f"recipe={name}", f"output_dir={output}", *overrides]) == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    return json.loads((output / "run.json").read_text()), steps, output / "model"


def test_every_method_has_a_tiny_recipe():
    methods = {f"tiny_{name}" for name in METHODS} - {"tiny_sft"}  # that is the quickstart
    # The last two are sft with images, and grpo with a tool.
    assert set(TINY) == set(AIMS) == methods | {"tiny_vision", "tiny_tools"}


@pytest.mark.parametrize("name", TINY)
def test_its_header_says_what_was_measured(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    header = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    measured = header.partition("Measured: ")[2]
    for aim in AIMS[name]:
        pattern = rf"{re.escape(aim.name)} (-?[\d.]+) -> (-?[\d.]+\d)"
        before, after = map(float, re.search(pattern, measured).groups())
        assert (after - before) / aim.change >= 1, "the aim of the test is within what is promised"


@pytest.mark.train
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ())
        for name in TINY
        if name not in FROM_NOTHING
    ],
)
def test_the_small_model_gets_better(tmp_path, name):
    record, steps, model = trained(tmp_path, name)
    _reaches(record, name)
    method = METHODS[name.removeprefix("tiny_")]
    saved = {path.name for path in model.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= saved
    assert ("chat.json" in saved) == ("chat" in record and record["chat"] is not None)
    assert not saved & {"ref", "training_args.bin"}
    assert "README.md" in saved, "the model card"
    weights = load_file(model / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.float32"}
    assert [row["step"] for row in steps] == list(range(1, steps[-1]["step"] + 1))
    OWN.get(name, lambda *_: None)(record, steps, model)
    assert method.task == "CAUSAL_LM" or any("score" in key for key in weights)


def _reaches(record, name):
    """Every result has changed by as much as it has to."""
    assert record["status"] == "finished"
    for aim in AIMS[name]:
        pair = record["results"][aim.name]
        assert (pair["after"] - pair["before"]) / aim.change >= 1, (aim, pair)


def _dpo(record, steps, model):
    assert record["results"]["eval_loss"]["before"] == pytest.approx(0.693147, abs=1e-4)
    assert record["results"]["rewards/margins"]["before"] == pytest.approx(0, abs=1e-3)
    rows = [json.loads(line) for line in (model.parent / "replies.jsonl").read_text().splitlines()]
    assert rows and {"prompt", "before", "after", "expected"} <= set(rows[0])


def _reward(record, steps, model):
    assert record["results"]["accuracy"]["after"] > 0.6


def _rloo(record, steps, model):
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)


def _labelled(count):
    def check(record, steps, model):
        labels = json.loads((model / "labels.json").read_text())
        assert labels["num_labels"] == len(labels["label2id"]) == count
        assert record["chat"] is None

    return check


OWN = {
    "tiny_dpo": _dpo,
    "tiny_reward": _reward,
    "tiny_rloo": _rloo,
    "tiny_classify": _labelled(4),
    "tiny_tag": _labelled(4),
}


def run_script(name, folder, monkeypatch):
    """Run a script of recipes/data in a folder, as its command does."""
    monkeypatch.chdir(folder)
    script = ROOT / "recipes" / "data" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.train
def test_a_model_from_nothing_learns_to_answer_and_generates_plainly(tmp_path, monkeypatch):
    run_script("tiny_t5", tmp_path, monkeypatch)
    record, _, model = trained(tmp_path, "tiny_seq2seq")
    _reaches(record, "tiny_seq2seq")
    assert record["results"]["exact_match"]["before"] == 0
    shown = json.loads((model.parent / "replies.jsonl").read_text().splitlines()[0])
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    batch = tokenizer(shown["prompt"], return_tensors="pt")
    out = net.generate(input_ids=batch["input_ids"], max_new_tokens=16)[0]
    assert tokenizer.decode(out, skip_special_tokens=True) == shown["after"]


@pytest.mark.train
def test_a_model_from_nothing_learns_to_see_and_answers_plainly(tmp_path, monkeypatch):
    run_script("tiny_vision", tmp_path, monkeypatch)
    record, _, model = trained(tmp_path / "runs", "tiny_vision")
    _reaches(record, "tiny_vision")
    assert record["results"]["exact_match"]["before"] == 0
    assert record["data"]["train"]["images"] == record["data"]["train"]["rows"] == 1440
    held_out = tmp_path / "tiny_vision"
    rows = [json.loads(line) for line in (held_out / "heldout.jsonl").read_text().splitlines()]
    net = transformers.LlavaForConditionalGeneration.from_pretrained(model)
    processor = transformers.AutoProcessor.from_pretrained(model)
    right = 0
    for row in rows[:10]:
        question, reply = row["messages"]
        question["content"][0]["image"] = Image.open(held_out / question["content"][0]["image"])
        inputs = processor.apply_chat_template(
            [question], tokenize=True, return_dict=True, return_tensors="pt",
            add_generation_prompt=True,
        )  # fmt: skip
        out = net.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        answer = processor.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer == reply["content"]
    assert right >= 9


@pytest.mark.train
def test_a_model_learns_to_call_a_calculator(tmp_path, monkeypatch, capsys):
    run_script("tiny_tools", tmp_path, monkeypatch)
    # transformers takes this from its loggers' level, which a test before may have changed.
    settings = ("trainer.args.max_steps=40", "trainer.args.disable_tqdm=false")
    record, steps, model = trained(tmp_path / "runs", "tiny_tools", *settings)
    printed = capsys.readouterr().out
    assert re.search(r"reward 0\.\d+  calls 0\.\d+  loss", printed)
    assert f"luthier show {model.parent} --rollouts" in printed
    _reaches(record, "tiny_tools")
    assert record["results"]["reward"]["before"] < 0.4
    assert steps[0]["tools/call_frequency"] < 0.4 < 0.6 < steps[-1]["tools/call_frequency"]
    # A call is 14 tokens and its answer 2. The result between them, 10 more, is not the model's.
    assert steps[-1]["completions/mean_length"] < 16.5
    lines = (model.parent / "rollouts.jsonl").read_text().splitlines()
    completions = [json.loads(line)["completion"] for line in lines]
    assert len(completions) == 4 * 40
    sums = [(found, rest) for first, *rest in completions if (found := find_sum(json.dumps(first)))]
    assert len(sums) > len(completions) / 4
    for (a, b), (result, answer, *_) in sums:
        assert (result["role"], result["content"]) == ("tool", str(int(a) + int(b)))
        assert answer["role"] == "assistant"
    print_rollouts(model.parent)
    assert '  assistant calls calculator {"expression": ' in capsys.readouterr().out
    check_saved_model_calls(model)


def find_sum(text):
    """Return the two numbers of the call of a calculator in a text; None where there is none."""
    found = re.search(r'"expression": "(\d+) \+ (\d+)"}', text)
    return found and found.groups()


def check_saved_model_calls(model):
    """Plain transformers generates the right call for most held-out sums."""
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines = Path("tiny_tools/sums.heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        tools=[{"type": "function", "function": {"name": "calculator"}}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = net.generate(**batch, do_sample=False, max_new_tokens=16)
    called = map(find_sum, tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :]))
    asked = [re.match(r"What is (\d+) \+ (\d+)", prompt).groups() for prompt in prompts]
    right = [pair == sum_ for pair, sum_ in zip(called, asked, strict=True)]
    assert sum(right) > 0.8 * len(prompts)
