"""Damage of every file that luthier reads from a folder: an error that names it, or no difference.

Nothing ends in a traceback, which the commands here would raise, and nothing in silence.
"""

import json
import shutil

import pytest
import yaml

from helpers import damaged_files
from helpers.damaged_files import DAMAGES

READERS = {
    "run/run.json": ["show run", "diff other run"],
    "run/metrics.jsonl": ["diff other run"],
    "run/config.yaml": ["diff other run", "push run --to a/b --dry-run"],
    "run/model/adapter_config.json": ["merge run --out new", "generate run rows.jsonl -o new"],
    "run/model/adapter_model.safetensors": ["merge run --out new"],
    "run/model/chat.json": ["push run --to a/b --dry-run", "evaluate run"],
    "base/config.json": ["generate base rows.jsonl -o new", "merge run --out new"],
    "base/generation_config.json": ["generate base rows.jsonl -o new"],
    "base/model.safetensors": ["evaluate base", "merge run --out new"],
    "base/index/model.safetensors.index.json": ["generate base/index rows.jsonl -o new"],
    "sweep/sweep.json": ["sweep sweep"],
    "sweep/state/000.json": ["sweep sweep"],
    "sweep/state/001.json": ["sweep sweep"],
    "sweep/trials/001/run.json": ["sweep sweep"],
    "sweep/trials/001/metrics.jsonl": ["sweep sweep"],
}
"""Each file, and commands that read it; the undamaged ones of weights would load torch."""
COMPARED = ("show", "diff", "sweep")
"""Commands whose undamaged result is known here."""


