"""Points of grids and random searches."""

import pytest

from luthier.errors import UserError
from luthier.sweep import space, strategies
from luthier.sweep.objective import Objective, PruningSignal
from luthier.sweep.settings import OptunaSettings
from luthier.sweep.strategies import OptunaStrategy
from luthier.sweep.trials import Trial


def points(seed, count, *lines):
    return strategies.random_points(space.read_space(lines, {})[0], count, seed)


def test_a_grid_is_every_combination_the_last_running_fastest():
    found, _ = space.read_space(["lora.r=8,16", "seed=1,2"], {})
    assert [tuple(point.values()) for point in strategies.grid_points(found)] == [
        ("8", "1"), ("8", "2"), ("16", "1"), ("16", "2"),
    ]  # fmt: skip


def test_random_points_are_the_same_at_every_start_and_more_of_them_begin_alike():
    line = "trainer.args.learning_rate=tag(log,interval(1e-5,1e-2))"
    few, many = points(0, 3, line), points(0, 30, line)
    assert many[:3] == few
    assert points(1, 3, line) != few
    rates = [float(point["trainer.args.learning_rate"]) for point in many]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    # On a logarithmic scale two thirds lie below 1e-3.
    assert 12 <= sum(rate < 1e-3 for rate in rates) <= 28


def test_random_points_never_repeat_and_end_with_the_space():
    found = points(0, 50, "lora.r=8,16", "seed=range(1,4)")
    assert len(found) == 6
    assert len({tuple(point.values()) for point in found}) == 6


def test_whole_bounds_give_whole_numbers():
    drawn = {point["seed"] for point in points(0, 50, "seed=int(interval(1,4))")}
    assert drawn == {"1", "2", "3", "4"}


LOSS = Objective("loss", maximize=False)
LINES = ["lora=a,b", "rate=tag(log,interval(1e-5,1e-2))", "rank=int(interval(1,64))",
         "size=range(8,33,8)"]  # fmt: skip


def study(path, n_trials=4, watched=None, objectives=(LOSS,), **settings):
    made = OptunaSettings(kind="optuna", n_trials=n_trials, **settings)
    return OptunaStrategy(
        path / "study.log", space.read_space(LINES, {})[0], made, objectives, watched
    )


def drawn(made, trials):
    """Draw all points that are left, and tell what came out of each."""
    while (point := made.next(trials)) is not None:
        trials.append(Trial(len(trials), point, "finished", {"loss": float(point["rank"])}))
        made.tell(trials[-1])
    return [tuple(trial.params.values()) for trial in trials]


def test_points_are_within_their_bounds(tmp_path):
    for name, rate, rank, size in drawn(study(tmp_path, 12), []):
        assert name in ("a", "b")
        assert 1e-5 <= float(rate) <= 1e-2
        assert 1 <= int(rank) <= 64
        assert size in ("8", "16", "24", "32")


def test_a_study_that_goes_on_draws_new_points(tmp_path):
    trials = []
    first = drawn(study(tmp_path, 4), trials)
    both = drawn(study(tmp_path, 8), trials)
    assert both[:4] == first
    assert len(set(both)) == 8
    assert drawn(study(tmp_path, 8), trials) == both


def test_a_point_that_was_drawn_and_not_written_is_not_lost(tmp_path):
    point = study(tmp_path).next([])
    assert study(tmp_path).next([]) == point


def test_a_study_with_another_direction_is_refused(tmp_path):
    study(tmp_path)
    with pytest.raises(UserError, match="wants to minimize"):
        study(tmp_path, objectives=(Objective("score", maximize=True),))


@pytest.mark.parametrize("opposite", [False, True], ids=["the same way", "the other way"])
def test_bad_trials_are_seen(tmp_path, opposite):
    pruner = {"name": "median", "n_startup_trials": 2}
    made = study(tmp_path, 4, PruningSignal("eval_loss", opposite), pruner=pruner)
    trials = [Trial(number, made.next([None] * number)) for number in range(3)]
    sign = -1 if opposite else 1
    for trial in trials[:2]:
        assert not made.is_bad(trial, 10, sign * 1.0)
        trial.state, trial.values = "finished", {"loss": 1.0}
        made.tell(trial)
    assert made.is_bad(trials[2], 10, sign * 5.0)
    assert not made.is_bad(trials[2], 10, sign * 5.0)  # said before, after a checkpoint
    trials[2].state = "pruned"
    made.tell(trials[2])
    made.tell(trials[2])  # a sweep that goes on tells it again


def test_failures_and_what_is_no_number_are_told(tmp_path):
    made = study(tmp_path, 3)
    trials = [Trial(number, made.next([None] * number)) for number in range(3)]
    trials[0].state = "failed"
    trials[1].state, trials[1].values = "finished", {"loss": float("nan")}
    trials[2].state, trials[2].values = "finished", {"loss": 0.5}
    for trial in trials:
        made.tell(trial)
    assert [one.state.name for one in made._study.trials] == ["FAIL", "FAIL", "COMPLETE"]
