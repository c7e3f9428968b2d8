"""A sweep is checked whole before anything runs: every trial, every setting, the objective."""

import pytest

from luthier.errors import UserError
from luthier.sweep.sweep_plan import plan_sweep

Q = "recipe=quickstart"
R = "lora.r=8,16"
OPTUNA = "hydra/sweeper=optuna"
RATE = "trainer.args.learning_rate=tag(log,interval(1e-5,1e-3))"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists()


WRONG = {
    "a typo in a key": ([Q, "lora.rr=8,16"], ["1 mistake", "lora.rr", "Did you mean lora.r?"]),
    "a typo in the last value of two axes": (
        [Q, R, "model=smollm2_135m,smolm2_1_7b"],
        ["lora.r=8 model=smolm2_1_7b (2 of 3 checked)", "Did you mean smollm2_1_7b"],
    ),
    "a value that does not fit": ([Q, "lora.r=8,many"], ["lora.r", "'many'"]),
    "a fraction where a whole number belongs": (
        [Q, OPTUNA, "lora.r=interval(1,64)"],
        ["lora.r", "25.003 is not a whole number"],
    ),
    "a typo in the recipe": (["recipe=quikstart", R], ["Did you mean quickstart?"]),
    "an empty sweep": ([Q], ["nothing varies", "lora.r=8,16,32"]),
    "an interval in a grid": ([Q, RATE], ["no end of values", "hydra/sweeper=random"]),
    "a typo in a setting": (
        [Q, R, "hydra.sweeper.on_failur=stop"],
        ["Did you mean hydra.sweeper.on_failure?"],
    ),
    "a setting of another sweeper": (
        [Q, R, "hydra.sweeper.n_trials=3"],
        ["basic has no such setting; random and optuna have it"],
    ),
    "no such sweeper": ([Q, R, "hydra/sweeper=optunna"], ["hydra/sweeper", "Did you mean optuna?"]),
    "no such launcher": ([Q, R, "hydra/launcher=slurm"], ["hydra/launcher", "submitit_slurm"]),
    "no trials": ([Q, R, OPTUNA, "hydra.sweeper.n_trials=0"], ["n_trials", "at least 1"]),
    "no slots": ([Q, R, "hydra.launcher.slots=0"], ["slots", "at least 1"]),
    "a negative share of a GPU": ([Q, R, "hydra.launcher.gpus_per_trial=-1"], ["above 0"]),
    "overwriting": ([Q, R, "overwrite=true"], ["never overwrites a trial"]),
    "a folder by Hydra's name": ([Q, R, "hydra.sweep.dir=x"], ["output_dir=NAME"]),
    "a typo in the objective": (
        [Q, R, "hydra.sweeper.objective=eval_los"],
        ["does not log 'eval_los'", "Did you mean eval_loss?"],
    ),
    "the former name of the loss": (
        [Q, R, "hydra.sweeper.objective=held_out_loss"],
        ["held_out_loss is called eval_loss now"],
    ),
    "the loss of a method without one": (
        ["recipe=tiny_grpo", R, "hydra.sweeper.objective=eval_loss"],
        ["grpo has no loss of held-out rows", "hydra.sweeper.objective=reward"],
    ),
    "an objective that nothing logs": (
        [Q, R, "hydra.sweeper.objective=happiness"],
        ["does not log 'happiness'"],
    ),
    "an objective without held-out rows": (
        [Q, R, "dataset.eval.path=null", "trainer.args.eval_strategy=no",
         "trainer.evaluation.metrics=[]"],
        ["eval_loss needs held-out rows", "dataset.eval.share=0.05"],
    ),
    "no objective": ([Q, R, "hydra.sweeper.objective=[]"], ["objective", "is empty"]),
    "a direction that is none": (
        [Q, R, "hydra.sweeper.objective={loss: down}"],
        ["objective", "{NAME: minimize"],
    ),
    "a way that nobody knows": (
        [Q, R, "hydra.sweeper.objective=[learning_rate]"],
        ["which way is learning_rate better?", "{learning_rate: maximize}"],
    ),
    "no such sampler": ([Q, R, OPTUNA, "hydra.sweeper.sampler=tpee"], ["Did you mean tpe?"]),
    "a typo in a sampler's setting": (
        [Q, R, OPTUNA, "hydra.sweeper.sampler={name: tpe, n_startup_trails: 3}"],
        ["Did you mean n_startup_trials?"],
    ),
    "a pruner for several objectives": (
        [Q, R, OPTUNA, "hydra.sweeper.pruner=median",
         "hydra.sweeper.objective=[eval_loss,exact_match]"],
        ["Optuna prunes by one objective"],
    ),
    "a pruner with nothing to see": (
        [Q, R, OPTUNA, "hydra.sweeper.pruner=median", "trainer.args.eval_strategy=no"],
        ["needs eval_loss while training", "eval_strategy=steps"],
    ),
    "a pruner for what is known at the end": (
        [Q, R, OPTUNA, "hydra.sweeper.pruner=median", "hydra.sweeper.objective=exact_match"],
        ["known only at the end", "prune_by=eval_loss"],
    ),
    "retrying with Optuna": (
        [Q, R, OPTUNA, "hydra.sweeper.retry_failed=true"],
        ["draws other points"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("words, parts", WRONG.values(), ids=WRONG)
def test_what_is_wrong(words, parts):
    with pytest.raises(UserError) as error:
        plan_sweep(words)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_grid():
    found = plan_sweep([Q, R, "trainer.args.learning_rate=1e-3,1e-4", "seed=7"])
    assert len(found.points) == 4
    assert found.folder.path.parts[:3] == ("runs", "quickstart", "sweeps")
    assert found.base.config.seed == 7
    assert [(one.name, one.direction) for one in found.objectives] == [("eval_loss", "minimize")]
    assert (
        plan_sweep([Q, R, "trainer.args.learning_rate=1e-3,1e-4", "seed=7"]).folder == found.folder
    )


def test_a_recipe_brings_its_search_space(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "searched.yaml").write_text(
        "# A search.\n"
        "defaults:\n  - quickstart\n  - override /hydra/sweeper: optuna\n"
        "hydra:\n  sweeper:\n    n_trials: 7\n    pruner: {name: median, n_warmup_steps: 50}\n"
        "    objective: {exact_match: maximize}\n    prune_by: eval_loss\n"
        "    params:\n      lora.r: [8, 16]\n"
        "      trainer.args.learning_rate: tag(log, interval(1e-5, 1e-3))\n"
    )
    found = plan_sweep(["recipe=searched"])
    assert [axis.name for axis in found.space.axes] == ["lora.r", "trainer.args.learning_rate"]
    assert (found.sweeper.kind, found.sweeper.n_trials) == ("optuna", 7)
    assert (found.watched.name, found.watched.opposite) == ("eval_loss", True)
    assert found.points is None
    assert "optuna" in found.folder.path.name


def test_a_sweeper_of_ones_own(tmp_path):
    (tmp_path / "conf/hydra/sweeper").mkdir(parents=True)
    text = "# Mine.\nkind: random\nn_trials: 5\nparams: {lora.r: 'int(interval(4,64))'}\n"
    (tmp_path / "conf/hydra/sweeper/mine.yaml").write_text(text)
    found = plan_sweep([Q, "hydra/sweeper=mine"])
    assert (found.sweeper.kind, len(found.points)) == ("random", 5)


def test_trials_are_grouped_in_wandb():
    found = plan_sweep([Q, R, "tracker=wandb", "output_dir=o"])
    from luthier.sweep.trials import Trial

    words = found.overrides(Trial(3, {"lora.r": "8"}))
    assert words == [
        Q, "tracker=wandb", "lora.r=8", "output_dir='o/trials/003'",
        "tracker.wandb.group='quickstart/o'",
    ]  # fmt: skip
    own = plan_sweep([Q, R, "tracker=wandb", "tracker.wandb.group=mine"])
    assert own.overrides(Trial(0, {}))[2] == "tracker.wandb.group=mine"
    assert sum("tracker.wandb.group" in word for word in own.overrides(Trial(0, {}))) == 1


def test_settings_of_a_sweep_need_a_sweep(capsys):
    from luthier.cli.train import main

    assert main(lambda loaded: 0, [Q, "hydra/sweeper=optuna"]) == 2
    assert "Add -m" in capsys.readouterr().err


def test_values_that_exclude_each_other_are_found_when_they_are_drawn_together():
    from luthier.sweep.controller import DatasetEncoding
    from luthier.sweep.trials import Trial

    planned = plan_sweep([Q, OPTUNA, "quantization=none,nf4", "lora=default,none", "output_dir=o"])
    encoding = DatasetEncoding(planned)
    encoding.refuse(Trial(0, {"quantization": "nf4", "lora": "default"}))
    with pytest.raises(UserError, match="quantization"):
        encoding.refuse(Trial(1, {"quantization": "nf4", "lora": "none"}))