UNFINISHED = {
    "sweep/trials/001/metrics.jsonl": ("cut in the middle", "empty", "blank", "NUL bytes"),
}
"""Files to which a run adds lines, and damages that a killed one leaves as well."""


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A run, another one, their base and a sweep, as luthier leaves them."""
    folder = tmp_path_factory.mktemp("material")
    damaged_files.make_base(folder / "base")
    damaged_files.make_run(folder / "run", "base")
    damaged_files.make_run(folder / "other", "base")
    damaged_files.make_sweep(folder / "sweep")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return folder


@pytest.fixture
def place(material, tmp_path, monkeypatch):
    """A copy of the material, in which the commands run."""
    folder = tmp_path / "place"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="session")
def undamaged():
    """The results of the commands on undamaged files, as they come to be known."""
    return {}


def check_damage(luthier, undamaged, place, file, command, damage):
    """Run the command before (once) and after the damage; an error must name the damaged file."""
    words = command.split()
    if file in UNFINISHED and damage in map(DAMAGES.get, UNFINISHED[file]):
        pytest.skip("a killed run leaves such a file, too")
    if words[0] in COMPARED and command not in undamaged:
        undamaged[command] = luthier(*words)
        assert undamaged[command][0] == 0, undamaged[command]
    damage(place / file)
    code, out, err = luthier(*words)
    if (code, out, err) == undamaged.get(command):
        return
    assert code == 2, (code, out, err)
    assert file in err, err
    assert "Traceback" not in err
    assert not (place / "new").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", READERS)
def test_a_damaged_file_is_named_or_makes_no_difference(luthier, undamaged, place, file, damage):
    commands = READERS[file]
    # Each damage with one of the commands in turn, so that all of them meet some.
    command = commands[list(DAMAGES).index(damage) % len(commands)]
    check_damage(luthier, undamaged, place, file, command, DAMAGES[damage])


def test_a_config_that_is_cut_behind_any_line_is_named(luthier, place):
    file = place / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) > 10
    for count in range(len(lines)):
        file.write_text("".join(lines[:count]))
        code, _, err = luthier(*READERS["run/config.yaml"][0].split())
        assert code == 2 and "run/config.yaml" in err, (count, err)


TYPED = {
    "run/run.json": damaged_files.run_record("base"),
    "run/config.yaml": {"trainer": {"args": {}, "evaluation": {}}, "model": {}, "chat": {}},
    "run/model/adapter_config.json": dict.fromkeys(
        ("base_model_name_or_path", "task_type", "peft_type", "r", "rank_pattern")
    ),
    "run/model/chat.json": damaged_files.CHAT,
    "base/config.json": {"architectures": ["LlamaForCausalLM"], "is_encoder_decoder": False},
    "base/generation_config.json": {"eos_token_id": [0]},
    "base/index/model.safetensors.index.json": {"weight_map": {}},
    "sweep/sweep.json": dict.fromkeys(("recipe", "words", "identity", "objectives", "total")),
    "sweep/state/000.json": dict.fromkeys(
        ("number", "params", "state", "values", "step", "seconds", "attempts", "error", "job")
    ),
}
"""The keys of each file whose types luthier relies on."""
WRONG = [(file, key) for file, keys in TYPED.items() for key, _ in damaged_files.wrong_values(keys)]


@pytest.mark.parametrize(("file", "key"), WRONG, ids=[f"{file}: {key}" for file, key in WRONG])
def test_a_key_of_another_type_is_named(luthier, place, file, key):
    path = place / file
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads
    changed = dict(damaged_files.wrong_values(read(path.read_text())))[key]
    changed.pop("seal", None)  # as somebody who means it would
    path.write_text(json.dumps(changed))
    code, out, err = luthier(*READERS[file][0].split())
    if (code, file) == (0, "run/run.json"):
        # Free entries, which are shown as they are.
        assert "wrong" in out or key.split(".")[0] in ("seeds", "data", "launch", "command", "cwd")
        return
    assert code == 2, (code, out, err)
    assert file in err
    assert key.split(".")[-1] in err, err


LINES = {
    "cut in the middle of the file": '{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n',
    "a line that is no JSON": '{"step": 0}\ngarbage\n{"step": 2}\n',
    "a step of text": '{"step": 0}\n{"step": "1"}\n',
    "no step": '{"loss": 1.0}\n',
    "a loss of text": '{"step": 0, "loss": "much"}\n',
    "a last line that is no JSON": '{"step": 0}\n{"step": 1,}\n',
}


@pytest.mark.parametrize("what", LINES)
def test_a_damaged_line_of_metrics_is_named_with_its_number(luthier, place, what):
    (place / "run" / "metrics.jsonl").write_text(LINES[what])
    number = next(n for n, line in enumerate(LINES[what].splitlines(), 1) if line != '{"step": 0}')
    code, _, err = luthier("diff", "other", "run")
    assert code == 2
    assert f"run/metrics.jsonl:{number}: " in err


def test_half_a_last_line_is_what_a_killed_run_leaves(luthier, place):
    before = luthier("sweep", "sweep")
    file = place / "sweep" / "trials" / "001" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert luthier("sweep", "sweep") == before


def test_a_finished_run_has_all_its_metrics(luthier, place):
    file = place / "run" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3}\n')
    code, _, err = luthier("diff", "other", "run")
    assert code == 2
    assert "run/metrics.jsonl: its content is not what the run left there" in err
    file.unlink()
    code, _, err = luthier("diff", "other", "run")
    assert code == 2
    assert "run/metrics.jsonl: it is missing" in err


def test_a_changed_number_of_a_record_is_no_result(luthier, place):
    file = place / "run" / "run.json"
    file.write_text(file.read_text().replace('"after": 1.0', '"after": 0.1'))
    code, _, err = luthier("show", "run")
    assert code == 2
    assert "run/run.json: its content is not what luthier wrote there" in err
    assert "remove the entry `seal`" in err


def test_a_run_that_only_says_that_it_is_finished_is_not(luthier, place):
    damaged_files.write_record(place / "run", {"format": 2, "status": "finished"})
    code, _, err = luthier("show", "run")
    assert code == 2
    assert "run/run.json: it says that the run is finished, and has no results" in err


def test_a_file_that_has_the_name_of_the_checkpoints_is_named(luthier, place):
    shutil.rmtree(place / "run" / "checkpoints")
    (place / "run" / "checkpoints").write_text("")
    code, _, err = luthier("show", "run")
    assert code == 2
    assert "run/checkpoints: it is no folder" in err
