"""What trials are compared by: names, directions, values."""

import pytest

from luthier.sweep import objective
from luthier.sweep.objective import Objective
from luthier.sweep.settings import OptunaSettings, SweeperSettings
from luthier.sweep.trials import Trial

HELD = {"eval": {"share": 0.1, "sets": {}}}
METRICS = {"metrics": ["exact_match", {"length": {"greater_is_better": False}}]}


def config(method="sft", dataset=None, **trainer):
    return {"dataset": dataset or HELD, "trainer": {"method": method, "args": {}, **trainer}}


def read(given, resolved, kind=SweeperSettings):
    return objective.read_objectives(kind(kind="basic", objective=given), resolved)


DIRECTIONS = {
    "the loss by itself": (None, config(), [("eval_loss", "minimize")]),
    "a metric of replies": (
        "exact_match", config(evaluation=METRICS), [("exact_match", "maximize")],
    ),
    "a metric that is better when less": (
        "length", config(evaluation=METRICS), [("length", "minimize")],
    ),
    "what a method measures": ("macro_f1", config("classify"), [("macro_f1", "maximize")]),
    "an error": ("rmse", config("classify"), [("rmse", "minimize")]),
    "a logged metric": ("eval_loss", config(), [("eval_loss", "minimize")]),
    "time": ("training_seconds", config(), [("training_seconds", "minimize")]),
    "a direction given": ({"grad_norm": "maximize"}, config(), [("grad_norm", "maximize")]),
    "two": (
        ["eval_loss", "training_seconds"], config(),
        [("eval_loss", "minimize"), ("training_seconds", "minimize")],
    ),
    "a set by name": (
        "hard/eval_loss", config(dataset={"eval": {"share": 0.1, "sets": {"hard": {}}}}),
        [("hard/eval_loss", "minimize")],
    ),
    "an open method's own name": (
        {"rewards/chosen": "maximize"}, config("dpo"), [("rewards/chosen", "maximize")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("given, resolved, wanted", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions(given, resolved, wanted):
    found, mistakes = read(given, resolved)
    assert mistakes == []
    assert [(one.name, one.direction) for one in found] == wanted


WATCHED = {
    "the held-out loss": (None, {}, "eval_loss"),
    "a set's loss": ("hard/eval_loss", {}, "eval_hard_loss"),
    "a metric at evaluations": (
        "exact_match", {"evaluation": METRICS | {"when": "evaluations"}}, "eval_exact_match",
    ),
    "the training loss": ("loss", {}, "loss"),
}  # fmt: skip


@pytest.mark.parametrize("given, trainer, name", WATCHED.values(), ids=WATCHED)
def test_what_a_pruner_looks_at(given, trainer, name):
    resolved = config(dataset={"eval": {"share": 0.1, "sets": {"hard": {}}}}, **trainer)
    resolved["trainer"]["args"] = {"eval_strategy": "steps"}
    sweeper = OptunaSettings(kind="optuna", objective=given)
    found = objective.pruning_signal(
        sweeper, objective.read_objectives(sweeper, resolved)[0], resolved
    )
    assert found == objective.PruningSignal(name, opposite=False)


PRUNED_BY = {
    "a metric that is better when more": ("eval_mean_token_accuracy", True),
    "another loss": ("loss", False),
    "the objective's own metric": ("eval_rewards/chosen", False),
    "the objective itself": ("rewards/chosen", False),
}


@pytest.mark.parametrize("name, opposite", PRUNED_BY.values(), ids=PRUNED_BY)
def test_which_way_a_pruner_looks(name, opposite):
    resolved = config("dpo", args={"eval_strategy": "steps"})
    aim = {"rewards/chosen": "maximize"} if "rewards" in name else None
    sweeper = OptunaSettings(kind="optuna", objective=aim, prune_by=name)
    objectives = objective.read_objectives(sweeper, resolved)[0]
    signal = objective.pruning_signal(sweeper, objectives, resolved)
    assert signal == objective.PruningSignal(name, opposite)


def test_a_pruner_is_not_told_the_wrong_way():
    resolved = config("grpo", args={"eval_strategy": "steps"})
    sweeper = OptunaSettings(kind="optuna", objective="reward", prune_by="completions/mean_length")
    objectives = objective.read_objectives(sweeper, resolved)[0]
    mistake = objective.pruning_signal(sweeper, objectives, resolved)
    assert mistake.key == "hydra.sweeper.prune_by"
    assert "does not know which way completions/mean_length is better" in mistake.text


def test_the_numbers_of_a_run():
    run = {
        "results": {
            "eval_loss": {"before": 2.0, "after": 0.5},
            "exact_match": {"before": None},
        },
        "training_seconds": 12.5,
        "peak_memory_gib": {"host": 3.0},
        "status": "finished",
    }
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "note": "text", "odd": True}]
    assert objective.measure_objectives(run, rows) == {
        "step": 2.0, "loss": 2.5, "training_seconds": 12.5, "peak_memory_gib.host": 3.0,
        "eval_loss": 0.5,
    }  # fmt: skip


def test_what_is_no_number_comes_last():
    from luthier.sweep.trials import best_trial, rank_trials

    up = Objective("score", maximize=True)
    trials = [
        Trial(0, {}, "finished", {"score": float("nan")}),
        Trial(1, {}, "finished", {"score": 0.2}),
        Trial(2, {}, "failed"),
        Trial(3, {}, "finished", {"score": 0.9}),
        Trial(4, {}, "pruned", {"score": 1.0}),
    ]
    assert [one.number for one in rank_trials(trials, [up])] == [3, 1, 0, 4, 2]
    assert [one.number for one in best_trial(trials, [up])] == [3]
