"""`luthier evaluate` of classifiers, taggers, reward and encoder-decoder models.

What it finds is what their own trainers find on the same rows.
"""

import json

import pytest

from helpers import task_models as tasks
from helpers.head_runs import CASES, SEVERAL, TEXTS, both, finish, labelled
from luthier.metrics import classification


@pytest.fixture
def finished(tmp_path, capsys):
    """Make a run; gives back its folder and what its trainer measured."""

    def finished(method, rows, also, name="run"):
        found = finish(tmp_path / name, method, rows, also)
        capsys.readouterr()  # what the trainer said of its labels
        return found

    return finished


@pytest.mark.parametrize(("method", "rows", "also"), CASES.values(), ids=CASES)
def test_the_numbers_are_those_of_the_trainer(luthier, finished, method, rows, also):
    run, measured = finished(method, rows, also)
    code, out, err = luthier("evaluate", run, "--alone", "--json")
    assert code == 0, err
    (found,) = json.loads(out)["sets"]
    assert (found["name"], found["rows"], found["left_out"]) == ("held out", len(rows), {})
    shared = found["numbers"].keys() & measured.keys()
    assert shared == found["numbers"].keys() - {"perplexity"}
    for name in shared:
        number = found["numbers"][name]["tuned"]
        assert number["value"] == pytest.approx(measured[name], rel=1e-4, abs=1e-5), name
        assert number["low"] <= number["value"] + 1e-9 and number["high"] >= number["value"] - 1e-9
    assert ("perplexity" in found["numbers"]) == (method == "seq2seq")


@pytest.mark.parametrize("name", ["classes", "tags", "rewards", "targets"])
def test_rows_that_were_drawn_from_the_training_rows_are_drawn_again(luthier, finished, name):
    method, rows, also = CASES[name]
    twice = [*rows, *both(rows)[1]]  # no label is held out alone
    run, measured = finished(method, twice, also | {"dataset": {"eval": {"count": 1}}})
    code, out, err = luthier("evaluate", run, "--alone", "--json")
    assert code == 0, err
    (found,) = json.loads(out)["sets"]
    assert (found["name"], found["rows"]) == ("held out", 1)
    assert found["numbers"]["loss"]["tuned"]["value"] == pytest.approx(measured["loss"], rel=1e-4)


def test_rows_that_it_gets_wrong_are_shown(luthier, finished):
    run, measured = finished(*CASES["classes"])
    code, out, _ = luthier("evaluate", run)
    assert code == 0 and measured["accuracy"] < 1
    for word in ("accuracy", "macro_f1", "worst, by accuracy", "held.jsonl:", "expected"):
        assert word in out


def test_one_classifier_against_another(luthier, finished):
    one, _ = finished(*CASES["classes"])
    other, _ = finished("classify", labelled([label for _, label in TEXTS]), {"seed": 5}, "other")
    rows = one.parent / "held.jsonl"
    words = ("evaluate", one, "--against", other, f"dataset.path={rows}")
    _, shown, _ = luthier(*words)
    assert " other " in shown and " base " not in shown
    code, out, err = luthier(*words, "--json")
    assert code == 0, err
    assert json.loads(out)["against"] == str(other)
    (found,) = json.loads(out)["sets"]
    assert {"base", "tuned", "difference", "higher", "lower"} <= set(found["numbers"]["accuracy"])


def test_whole_numbers_are_the_numbers_of_classes_where_they_are_no_names(luthier, finished):
    run, _ = finished(*CASES["classes"])
    numbers = {"card": 0, "lute": 1, "music": 2}
    rows = tasks.written(
        run / "numbers.jsonl", [{"text": text, "label": numbers[label]} for text, label in TEXTS]
    )
    names = tasks.written(run / "names.jsonl", labelled([label for _, label in TEXTS]))
    found = [luthier("evaluate", run, f"dataset.path={path}", "--json") for path in (rows, names)]
    one, other = (json.loads(out)["sets"][0]["numbers"] for _, out, _ in found)
    assert one == other


MISTAKES = {
    "label": ([{"text": "a", "label": "wood"}], [], "rows.jsonl:1: the label 'wood' is none of"),
    "list": ([{"text": "a", "label": ["lute"]}], [], "and this model says one class"),
    "chats": ([{"messages": [{"role": "user", "content": "a"},
                             {"role": "assistant", "content": "b"}]}], [],
              "its rows are conversations, and this model is measured on texts with a label"),
    "metrics": ([], ["metrics=[exact_match]"], "metrics is for models that write"),
    "generation": ([], ["max_new_tokens=3"], "max_new_tokens is for models that write"),
    "benchmarks": ([], ["--benchmarks", "gsm8k"], "--benchmarks is for models that write"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "words", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_with_a_classifier_is_said_in_words(
    luthier, finished, tmp_path, monkeypatch, rows, words, says
):
    monkeypatch.setattr("luthier.evaluate.benchmarks.check_installed", lambda: None)
    run, _ = finished(*CASES["classes"])
    given = [f"dataset.path={tasks.written(tmp_path / 'rows.jsonl', rows)}"] if rows else []
    code, _, err = luthier("evaluate", run, *given, *words)
    assert code == 2 and says in err


def test_two_models_that_do_different_things_are_not_compared(luthier, finished, base_model):
    run, _ = finished(*CASES["classes"])
    code, _, err = luthier("evaluate", run, "--against", base_model)
    assert code == 2 and "does something else" in err
    other, _ = finished("classify", labelled(SEVERAL), {}, "several")
    rows = run.parent / "held.jsonl"
    code, _, err = luthier("evaluate", run, "--against", other, f"dataset.path={rows}")
    assert code == 2 and "and this model says lists of classes" in err


def test_what_the_bootstrap_draws_from_sums_up_to_the_scores():
    import numpy as np

    draw = np.random.default_rng(0)
    said, right = draw.integers(0, 4, (2, 50))
    assert classification.single_label_samples(said, right, 5).values == pytest.approx(
        classification.single_label_scores(said, right, 5)
    )
    said, right = draw.random((2, 50, 4)) > 0.6
    assert classification.multi_label_samples(said, right).values == pytest.approx(
        classification.multi_label_scores(said, right)
    )
    said, right = draw.normal(size=(2, 50))
    assert classification.regression_samples(said, right).values == pytest.approx(
        classification.regression_scores(said, right)
    )
    flat = np.full(50, 0.1)
    assert classification.regression_samples(flat, right).values["pearson"] == 0.0
    names = np.array(["O", "B-A", "I-A", "B-B"])
    said, right = ([row.tolist() for row in names[draw.integers(0, 4, (20, 9))]] for _ in "ab")
    found = classification.tag_samples(said, right, are_entities=True).values
    assert {n: found[n] for n in found if n != "accuracy"} == pytest.approx(
        classification.entity_scores(said, right)
    )
