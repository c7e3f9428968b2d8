"""Folders that are made once; only light imports, as other processes repeat them."""

import multiprocessing
from pathlib import Path

import pytest

from luthier.errors import UserError
from luthier.storage import cache


def _count_a_making(folder: str, log: str) -> None:
    def make(new: Path) -> None:
        with Path(log).open("a") as stream:
            stream.write("made\n")
        (new / "file").write_text("content")

    cache.make_once(Path(folder), make)


def test_of_several_processes_one_makes_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "deep" / "folder"), str(tmp_path / "log"))
    processes = [context.Process(target=_count_a_making, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_failed_making_leaves_nothing(tmp_path):
    def fail(new: Path) -> None:
        (new / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        cache.make_once(tmp_path / "folder", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.lock"]
