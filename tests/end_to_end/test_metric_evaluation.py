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
    assert results["eval_loss"] == {"before": losses[0], "after": losses[best]}
    assert set(results) == {"eval_loss", "exact_match", "length", "score"}
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
    names = {"eval_loss", "exact_match", "long/eval_loss", "long/contains"}
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


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
CALLING = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def trace(number):
    """A question, a call, its result, and the answer."""
    return {"tools": TOOLS, "messages": [
        say("user", f"{number}?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
        say("tool", "1"), say("assistant", "a"),
    ]}  # fmt: skip


def test_each_turn_of_a_trace_is_scored_in_training_and_by_evaluate(tmp_path, tiny, luthier):
    rows = "".join(json.dumps(trace(number)) + "\n" for number in range(24))
    (tmp_path / "traces.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "calling.jinja").write_text(CALLING, encoding="utf-8")
    given = {
        "dataset.path": tmp_path / "traces.jsonl", "chat.template": tmp_path / "calling.jinja",
        "trainer.args.max_steps": 60, "trainer.args.eval_strategy": "no", "lora": "none",
        "trainer.evaluation.when": "start_and_end", "trainer.evaluation.max_new_tokens": 64,
        "trainer.evaluation.metrics": "[exact_match,tool_call_accuracy,tool_use_accuracy]",
    }  # fmt: skip
    folder = tmp_path / "run"
    assert run(load_config([*words(tiny, **given), f"output_dir={folder}"])) == 0
    results = json.loads((folder / "run.json").read_text())["results"]
    replies = [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]
    report = tmp_path / "report.json"
    code, _, _ = luthier("evaluate", folder, "--alone", "model.device=cpu", "-o", report)
    (found,) = json.loads(report.read_text())["sets"]
    # Six rows are held out, and each has two turns: a call, and an answer behind its result.
    assert [reply["expected"] for reply in replies] == [
        '{"name": "f", "arguments": {"a": 1}}', "a"
    ] * 6  # fmt: skip
    assert [reply["after"] for reply in replies] == [reply["expected"] for reply in replies]
    assert replies[0]["scores"]["exact_match"]["after"] is None
    assert replies[0]["scores"]["tool_call_accuracy"] == {"before": 0, "after": 1}
    for name in ("exact_match", "tool_call_accuracy", "tool_use_accuracy/relevance"):
        assert results[name]["after"] == 1, name
        assert found["numbers"][name]["tuned"]["value"] == 1, name
    assert results["tool_use_accuracy/relevance"]["before"] == 0
    # Rendered again from the store, the rows are those that trained.
    loss = found["numbers"]["loss"]["tuned"]["value"]
    assert loss == pytest.approx(results["eval_loss"]["after"], rel=1e-3)
    assert (code, found["rows"], found["asked"]) == (0, 6, 12)
