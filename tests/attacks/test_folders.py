"""Folders of others, links, full and forbidden disks: nothing is lost, and all is said in words."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import yaml

from luthier.cli.train import main
from luthier.errors import UserError
from luthier.record import checkpoints
from luthier.record.run_dir import open_run, refuse_damaged_model
from luthier.storage.atomic import write_json
from luthier.storage.output_folder import (
    MARKER,
    check_target,
    output_folder,
    publish_folder,
    seal_model,
)
from luthier.storage.write_errors import explain_write_errors
from luthier.train.run import run as train

CONFIG = {
    "model": {"path": "m"}, "dataset": {"path": "d"}, "trainer": {"method": "sft"}, "seed": 1,
    "output_dir": "run",
}  # fmt: skip
PRECIOUS = "years of work"


def write(path, text=PRECIOUS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_model(folder, text="weights"):
    write(folder / "model.safetensors", text)
    write(folder / "config.json", "{}")
    seal_model(folder)
    write(folder / "README.md", "the card")
    return folder


def make_checkpoint(folder, step):
    written = folder / ".new" / f"checkpoint-{step}"
    write(written / "model.safetensors", f"weights of {step}")
    write(written / "trainer_state.json", "{}")
    facts = {"step": step, "planned": True, "resumable": True, "processes": 1}
    checkpoints.publish_checkpoint(written, folder / written.name, facts)


def make_run(folder, status="finished", has_marker=True):
    """What a run leaves, written by luthier's own functions; the trainer's files by hand."""
    with open_run(folder, CONFIG, ["seed=1"]):
        record = {
            "status": status, "format": 2, "versions": {"luthier": "0.1.0"}, "results": {},
            "seconds": 2.0, "training_seconds": 1.0, "peak_memory_gib": {"host": 0.5},
        }  # fmt: skip
        write_json(folder / "run.json", record)
        write(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
        write(folder / "before.json", "{}")
        write(folder / "loss.png", "a plot")
        write(folder / "code" / "0123456789ab.diff", "+1")
        write(folder / "tensorboard" / "events.out.tfevents.1.host.2.0", "events")
        make_checkpoint(folder / "checkpoints", 2)
        make_checkpoint(folder / "checkpoints", 4)
        make_model(folder / "model")
    if not has_marker:
        # As an earlier version left it: no marker, and no list of the model's files.
        (folder / MARKER).unlink()
        (folder / "model" / "manifest.json").unlink()
    return folder


def state_of(folder):
    """Everything in a folder: the text of each file, where each link leads."""
    state = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            state[name] = f"-> {path.readlink()}"
        elif path.is_file():
            state[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            state[name] = "empty"
    return state


# overwrite=true, against what else may lie in the folder of a run.

PLACES = (
    "notes.md", ".hidden", "data/rows.jsonl", "model/notes.txt", "model/own/adapter.txt",
    "checkpoints/notes.txt", "checkpoints/checkpoint-2/notes.txt", "checkpoints/checkpoint-7/w",
    "checkpoints/best/w", "code/main.py", "tensorboard/notes.txt", "merged/notes.txt",
    "wandb/run/log.txt", "config.yaml.bak", "run.json.old", ".notes.md.1.tmp",
)  # fmt: skip


def put_file(place, outside):
    write(place)


def put_link_to_file(place, outside):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / "precious.txt")


def put_link_to_folder(place, outside):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)


def put_dangling_link(place, outside):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / "nowhere")


INTRUDERS = (put_file, put_link_to_file, put_link_to_folder, put_dangling_link)


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    write(folder / "precious.txt")
    write(folder / "deep" / "config.yaml", "my: project")
    return folder


@pytest.mark.parametrize("has_marker", [True, False], ids=["marked", "of an earlier version"])
@pytest.mark.parametrize(
    ("put", "place"),
    list(product(INTRUDERS, PLACES)),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_overwriting_leaves_and_names_what_others_put_there(
    tmp_path, outside, put, place, has_marker
):
    folder = make_run(tmp_path / "run", has_marker=has_marker)
    put(folder / place, outside)
    foreign, kept = state_of(folder)[place], state_of(outside)
    with open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True) as run:
        assert run.state == "new"
        assert run.foreign == [place]
        assert checkpoints.find_newest_checkpoint(folder / "checkpoints").path is None
    left = state_of(folder)
    assert left.keys() == {MARKER, "config.yaml", "overrides.yaml", place}
    assert left[place] == foreign
    assert state_of(outside) == kept


OWN_FOLDERS = ("model", "checkpoints", "checkpoints/checkpoint-4", "code", "tensorboard")


@pytest.mark.parametrize("name", OWN_FOLDERS)
def test_overwriting_removes_nothing_behind_a_link(tmp_path, name):
    """A folder of the run lies on another disk, and a link stands in its place."""
    folder, scratch = make_run(tmp_path / "run"), tmp_path / "scratch"
    (folder / name).rename(scratch)
    (folder / name).symlink_to(scratch)
    before, there = state_of(folder), state_of(scratch)
    try:
        with open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True) as run:
            assert checkpoints.find_newest_checkpoint(folder / "checkpoints").path is None
            assert name in run.foreign
    except UserError as error:
        assert f"{folder / name} is a link to {scratch}" in str(error)
        assert state_of(folder) == before
    assert state_of(scratch) == there


def test_a_run_whose_folder_is_a_link_is_replaced_there(tmp_path):
    """The link was typed, so what is behind it is meant."""
    scratch = make_run(tmp_path / "scratch")
    write(scratch / "notes.md")
    (tmp_path / "run").symlink_to(scratch)
    with open_run(tmp_path / "run", CONFIG | {"seed": 2}, [], overwrite=True) as run:
        assert run.foreign == ["notes.md"]
    assert state_of(scratch).keys() == {MARKER, "config.yaml", "overrides.yaml", "notes.md"}
    assert (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "before.json", "loss.png"])
def test_a_link_in_the_place_of_a_file_goes_and_its_target_stays(tmp_path, outside, name):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    (folder / name).symlink_to(outside / "precious.txt")
    with open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True):
        pass
    assert not os.path.lexists(folder / name)
    assert (outside / "precious.txt").read_text() == PRECIOUS


HOSTILE = (
    "../outside/precious.txt",
    "/etc/hostname",
    "model/../../outside/precious.txt",
    "link/precious.txt",
)


@pytest.mark.parametrize("where", ["marker", "manifest"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_list_that_names_files_outside_reaches_none(tmp_path, outside, where, name):
    folder = make_run(tmp_path / "run")
    (folder / "link").symlink_to(outside)
    (folder / "model" / "link").symlink_to(outside)
    file = folder / (MARKER if where == "marker" else "model/manifest.json")
    content = json.loads(file.read_text())
    if where == "marker":
        content["written"] = {
            "files": [name],
            "folders": [name],
            "temporary": [name, str(Path(name).parent)],
        }
    else:
        content["files"] = {name: {"size": 1, "sha256": []}, f"../{name}": {}}
    file.write_text(json.dumps(content))
    kept = state_of(outside)
    # A list without the checkpoints leaves them, and then no new run begins.
    with suppress(UserError), open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True):
        pass
    assert state_of(outside) == kept
    assert Path("/etc/hostname").exists()


# An earlier run is gone only once the new one has begun.


@pytest.mark.parametrize("has_marker", [True, False], ids=["marked", "of an earlier version"])
def test_a_replaced_run_is_back_where_the_new_one_fails_before_its_first_step(tmp_path, has_marker):
    folder = make_run(tmp_path / "run", has_marker=has_marker)
    write(folder / "notes.md")
    before = state_of(folder)
    with (
        pytest.raises(UserError, match="no layer"),
        open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True),
    ):
        write_json(folder / "run.json", {"status": "running"})
        write(folder / "data.png")
        raise UserError("no layer is named nope")
    after = state_of(folder)
    after.pop(MARKER), before.pop(MARKER, None)
    assert after == before
    with open_run(folder, CONFIG, []) as run:
        assert run.state == "finished"


def replace_and_die(folder, fails_at, has_begun):
    """Replace a run in a process that is killed at one of its renames, or once all is done."""
    if process := os.fork():
        return os.waitpid(process, 0)[1]
    count, real = 0, os.replace

    def replace(*args, **kwargs):
        nonlocal count
        count += 1
        if count == fails_at:
            os._exit(9)
        return real(*args, **kwargs)

    os.replace = replace
    with open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True):
        write_json(folder / "run.json", {"status": "running", "format": 2})
        if has_begun:
            write_json(folder / "before.json", {"new": True})
        os._exit(0)


def test_a_replaced_run_survives_a_kill_at_any_moment_before_the_new_one_has_begun(tmp_path):
    original = make_run(tmp_path / "original")
    before = state_of(original)
    for fails_at in range(1, 100):
        folder = tmp_path / f"run-{fails_at}"
        shutil.copytree(original, folder)
        status = replace_and_die(folder, fails_at, has_begun=False)
        with open_run(folder, CONFIG, []) as run:
            assert run.state == "finished", fails_at
        after = state_of(folder)
        assert {name: after[name] for name in before if name != MARKER} == {
            name: before[name] for name in before if name != MARKER
        }, fails_at
        assert after.keys() == before.keys()
        if status == 0:
            break
    assert fails_at > 15
    replace_and_die(folder, 0, has_begun=True)
    with open_run(folder, CONFIG | {"seed": 2}, []) as run:
        assert run.state == "unfinished"
    assert state_of(folder).keys() == {
        MARKER, "config.yaml", "overrides.yaml", "run.json", "before.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model", "checkpoints"])
def test_a_run_without_its_first_measurement_is_not_lost_to_a_refusal(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / "before.json").unlink()
    (folder / name).rename(tmp_path / "scratch")
    (folder / name).symlink_to(tmp_path / "scratch")
    before = state_of(folder)
    with (
        pytest.raises(UserError, match="is a link to"),
        open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True),
    ):
        pass
    assert state_of(folder) == before


# Folders that are no run, though they have files of a run's names.

OTHERS = {
    "a config": {"config.yaml": "my: project"},
    "a config of keys like ours": {"config.yaml": "model: {a: 1}\ndataset: {}\ntrainer: {}"},
    "a resolved config beside a project": {"config.yaml": yaml.safe_dump(CONFIG)},
    "a list as config": {"config.yaml": "- 1"},
    "an empty config": {"config.yaml": ""},
    "a record": {"run.json": '{"status": "ok"}'},
    "a record with a status like ours": {"run.json": '{"status": "finished", "id": 4}'},
    "a record of other types": {"run.json": '{"status": "finished", "versions": ["luthier"]}'},
    "a number as record": {"run.json": "5"},
    "no JSON": {"run.json": "\0\1"},
    "a marker of others": {MARKER: '{"kind": "cache"}'},
    "an empty marker": {MARKER: ""},
    "no run at all": {"thesis.tex": PRECIOUS},
}  # fmt: skip


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path, what, overwrite):
    folder = tmp_path / "project"
    for name, text in OTHERS[what].items():
        write(folder / name, text)
    for name in ("code/main.py", "model/w", "checkpoints/checkpoint-1/w", "tensorboard/x"):
        write(folder / name)
    before = state_of(folder)
    with (
        pytest.raises(UserError, match="holds files that are no run of luthier"),
        open_run(folder, CONFIG, [], overwrite=overwrite),
    ):
        pass
    assert state_of(folder) == before


# Folders that cannot be made, locked or written.


def start(folder):
    """Begin a run as `luthier.train.run` does, up to its record."""
    with explain_write_errors(folder, "output_dir"), open_run(folder, CONFIG, ["seed=1"]):
        write_json(folder / "run.json", {"status": "running"})


CALLS = ("os.mkdir", "os.open", "io.open", "os.fsync", "os.pwrite", "os.replace", "os.truncate")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)


class Failing:
    """Counts the calls below a folder that write, and has one of them fail."""

    def __init__(self, monkeypatch, fails_at=None, number=0, names=CALLS):
        self.count, self.fails_at, self.number = 0, fails_at, number
        for name in names:
            monkeypatch.setattr(name, self.wrap(name))

    def wrap(self, name):
        module, _, function = name.partition(".")
        real = getattr(__import__(module), function)

        def call(*args, **kwargs):
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            # A folder that is there already is made without an error, whatever the system says.
            if name == "os.mkdir" and Path(args[0]).is_dir():
                return real(*args, **kwargs)
            if name == "io.open" and not set(str(mode)) & set("wxa+"):
                return real(*args, **kwargs)
            self.count += 1
            if self.count == self.fails_at:
                # A write and a sync do not say in which file they failed.
                names = () if name in ("os.fsync", "os.pwrite", "os.truncate") else (str(args[0]),)
                raise OSError(self.number, os.strerror(self.number), *names)
            return real(*args, **kwargs)

        return call


def count_calls(tmp_path, action):
    with pytest.MonkeyPatch.context() as patch:
        calls = Failing(patch)
        action(tmp_path / "counted")
    return calls.count


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_a_start_that_fails_at_any_call_ends_in_words_and_leaves_nothing(tmp_path, number):
    count = count_calls(tmp_path, start)
    assert count > 15
    for fails_at in range(1, count + 1):
        folder = tmp_path / f"parent-{fails_at}" / "run"
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, fails_at, number)
            with pytest.raises(UserError) as error:
                start(folder)
        text = str(error.value)
        assert str(folder) in text or str(folder.parent) in text, (fails_at, text)
        assert os.strerror(number) in text and "output_dir" in text
        assert not folder.parent.exists(), (fails_at, list(folder.parent.rglob("*")))
        start(folder)
        assert (folder / "run.json").is_file()


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_an_output_folder_that_fails_at_any_call_leaves_nothing(tmp_path, number):
    def merge(target):
        with output_folder(target) as aside:
            write_json(aside / "chat.json", {})
            (aside / "model.safetensors").write_bytes(b"w")

    count = count_calls(tmp_path, merge)
    assert count > 5
    for fails_at in range(1, count + 1):
        target = tmp_path / f"parent-{fails_at}" / "merged"
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, fails_at, number)
            with pytest.raises(UserError, match="--out"):
                merge(target)
        assert not target.parent.exists(), (fails_at, list(target.parent.rglob("*")))
        merge(target)
        assert (target / "manifest.json").is_file()


def settings(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"a {n}", "completion": "b"}) for n in range(4)]
    rows.write_text("\n".join(lines))
    base = tmp_path / "base"
    write(base / "config.json", '{"model_type": "llama"}')
    words = ["dataset=jsonl", f"dataset.path={rows}", "dataset.eval.share=0.25"]
    return ["model=hub", f"model.path={base}", *words]


def a_file(path):
    write(path)


def below_a_file(path):
    write(path.parent)


def a_dangling_link(path):
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


def links_in_a_circle(path):
    path.parent.mkdir(parents=True)
    path.symlink_to(path)


def below_links_in_a_circle(path):
    path.parent.symlink_to(path.parent)


def lock_is_folder(path):
    (path / ".lock").mkdir(parents=True)


def lock_is_link(path):
    write(path.parent / "precious.txt")
    path.mkdir()
    (path / ".lock").symlink_to(path.parent / "precious.txt")


def lock_is_pipe(path):
    path.mkdir(parents=True)
    os.mkfifo(path / ".lock")


def lock_of_others(path):
    write(path / ".lock", "the lock file of my package manager")


def config_is_folder(path):
    make_run(path, status="failed")
    (path / "config.yaml").unlink()
    (path / "config.yaml").mkdir()


PLACED = (
    a_file, below_a_file, a_dangling_link, links_in_a_circle, below_links_in_a_circle,
    lock_is_folder, lock_is_link, lock_is_pipe, lock_of_others, config_is_folder,
)  # fmt: skip


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("placed", PLACED, ids=lambda function: function.__name__)
def test_what_stands_in_the_way_of_a_run_is_named_and_untouched(
    tmp_path, capsys, placed, overwrite
):
    folder = tmp_path / "parent" / "run"
    words = [*settings(tmp_path), f"output_dir={folder}", f"overwrite={overwrite}"]
    placed(folder)
    before = state_of(tmp_path) | {"": sorted(tmp_path.rglob("*"))}
    assert main(train, words) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and "output_dir" in text, text
    assert str(folder) in text or str(folder.parent) in text
    if placed is not config_is_folder or overwrite == "false":
        assert state_of(tmp_path) | {"": sorted(tmp_path.rglob("*"))} == before


NAMES = {"too long": "n" * 300, "too long in all": "/".join(["d" * 200] * 30)}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_too_long_is_said(tmp_path, capsys, name):
    words = [*settings(tmp_path), f"output_dir={tmp_path / 'new' / NAMES[name]}"]
    assert main(train, words) == 2
    text = capsys.readouterr().err
    assert "output_dir" in text and "too long" in text and "Traceback" not in text
    assert not (tmp_path / "new").exists()


def test_a_folder_that_the_system_forbids(tmp_path, capsys):
    assert main(train, [*settings(tmp_path), "output_dir=/proc/luthier/run"]) == 2
    text = capsys.readouterr().err
    assert "output_dir" in text and "cannot be written" in text and "Traceback" not in text


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk with these options; None unmounts it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if (
            os.geteuid() != 0
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("no disk can be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)


def test_a_full_disk_at_the_very_start(tmp_path, disk, capsys):
    place = disk("size=64k")
    (place / "filler").write_bytes(b"x" * 65536)
    folder = place / "run"
    assert main(train, [*settings(tmp_path), f"output_dir={folder}"]) == 2
    text = capsys.readouterr().err
    assert "the disk is full" in text and str(place) in text and "Traceback" not in text
    assert [path.name for path in place.iterdir()] == ["filler"]
    (place / "filler").unlink()
    start(folder)


def test_a_disk_without_room_for_another_file(tmp_path, disk, capsys):
    place = disk("size=1m,nr_inodes=2")
    assert main(train, [*settings(tmp_path), f"output_dir={place / 'run'}"]) == 2
    text = capsys.readouterr().err
    assert "the disk is full" in text and "Traceback" not in text
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("has_run", [True, False])
def test_a_disk_that_is_read_only(tmp_path, disk, capsys, has_run):
    place = disk("size=1m")
    if has_run:
        make_run(place / "run", status="failed")
    disk("remount,ro")
    before = state_of(place)
    for overwrite in ("true", "false"):
        words = [*settings(tmp_path), f"output_dir={place / 'run'}", f"overwrite={overwrite}"]
        assert main(train, words) == 2
        text = capsys.readouterr().err
        assert "read-only" in text and str(place / "run") in text and "Traceback" not in text
    assert state_of(place) == before


def test_every_file_that_a_command_writes_is_named_where_it_cannot_be(tmp_path, disk, luthier):
    words = settings(tmp_path)
    place = disk("size=1m,ro")
    rows = tmp_path / "rows.jsonl"
    tokenizer = ["model=smollm2_135m"] if os.environ.get("LUTHIER_ASSETS") else None
    cases = [["evaluate", tmp_path / "base", "-o", place / "report.json"]]
    if tokenizer is None:
        pytest.skip("LUTHIER_ASSETS names no folder")
    cases.append(["preview", *tokenizer, *words[2:], "--html", place / "page.html"])
    cases.append(["check", *tokenizer, *words[2:], "--png", place / "plot.png"])
    cases.append(["generate", tmp_path / "base", rows, "-o", place / "replies.jsonl"])
    cases.append(["train", "-m", *words, "seed=1,2", f"output_dir={place / 'sweep'}"])
    for case in cases:
        code, _, text = luthier(*case)
        assert code == 2, (case, text)
        assert str(place) in text and "read-only" in text and "Traceback" not in text, text
    assert rows.is_file()


# A folder that takes the place of another.


@pytest.mark.parametrize(
    "place", ["notes.txt", "own/adapter.txt", "model.safetensors.bak", "new.txt"]
)
@pytest.mark.parametrize("put", INTRUDERS, ids=lambda function: function.__name__)
def test_a_published_model_keeps_the_files_of_others(tmp_path, outside, put, place):
    make_model(tmp_path / "model", "old")
    put(tmp_path / "model" / place, outside)
    foreign, kept = state_of(tmp_path / "model")[place], state_of(outside)
    write(tmp_path / "new" / "new.txt", "new")
    publish_folder(make_model(tmp_path / "new", "new"), tmp_path / "model")
    state = state_of(tmp_path / "model")
    assert state["model.safetensors"] == b"new"
    assert state["new.txt.old" if place == "new.txt" else place] == foreign
    assert state_of(outside) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outside"]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_publishing_that_is_killed_loses_no_file(tmp_path, fails_at):
    """Wherever a rename is the last thing that happened, the next publishing mends it."""
    write(make_model(tmp_path / "model", "old") / "notes.txt")
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, fails_at, errno.EIO, ("os.replace",))
        with pytest.raises(OSError, match="Input/output"):
            publish_folder(make_model(tmp_path / "new", "new"), tmp_path / "model")
    publish_folder(make_model(tmp_path / "newer", "newer"), tmp_path / "model")
    state = state_of(tmp_path / "model")
    assert state["model.safetensors"] == b"newer"
    assert state["notes.txt"] == PRECIOUS.encode()


def test_checkpoints_of_others_are_not_pruned(tmp_path, outside):
    stored = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        make_checkpoint(stored, step)
    write(stored / "checkpoint-1" / "w")
    (stored / "checkpoint-3").symlink_to(outside)
    write(stored / "checkpoint-5")
    write(stored / "checkpoint-2" / "notes.txt")
    kept = state_of(outside)
    limits = checkpoints.CheckpointLimits(max_count=1)
    checkpoints.prune_checkpoints(stored, 6, None, limits)
    state = state_of(stored)
    assert state_of(outside) == kept
    assert set(state) - {name for name in state if name.startswith("checkpoint-6/")} == {
        "checkpoint-1/w", "checkpoint-2/notes.txt", "checkpoint-3", "checkpoint-5",
    }  # fmt: skip
    # What stands in the way of the next one makes room and stays.
    make_checkpoint(stored, 5)
    assert (stored / "checkpoint-5.old").read_text() == PRECIOUS


# Where a merged model may go.


@pytest.fixture
def adapter_run(tmp_path):
    """The run of an adapter, without weights: a merge is refused before it reads any."""
    base = tmp_path / "models" / "base"
    write(base / "config.json", '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    run = tmp_path / "runs" / "tuned"
    config = {"model": {"path": str(base)}, "dataset": {"path": "d"}, "output_dir": str(run)}
    write(run / "config.yaml", yaml.safe_dump(config))
    write(run / "run.json", '{"status": "finished", "versions": {"luthier": "0.1.0"}}')
    for folder in (run / "model", run / "checkpoints" / "checkpoint-2"):
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
        write(folder / "adapter_config.json", json.dumps(adapter))
        # No tensors: a header of two bytes.
        (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return run


TARGETS = (
    "runs", "runs/tuned", "runs/tuned/model", "runs/tuned/model/deep", "runs/tuned/checkpoints",
    "runs/tuned/checkpoints/checkpoint-2", "runs/tuned/checkpoints/merged", "runs/tuned/code",
    "runs/tuned/own", "models", "models/base", "models/base/merged", ".", "..",
    "runs/tuned/model/../model", "link-to-model", "link-to-run/model",
)  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--quantize", "nf4")], ids=["merge", "quantize"])
@pytest.mark.parametrize("name", ["run", "adapter", "checkpoint"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_merge_into_what_it_is_made_of_is_refused(
    tmp_path, adapter_run, luthier, target, name, more
):
    (tmp_path / "link-to-model").symlink_to(adapter_run / "model")
    (tmp_path / "link-to-run").symlink_to(adapter_run)
    source = {
        "run": adapter_run, "adapter": adapter_run / "model",
        "checkpoint": adapter_run / "checkpoints" / "checkpoint-2",
    }[name]  # fmt: skip
    before = state_of(tmp_path)
    code, _, text = luthier("merge", source, "--out", tmp_path / target, "--overwrite", *more)
    assert code == 2 and "--out" in text and "Traceback" not in text, text
    assert state_of(tmp_path) == before


FULL = {
    "other things": {"precious.txt": PRECIOUS},
    "a model of others": {"config.json": "{}", "model.safetensors": PRECIOUS},
    "a card of others": {"card.json": '{"base": "x"}', "config.json": "{}"},
    "a run": {"config.yaml": "a: 1", "run.json": "{}"},
    "a manifest of others": {"manifest.json": '{"files": {"precious.txt": {}}, "made": {}}'},
    "a damaged manifest": {"manifest.json": "{", "config.json": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("what", FULL)
def test_a_folder_that_holds_no_model_of_luthier_is_not_replaced(tmp_path, what):
    for name, text in FULL[what].items():
        write(tmp_path / "out" / name, text)
    for overwrite, message in ((True, "holds other things"), (False, "is not empty")):
        with pytest.raises(UserError, match=message):
            check_target(tmp_path / "out", overwrite)


# A finished run whose model is not what it was.


def remove_folder(model):
    shutil.rmtree(model)


def remove_weights(model):
    (model / "model.safetensors").unlink()


def cut_weights(model):
    (model / "model.safetensors").write_text("weigh")


def empty_weights(model):
    (model / "model.safetensors").write_text("")


def flip_weights(model):
    (model / "model.safetensors").write_text("Weights")


def replace_by_folder(model):
    remove_weights(model)
    (model / "model.safetensors").mkdir()


def dangling_weights(model):
    remove_weights(model)
    (model / "model.safetensors").symlink_to("nowhere")


def file_for_folder(model):
    shutil.rmtree(model)
    model.write_text("")


def cut_manifest(model):
    text = (model / "manifest.json").read_text()
    (model / "manifest.json").write_text(text[: len(text) // 2])


def remove_config(model):
    (model / "config.json").unlink()


DAMAGES = (
    remove_folder, remove_weights, cut_weights, empty_weights, flip_weights, replace_by_folder,
    dangling_weights, file_for_folder, cut_manifest, remove_config,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_a_finished_run_without_its_model_says_so(tmp_path, damage):
    folder = make_run(tmp_path / "run")
    refuse_damaged_model(folder)
    damage(folder / "model")
    with pytest.raises(UserError) as error:
        refuse_damaged_model(folder)
    text = str(error.value)
    assert str(folder / "model") in text and "overwrite=true" in text
    assert str(folder / "checkpoints" / "checkpoint-4") in text


def test_a_card_that_is_written_anew_is_no_damage(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("README.md", "EXPORT.md", "card.json", "loss.png", "notes.txt"):
        write(folder / "model" / name, "another")
    refuse_damaged_model(folder)


# A start that ends before its first step leaves no folder.


@pytest.mark.parametrize("error", [UserError, RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("is_there", [True, False], ids=["in an empty folder", "in a new one"])
def test_a_start_that_ends_leaves_no_folder(tmp_path, error, is_there):
    folder = tmp_path / "runs" / "recipe" / "run"
    if is_there:
        folder.mkdir(parents=True)
    with pytest.raises(error), open_run(folder, CONFIG, []):
        write_json(folder / "run.json", {"status": "running"})
        write(folder / "data.png")
        (folder / "checkpoints").mkdir()
        raise error("no")
    assert folder.exists() == is_there
    assert not is_there or list(folder.iterdir()) == []
    assert (tmp_path / "runs").exists() == is_there


@pytest.mark.parametrize("name", ["before.json", "checkpoints/checkpoint-2/w"])
def test_a_run_that_has_measured_or_stepped_keeps_its_folder(tmp_path, name):
    folder = make_run(tmp_path / "run", status="running")
    with pytest.raises(UserError), open_run(folder, CONFIG, []):
        raise UserError("no")
    assert (folder / name).exists() or name != "before.json"
    assert (folder / "model").is_dir()


def test_a_failed_start_removes_the_trackers_files_that_it_made(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError), open_run(folder, CONFIG, []):
        write(folder / "wandb" / "log.txt")
        (folder / "wandb" / "latest-run").symlink_to(tmp_path)
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_beside_other_files_can_be_repeated(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, CONFIG, []):
        write(folder / "wandb" / "log.txt")
    with pytest.raises(UserError), open_run(folder, CONFIG, [], overwrite=True):
        write(folder / "wandb" / "more.txt")
        write(folder / "notes.txt")
        raise UserError("no")
    there = {MARKER, "config.yaml", "overrides.yaml", "wandb/log.txt", "wandb/more.txt"}
    assert state_of(folder).keys() == {*there, "notes.txt"}
    with open_run(folder, CONFIG | {"seed": 2}, [], overwrite=True) as run:
        assert run.state == "new"
        assert set(run.foreign) == {"wandb/log.txt", "wandb/more.txt", "notes.txt"}
