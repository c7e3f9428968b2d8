"""Runs of train.py with the methods that learn from judged replies, and with plain texts.

The small real model learns from judged replies in test_tiny_recipes.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.preference_trainer import PREFERENCES, model, tokenizer, unpaired

ROOT = Path(__file__).parents[2]


def start(folder, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder, env=os.environ.copy(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def finished(folder, *words):
    done = start(folder, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refused(folder, *words):
    done = start(folder, *words, "output_dir=run")
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"dataset.path={path}"


def many(examples, times=4):
    """Rows that differ, as equal ones are never held out and trained on both."""
    found = []
    for number in range(times):
        for example in examples:
            prompt = [{"role": "user", "content": f"({number}) {example['prompt'][0]['content']}"}]
            found.append({**example, "prompt": prompt})
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of bytes in a folder, with a tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model().save_pretrained(folder)
    tokenizer(template=None).save_pretrained(folder)
    return ("model=hub", f"model.path={folder}", "model.device=cpu", "model.dtype=float32")


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ("model=hub", f"model.path={folder}", "model.device=cpu", "model.dtype=float32")


@pytest.mark.train
@pytest.mark.parametrize(
    "method", ["dpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("kto", "reward"))]
)
def test_all_weights_may_train(tmp_path, talking, method):
    rows = many(PREFERENCES)
    finished(tmp_path, *talking, "trainer=" + method, "dataset=files", "chat.max_length=128",
             "chat.empty_replies=train",
             write(tmp_path, "rows.jsonl", rows), "dataset.eval.count=4", "output_dir=run",
             "trainer.args.max_steps=8", "trainer.args.learning_rate=3e-3",
             "trainer.args.gradient_accumulation_steps=1")  # fmt: skip
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    loss = results["eval_loss"]
    assert loss["after"] < loss["before"] - 0.01
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    if method == "dpo":
        assert loss["before"] == pytest.approx(0.693147, abs=1e-5)


TEXTS = [
    {"text": f"A lute has {n} strings, and a luthier makes {n * 7} of them."} for n in range(40)
]


@pytest.mark.train
def test_plain_texts_train_a_model_without_a_chat_template(tmp_path, tiny):
    path = write(tmp_path, "texts.jsonl", TEXTS)
    words = ("trainer=pretrain", "dataset=files", path, "dataset.eval.count=4")
    finished(tmp_path, *tiny, *words, "chat.max_length=128", "trainer.args.max_steps=6",
             "trainer.args.learning_rate=1e-2", "trainer.args.gradient_accumulation_steps=1",
             "output_dir=run", "trainer.args.activation_checkpointing=false")  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    loss = record["results"]["eval_loss"]
    assert loss["after"] < loss["before"] - 0.1
    assert record["chat"] is None
    assert not (tmp_path / "run" / "model" / "chat.json").exists()
    counts = record["data"]["train"]
    assert counts["trained_tokens"] >= counts["tokens"] - counts["sequences"]


def test_packed_texts_need_a_length(tmp_path, tiny):
    path = write(tmp_path, "texts.jsonl", TEXTS)
    said = refused(tmp_path, *tiny, "trainer=pretrain", "dataset=files", path)
    assert "Set chat.max_length" in said


CHATS = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!"}]}
         for n in range(9)]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "rows", "words"),
    [
        ("pretrain", CHATS, "trainer=pretrain needs plain texts. Use trainer=sft, grpo"),
        ("dpo", CHATS, "trainer=dpo needs preference pairs (a chosen and a rejected reply)"),
        ("reward", TEXTS, "these rows are plain texts"),
        ("dpo", unpaired(), "Use trainer=kto, or set"),
        ("sft", PREFERENCES, "Use trainer=dpo, kto, orpo, cpo or reward"),
    ],
    ids=["chats", "chats without a choice", "texts", "verdicts", "pairs"],
)
def test_rows_of_another_kind_are_sent_to_the_method_that_takes_them(
    tmp_path, tiny, method, rows, words
):
    path = write(tmp_path, "rows.jsonl", rows)
    said = refused(tmp_path, *tiny, f"trainer={method}", "dataset=files", path,
                   "chat.max_length=64")  # fmt: skip
    assert words in said
    assert "or set dataset.type if the rows are something else." in said


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.args.loss_type=sigmid", "Did you mean sigmoid?"),
        ("trainer.args.max_length=99", "use chat.max_length"),
        ("trainer.args.precompute_ref_logprobs=true", "precompute_ref_log_probs"),
        ("dataset.streaming=true", "streaming"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_is_read(tmp_path, tiny, word, says):
    path = write(tmp_path, "rows.jsonl", PREFERENCES)
    assert says in refused(tmp_path, *tiny, "trainer=dpo", "dataset=files", path, word)
