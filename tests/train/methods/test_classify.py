"""Classification: losses against plain arithmetic, labels from the rows, models that load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from helpers.task_models import (
    ASSETS,
    ROOT,
    bert,
    built,
    byte_level,
    config_of,
    llama,
    run,
    saved,
    wordpiece,
)
from luthier.errors import UserError
from luthier.model.adapters import add_adapter

HELD = [
    {"text": "where is my lute", "label": "lute"},
    {"text": "the card is lost in Cremona", "label": "card"},
    {"text": "violins and guitars", "label": "music"},
    {"text": "found", "label": "card"},
    {"text": "a plucked instrument, a lute, in Paris", "label": "music"},
]
ROWS = [
    {"text": "where is my card", "label": "card"},
    {"text": "a lute", "label": "lute"},
    {"text": "Anna Bell found a luthier in Cremona, and a lute", "label": "lute"},
    {"text": "guitars and violins", "label": "music"},
    {"text": "I lost it", "label": "card"},
    {"text": "my card is in Paris", "label": "card"},
    {"text": "violins", "label": "music"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bert"), bert, wordpiece())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), llama, byte_level())


def made(folder, model, rows=ROWS, held=None, tokenizer=None, **also):
    config = config_of("classify", folder, model, rows, held, **also)
    return built(config, tokenizer or wordpiece())


def again(rows):
    """The same labels with other texts, which may be held out."""
    return [row | {"text": f"{row['text']} !"} for row in rows]


def logits(net, tokenizer, row):
    net.eval()
    with torch.no_grad():
        batch = tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")
        return net(**batch).logits[0]


def plain_loss(net, tokenizer, rows):
    """The mean cross entropy, a row at a time and without padding."""
    numbers = net.config.label2id
    losses = [
        cross_entropy(logits(net, tokenizer, row), torch.tensor(numbers[str(row["label"])]))
        for row in rows
    ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_evaluation_is_that_of_all_rows(tmp_path, model, size):
    args = {"per_device_eval_batch_size": size, "learning_rate": 0}
    trainer, _ = made(tmp_path, model, ROWS, HELD, args=args)
    found = trainer.evaluate()
    net, tokenizer = trainer.model, wordpiece()
    assert found["eval_loss"] == pytest.approx(plain_loss(net, tokenizer, HELD), rel=1e-5)
    said = [int(logits(net, tokenizer, row).argmax()) for row in HELD]
    right = [net.config.label2id[row["label"]] for row in HELD]
    hits = sum(a == b for a, b in zip(said, right, strict=True))
    assert found["eval_accuracy"] == hits / 5


def test_labels_are_sorted_and_in_the_config(tmp_path, model):
    trainer, _ = made(tmp_path, model)
    assert trainer.model.config.id2label == {0: "card", 1: "lute", 2: "music"}
    assert trainer.model.config.problem_type == "single_label_classification"
    numbered = [row | {"label": 10 if row["label"] == "card" else 9} for row in ROWS]
    trainer, _ = made(tmp_path, model, numbered)
    assert trainer.model.config.id2label == {0: "9", 1: "10"}


GRADIENTS = [(7, 1), (2, 4), (1, 7)]


@pytest.mark.parametrize("how", GRADIENTS, ids=["one-batch", "four-batches", "seven-batches"])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, model, how):
    size, accumulate = how
    args = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate,
        "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "logging_steps": 1, "weight_decay": 0.0,
    }  # fmt: skip
    trainer, _ = made(tmp_path, model, args=args)
    before = plain_loss(trainer.model, wordpiece(), ROWS)
    head = trainer.model.classifier.weight
    wanted = head.detach().clone()
    loss = torch.stack([_one(trainer.model, row) for row in ROWS]).mean()
    (gradient,) = torch.autograd.grad(loss, head)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged == [pytest.approx(before, rel=1e-5)]
    torch.testing.assert_close(head.detach(), wanted - gradient, rtol=1e-4, atol=1e-6)


def _one(net, row):
    batch = wordpiece()(row["text"], return_tensors="pt")
    wanted = torch.tensor([net.config.label2id[row["label"]]])
    return cross_entropy(net(**batch).logits, wanted)


def test_a_decoder_reads_the_last_token_of_each_row(tmp_path, decoder):
    args = {"per_device_eval_batch_size": 5}
    trainer, _ = made(tmp_path, decoder, ROWS, HELD, byte_level(), args=args)
    net, tokenizer = trainer.model, byte_level()
    assert net.config.pad_token_id == tokenizer.pad_token_id
    losses = []
    for row in HELD:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        hidden = net.model(ids).last_hidden_state[0, -1]
        wanted = torch.tensor(net.config.label2id[row["label"]])
        losses.append(cross_entropy(net.score(hidden), wanted))
    expected = float(torch.stack(losses).mean().detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_row_that_ends_with_the_padding_token_is_refused(tmp_path, model):
    with pytest.raises(UserError, match=r"padding token \[SEP\] is also the last token of 7 rows"):
        tokenizer = wordpiece()
        tokenizer.pad_token = "[SEP]"
        made(tmp_path, model, tokenizer=tokenizer)


def test_pairs_and_their_segments(tmp_path, model):
    rows, held = (
        [row | {"text_pair": f"{row['text'][:4]} in Paris"} for row in part]
        for part in (ROWS, HELD)
    )
    trainer, _ = made(tmp_path, model, rows, held, args={"per_device_eval_batch_size": 2})
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["token_type_ids"].max() == 1
    plain = plain_loss(trainer.model, wordpiece(), held)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_several_classes_a_row(tmp_path, model):
    labels = [["a", "b"], [], ["c"], ["a"], ["b", "c"], ["a"], ["c"]]
    rows = [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]
    trainer, _ = made(tmp_path, model, rows, again(rows))
    net = trainer.model
    assert net.config.problem_type == "multi_label_classification"
    flags = [[float(name in label) for name in "abc"] for label in labels]
    said = torch.stack([logits(net, wordpiece(), row) for row in again(rows)])
    expected = binary_cross_entropy_with_logits(said, torch.tensor(flags))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    exact = ((said > 0).float() == torch.tensor(flags)).all(dim=1).float().mean()
    assert found["eval_accuracy"] == pytest.approx(float(exact))


def test_numbers_are_predicted(tmp_path, model):
    rows = [row | {"label": n / 2 - 1} for n, row in enumerate(ROWS)]
    trainer, _ = made(tmp_path, model, rows, again(rows))
    net = trainer.model
    assert (net.config.problem_type, net.config.num_labels) == ("regression", 1)
    said = torch.stack([logits(net, wordpiece(), row)[0] for row in again(rows)])
    wanted = torch.tensor([row["label"] for row in rows])
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(((said - wanted) ** 2).mean()), rel=1e-5)
    assert found["eval_mae"] == pytest.approx(float((said - wanted).abs().mean()), rel=1e-5)
    assert trainer.result_metrics == ("mae", "rmse", "pearson")


def test_whole_numbers_are_predicted_where_the_user_says_so(tmp_path, model):
    rows = [row | {"label": n - 3} for n, row in enumerate(ROWS)]
    trainer, _ = made(tmp_path, model, rows, kwargs={"problem_type": "regression"})
    assert trainer.model.config.num_labels == 1


def label(row, value):
    return ROWS[row] | {"label": value}


@pytest.mark.parametrize(
    ("rows", "held", "words"),
    [
        pytest.param(
            ROWS, [label(0, "lost"), label(1, "lute")],
            r"held\.jsonl:1: no training row has the label 'lost', so it cannot be learned",
            id="unseen-in-training",
        ),
        pytest.param(
            [label(n, "card") for n in range(7)], None,
            "every training row has the label 'card'", id="one-class-alone",
        ),
        pytest.param(
            [*ROWS, label(0, 3)], None,
            r"are names \('card', .*rows\.jsonl:1\) and some numbers \(3, .*rows\.jsonl:8\)",
            id="names-and-numbers",
        ),
        pytest.param(
            [*ROWS, label(0, ["card"])], None,
            r"rows\.jsonl:1: the label 'card' is no list, and other rows have lists", id="lists",
        ),
        pytest.param(
            [*ROWS, label(0, 0.5)], None,
            r"rows\.jsonl:1: the label 'card' is no number, and numbers are to be predicted",
            id="a-fraction-among-names",
        ),
        pytest.param(
            [label(n, n - 1) for n in range(7)], None,
            r"rows\.jsonl:1: the label -1 is below zero, .* 'dataset\.filter=.label >= 0.'",
            id="below-zero",
        ),
    ],
)  # fmt: skip
def test_labels_that_do_not_do_in_words(tmp_path, model, rows, held, words):
    with pytest.raises(UserError, match=words):
        made(tmp_path, model, rows, held)


def test_a_problem_type_that_does_not_exist(tmp_path, model):
    with pytest.raises(UserError, match=r"problem_type=ranking is none of single_label"):
        made(tmp_path, model, kwargs={"problem_type": "ranking"})
    with pytest.raises(UserError, match=r"model\.kwargs\.num_labels is not set with"):
        made(tmp_path, model, kwargs={"num_labels": 3})


def test_rows_longer_than_the_model_in_words(tmp_path, model):
    rows = [*ROWS, {"text": "lute " * 200, "label": "lute"}]
    with pytest.raises(UserError, match=r"longest row has 202 tokens, and the model has 128 pos"):
        made(tmp_path, model, rows)
    trainer, prepared = made(tmp_path, model, rows, chat={"max_length": 128})
    assert prepared.train_counts.cut_rows == 1
    assert trainer.train_dataset.lengths.max() == 128


def test_smoothing_is_for_classes(tmp_path, model):
    rows = [row | {"label": n / 2} for n, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="label_smoothing_factor is for one class a text"):
        made(tmp_path, model, rows, args={"label_smoothing_factor": 0.1})


def test_a_model_without_such_a_head_in_words(tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"trainer=classify needs a model .* none of the type vit"):
        made(tmp_path, str(folder))


def test_a_model_keeps_its_own_head_and_the_order_of_its_labels(tmp_path, model):
    trainer, _ = made(tmp_path, model)
    net = trainer.model
    net.config.id2label = {0: "music", 1: "card", 2: "lute"}
    net.config.label2id = {name: number for number, name in net.config.id2label.items()}
    net.save_pretrained(tmp_path / "own")
    kept, _ = made(tmp_path, str(tmp_path / "own"))
    assert kept.model.config.id2label == net.config.id2label
    torch.testing.assert_close(kept.model.classifier.weight, net.classifier.weight)
    other, _ = made(tmp_path, str(tmp_path / "own"), ROWS[:3])
    assert other.model.config.id2label == {0: "card", 1: "lute"}
    assert other.model.classifier.weight.shape == (2, 32)


def test_layers_that_the_checkpoint_lacks_are_saved_with_the_adapter(tmp_path, model):
    config = config_of("classify", tmp_path, model, ROWS, lora={"r": 4})
    trainer, _ = built(config, wordpiece(), lambda net: add_adapter(net, config.lora, 0, "SEQ_CLS"))
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model.") for name in names if "lora" not in name}
    assert whole == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert not any("classifier.lora" in name or "pooler.dense.lora" in name for name in names)
    from transformers import AutoModelForSequenceClassification

    labels = json.loads((tmp_path / "adapter" / "labels.json").read_text())
    assert labels["id2label"] == {"0": "card", "1": "lute", "2": "music"}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", **labels)
    plain.eval()
    for row in ROWS[:2]:
        torch.testing.assert_close(
            logits(plain, wordpiece(), row), logits(trainer.model, wordpiece(), row)
        )


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path, model, order):
    args = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, "save_steps": 3,
        "train_sampling_strategy": order,
    }  # fmt: skip
    whole, _ = made(tmp_path, model, args=args)
    whole.train()
    resumed, _ = made(tmp_path, model, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.train
def test_two_processes_measure_and_train_what_one_does(tmp_path, model):
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    held.write_text("".join(json.dumps(row | {"text": row["text"] + " !"}) + "\n" for row in ROWS))
    words = (
        "trainer=classify", "model=hub", f"model.path={model}", "model.device=cpu",
        "model.dtype=float32", "dataset=files", f"dataset.path={rows}", "dataset.eval.share=null",
        f"dataset.eval.path={held}", "trainer.args.max_steps=3", "trainer.args.logging_steps=1",
        "trainer.args.learning_rate=1e-3", "trainer.args.per_device_eval_batch_size=2",
    )  # fmt: skip
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launch = [accelerate, "launch", "--config_file", str(ROOT / "launch" / "cpu_ddp.yaml")]
    for name, size, launcher in (("two", 4, launch), ("one", 8, [sys.executable])):
        batch = f"trainer.args.per_device_train_batch_size={size}"
        done = subprocess.run(
            [*launcher, str(ROOT / "train.py"), *words, batch, f"output_dir={name}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"LUTHIER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    two, one = (
        json.loads((tmp_path / name / "run.json").read_text())["results"] for name in ("two", "one")
    )
    assert set(one) == {"eval_loss", "accuracy", "macro_f1", "micro_f1"}
    for name, pair in one.items():
        assert two[name] == pytest.approx(pair, rel=1e-5), name
    a, b = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("two", "one"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.train
@pytest.mark.long
@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_banking77_is_learned_and_the_model_answers_in_a_plain_pipeline(tmp_path):
    from transformers import pipeline

    data = ASSETS / "datasets" / "classification"
    lines = (data / "banking77_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    model = saved(tmp_path / "bert", bert, wordpiece(texts, 2000), size=96)
    output, results = run(
        tmp_path, "trainer=classify", "model=hub", f"model.path={model}", "model.device=cpu",
        "model.dtype=float32", "dataset=files", f"dataset.path={data}/banking77_train.jsonl",
        "dataset.eval.share=null", f"dataset.eval.path={data}/banking77_test.jsonl",
        "trainer.args.learning_rate=2e-3", "trainer.args.per_device_train_batch_size=32",
        "trainer.args.max_steps=700",
    )  # fmt: skip
    # Chance is 1 of 77.
    assert results["accuracy"]["before"] < 0.05
    assert results["accuracy"]["after"] > 0.5
    assert results["macro_f1"]["after"] > 0.4
    assert "accuracy" in output
    answer = pipeline("text-classification", model=str(tmp_path / "run" / "model"))
    lines = (data / "banking77_test.jsonl").read_text(encoding="utf-8").splitlines()[::20]
    rows = [json.loads(line) for line in lines]
    said = answer([row["text"] for row in rows])
    right = [one["label"] == row["label"] for one, row in zip(said, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["accuracy"]["after"], abs=0.15)
