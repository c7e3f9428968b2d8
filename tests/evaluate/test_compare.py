"""`luthier evaluate`: the numbers against plain arithmetic, and what is said of wrong words."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers import adapter_runs as material
from helpers.chatml import jsonl
from helpers.evaluation_rows import ROWS
from luthier.evaluate import compare, likelihood
from luthier.evaluate.likelihood import ModelScores
from luthier.evaluate.rows import EvaluationRow, EvaluationRows, MeasuredSequence
from luthier.infer import LLM
from luthier.metrics import MetricScores, parse_metrics

CPU = "model.device=cpu"


def plain_sums(model, tokenizer):
    """Each row's nats and tokens: the reply and its stop token, one row at a time."""
    found = []
    for row in ROWS:
        asked = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        reply = tokenizer(f"{row['completion']}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0].double()
        likely = logits.log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
        nats = [-likely[at, token].item() for at, token in zip(places, reply, strict=True)]
        found.append((math.fsum(nats), len(nats)))
    return found


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """What the command wrote for the run and its held-out rows."""
    import sys

    from luthier.cli import main

    out = tmp_path_factory.mktemp("out") / "found.json"
    old, sys.argv = sys.argv, ["luthier", "evaluate", str(run), CPU, "-o", str(out)]
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        sys.argv = old
    assert ended.value.code == 0
    return json.loads(out.read_text())


def test_perplexity_is_that_of_plain_arithmetic_for_base_and_tuned(run, evaluated):
    (found,) = evaluated["sets"]
    assert (found["name"], found["rows"], found["asked"]) == ("held out", 12, 12)
    with LLM(str(run)) as llm:
        tuned = plain_sums(llm.model, llm.tokenizer)
        with llm.as_base():
            base = plain_sums(llm.model, llm.tokenizer)
    for name, sums in (("base", base), ("tuned", tuned)):
        nats, tokens = map(sum, zip(*sums, strict=True))
        loss = found["numbers"]["loss"][name]
        assert loss["value"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["numbers"]["perplexity"][name]["value"] == pytest.approx(
            math.exp(nats / tokens), rel=1e-4
        )
        assert loss["low"] < loss["value"] < loss["high"]
    difference = found["numbers"]["loss"]["difference"]
    base, tuned = (found["numbers"]["loss"][name]["value"] for name in ("base", "tuned"))
    assert difference["value"] == pytest.approx(tuned - base)


def test_replies_are_scored_by_the_runs_own_metrics(run, evaluated):
    (found,) = evaluated["sets"]
    (metric,) = parse_metrics(["token_f1"])
    with LLM(str(run)) as llm:
        texts = llm.generate([row["prompt"] for row in ROWS], max_new_tokens=7)
    scores = [metric.row(t, row["completion"]) for t, row in zip(texts, ROWS, strict=True)]
    assert found["numbers"]["token_f1"]["tuned"]["value"] == pytest.approx(np.mean(scores))
    assert evaluated["settings"] == {"max_new_tokens": 7}
    assert evaluated["versions"]["transformers"]


def test_a_batch_is_as_likely_as_its_rows_alone(run, monkeypatch):
    ids = [[1, 5 + n, 6, *range(7, 7 + n)] for n in range(6)]
    items = [
        EvaluationRow("row", [MeasuredSequence(each, [-100, -100, *each[2:]])], None)
        for each in ids
    ]
    with LLM(str(run)) as llm:
        together = likelihood.compute_losses(llm.model, items)
        monkeypatch.setattr(likelihood, "TOKENS", 1)
        alone = likelihood.compute_losses(llm.model, items)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together[:, 1].tolist() == [1, 2, 3, 4, 5, 6]


def test_tables_show_intervals_and_rows(luthier, run, tmp_path):
    rows = jsonl(tmp_path / "mine.jsonl", ROWS[:5])
    words = (f"dataset.path={rows}", "metrics=[exact_match,length]", "max_new_tokens=4", CPU)
    code, out, _ = luthier("evaluate", run, *words)
    assert code == 0
    assert f"{rows}:5rows" in "".join(out.split())  # a long path is broken into lines
    for word in ("base", "tuned", "difference", "sure", "perplexity", "exact_match", "length"):
        assert word in out


def test_a_model_alone_has_no_difference(luthier, base_model, tmp_path):
    rows = jsonl(tmp_path / "mine.jsonl", [{"text": "abc"}, {"text": "de f"}])
    code, out, _ = luthier("evaluate", base_model, f"dataset.path={rows}", "--json", CPU)
    assert code == 0
    (found,) = json.loads(out)["sets"]
    assert set(found["numbers"]) == {"loss", "perplexity"}
    assert set(found["numbers"]["loss"]) == {"tuned"}


def test_rows_that_the_run_drew_from_its_training_rows_are_drawn_again(
    luthier, base_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    rows = jsonl(tmp_path / "rows.jsonl", ROWS)
    dataset = {"path": str(rows), "eval": {"count": 3}}
    folder = material.run(tmp_path / "run", base_model, rows, dataset=dataset)
    code, out, _ = luthier("evaluate", folder, "--json", CPU)
    assert code == 0
    (found,) = json.loads(out)["sets"]
    assert (found["name"], found["rows"]) == ("held out", 3)


def outcome(nats, replies, scores):
    scored = MetricScores({"m": float(np.mean(scores))}, {"m": scores})
    return ModelScores(np.array(nats, float), replies, scored)


def test_rows_are_won_and_lost_by_the_first_metric_that_tells_them_apart():
    from luthier.infer.questions import Question

    rows = [
        EvaluationRow(f"r{n}", [], [Question([{"content": f"q{n}"}], {}, "x")]) for n in range(3)
    ]
    base = outcome([[4, 2], [4, 2], [4, 2]], ["a", "b", "c"], [0.0, 1.0, 0.5])
    tuned = outcome([[2, 2], [6, 2], [4, 2]], ["A", "B", "C"], [1.0, 0.0, 0.5])
    found = compare.compare_outcomes(EvaluationRows("s", rows), base, tuned, {"m": True}, 0.95)
    assert found.judged_by == "m"
    assert found.wins == [{"where": "r0", "gain": 1.0, "prompt": "q0", "expected": "x",
                           "base": "a", "tuned": "A"}]  # fmt: skip
    assert [row["where"] for row in found.losses] == ["r1"]
    assert found.numbers["loss"]["base"]["value"] == 2.0
    assert found.numbers["m"]["difference"]["value"] == 0.0
    found = compare.compare_outcomes(EvaluationRows("s", rows), base, tuned, {}, 0.95)
    assert found.judged_by == "loss"
    assert [(row["where"], row["gain"]) for row in found.wins] == [("r0", 1.0)]


TASK = """
task: lute
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.train
def test_a_benchmark_of_the_harness_asks_base_and_tuned(luthier, run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"q{n}", "choices": ["ab", "cd", "ef"], "answer": n % 3} for n in range(9)]
    path = jsonl(tmp_path / "lute.jsonl", rows)
    (tmp_path / "lute.yaml").write_text(TASK.format(rows=path), encoding="utf-8")
    words = ("--benchmarks", "lute", "--tasks", tmp_path, "--json", CPU)
    code, out, _ = luthier("evaluate", run, *words)
    assert code == 0
    found = json.loads(out)["benchmarks"]["lute/acc"]
    with LLM(str(run)) as llm:
        wanted = {"tuned": picked(llm, rows)}
        with llm.as_base():
            wanted["base"] = picked(llm, rows)
    for name, right in wanted.items():
        assert found[name]["value"] == pytest.approx(right / 9)
    code, _, err = luthier("evaluate", run, "--benchmarks", "lutee", "--tasks", tmp_path, CPU)
    assert code == 2 and "has no task 'lutee'. Did you mean lute?" in err


def picked(llm, rows):
    """How many rows' right choice is the likeliest behind the prompt, by plain arithmetic."""
    right = 0
    for row in rows:
        (prompt,) = llm.prompt_ids([row["question"]])
        sums = []
        for choice in row["choices"]:
            ids = llm.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                likely = llm.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            sums.append(
                sum(likely[at, token].item() for at, token in zip(places, ids, strict=True))
            )
        right += int(np.argmax(sums)) == row["answer"]
    return right


MISTAKES = {
    "no run": (["{tiny}", CPU], "is no run, so no rows were held out"),
    "metric": (["{run}", "metrics=[exact]"], "metrics: "),
    "no file": (["{run}", "dataset.path=none.jsonl", CPU], "none.jsonl"),
    "labels": (["{run}", "dataset.path={labels}", CPU], "its rows are texts with a label"),
    "nowhere": (["{run}", "-o", "/none/x.json"], "-o /none/x.json: cannot be written"),
    "nothing": ([], "luthier evaluate: MODEL is missing."),
    "word": (["{run}", "more"], "what is 'more'?"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_in_words(luthier, run, base_model, tmp_path, words, says):
    labels = jsonl(tmp_path / "labels.jsonl", [{"text": "a", "label": "x"}] * 2)
    code, _, err = luthier(
        "evaluate", *(word.format(run=run, tiny=base_model, labels=labels) for word in words)
    )
    assert code == 2 and says in err


@pytest.mark.parametrize(
    "count, says, is_few",
    [(1, "held out: 1 row\n", True), (9, "held out: 9 rows\n", True), (10, ": 10 rows\n", False)],
)
def test_few_rows_are_named_as_too_few_for_intervals(count, says, is_few):
    numbers = {"loss": {"tuned": {"value": 1.0, "low": 0.9, "high": 1.1}}}
    result = compare.Comparison("held out", count, 0, {}, numbers, "", [], [], [])
    console = Console(file=io.StringIO(), width=80)
    compare.print_comparison(result, console)
    out = console.file.getvalue()
    assert says in out and ("too few for intervals" in out) == is_few
