"""Runs whose replies are scored at every evaluation: the best checkpoint, the end, the tables."""

import json

import pytest

from helpers.preference_trainer import model, say, tokenizer
from luthier.config import load_config
from luthier.errors import UserError
from luthier.train.run import run

ROWS = [{"messages": [say("user", f"{n}?"), say("assistant", "a")], "n": n} for n in range(24)]
LONG = [{"messages": [say("user", f"{n}!"), say("assistant", "bb")]} for n in range(5)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, rows that are all answered alike, and an evaluation set of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, rows in (("rows", ROWS), ("long", LONG)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "own_levels.py").write_text(
        "def score(predictions, references, rows):\n    return [float(row['n']) for row in rows]\n"
    )
    return folder


def words(tiny, **more):
    settings = {
        "model": "hub", "model.path": tiny / "model", "model.device": "cpu", "dataset": "files",
        "model.dtype": "float32", "dataset.path": tiny / "rows.jsonl", "dataset.eval.count": 6,
        "dataset.eval.share": "null", "dataset.cache": tiny / "cache",
        "trainer.args.activation_checkpointing": "false", "trainer.args.max_steps": 8,
        "trainer.args.learning_rate": "0.01", "trainer.args.lr_scheduler_type": "constant",
        "trainer.args.warmup_steps": 0, "trainer.args.logging_steps": 1,
        "trainer.args.eval_strategy": "steps", "trainer.args.eval_steps": 2,
        "trainer.evaluation.max_new_tokens": 4, "trainer.evaluation.when": "evaluations",
        "trainer.args.disable_tqdm": "true",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (settings | more).items()]


def finished(folder, *given):
    assert run(load_config([*given, f"output_dir={folder}"])) == 0
    lines = {
        name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl", "replies.jsonl")
    }
    return json.loads((folder / "run.json").read_text())["results"], lines


def test_metrics_choose_the_checkpoint_and_end_the_run(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    metrics = (
        "[exact_match,{length:{unit:characters,greater_is_better:false}},python:own_levels.score]"
    )
    given = {
        "trainer.evaluation.metrics": metrics, "trainer.args.metric_for_best_model": "length",
        "trainer.args.load_best_model_at_end": "true", "trainer.args.save_strategy": "steps",
        "trainer.args.save_steps": 2, "trainer.args.max_steps": 40,
        "trainer.evaluation.patience": 2,
    }  # fmt: skip
    results, lines = finished(tmp_path / "run", *words(tiny, **given))
    lengths = {
        row["step"]: row["eval_length"] for row in lines["metrics.jsonl"] if "eval_length" in row
    }
    losses = {row["step"]: row["eval_loss"] for row in lines["metrics.jsonl"] if "eval_loss" in row}
    after = {step: value for step, value in lengths.items() if step}
    best = min(after, key=lambda step: (after[step], step))
    # Two evaluations without a shorter reply end the run.
    assert max(after) == best + 4 < 40
    assert results["length"] == {"before": lengths[0], "after": after[best]}
    assert results["held_out_loss"] == {"before": losses[0], "after": losses[best]}
    assert set(results) == {"held_out_loss", "exact_match", "length", "score"}
    held_out = {row["prompt"]: row for row in lines["replies.jsonl"]}
    assert len(held_out) == 6
    for prompt, row in held_out.items():
        # The function saw the columns of its rows.
        assert row["scores"]["score"] == {"before": int(prompt[:-1]), "after": int(prompt[:-1])}
        assert row["scores"]["exact_match"]["after"] == float(row["after"].strip() == "a")
        assert row["scores"]["length"]["before"] == len(row["before"])
    steps = [row["step"] for row in lines["evaluations.jsonl"]]
    assert steps == [step for step in sorted(lengths) for _ in range(6)]
    assert {"prompt", "expected", "reply", "scores"} < set(lines["evaluations.jsonl"][0])


def test_each_evaluation_set_has_its_own_names_and_metrics(tmp_path, tiny):
    given = {
        "trainer.evaluation.metrics": "[exact_match]", "trainer.evaluation.rows": 3,
        "trainer.evaluation.sets": "{long:[contains]}",
        "+dataset.eval.sets": f"{{long:{{path:{tiny / 'long.jsonl'}}}}}",
        "trainer.args.max_steps": 2,
    }  # fmt: skip
    results, lines = finished(tmp_path / "run", *words(tiny, **given))
    names = {"held_out_loss", "exact_match", "long/held_out_loss", "long/contains"}
    assert set(results) == names
    logged = set().union(*lines["metrics.jsonl"])
    assert {"eval_loss", "eval_exact_match", "eval_long_loss", "eval_long_contains"} <= logged
    assert not {"eval_long_exact_match", "eval__loss"} & logged
    assert [row.get("set") for row in lines["replies.jsonl"]] == [None] * 3 + ["long"] * 3


def test_a_best_checkpoint_by_what_nobody_measures_stops_before_the_first_step(tmp_path, tiny):
    given = {
        # Only models with experts have it, so the config alone does not tell.
        "trainer.args.metric_for_best_model": "eval_aux_loss",
        "trainer.evaluation.when": "start_and_end",
    }
    with pytest.raises(UserError, match="metric_for_best_model=eval_aux_loss: no evaluation m"):
        finished(tmp_path / "run", *words(tiny, **given))
