"""The facts of a run are those of the machine and the checkout."""

import subprocess

from luthier.record import machine_info


def git(folder, *words):
    subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True)


def test_git_state_names_the_changed_files(tmp_path):
    git(tmp_path, "init", "-q")
    for name in ("conf.yaml", "train.py"):
        (tmp_path / name).write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    assert machine_info.git_state(tmp_path)["dirty"] is False
    (tmp_path / "conf.yaml").write_text("b")
    state = machine_info.git_state(tmp_path)
    assert state["changed_files"] == ["conf.yaml"]
    assert len(state["commit"]) == 40


def test_outside_git_there_is_no_state(tmp_path):
    assert machine_info.git_state(tmp_path) is None


def test_versions_are_of_what_is_installed():
    found = machine_info.package_versions()
    assert {"python", "torch", "transformers", "trl"} <= set(found)
