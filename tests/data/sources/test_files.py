"""What a path means: files, globs, folders, lists; and what is said where it means nothing."""

import os
from pathlib import Path

import pytest

from luthier.data.rows import BadRow
from luthier.data.sources.files import is_local
from luthier.errors import UserError

LINE = '{"a": 1}\n'


@pytest.fixture
def tree(write):
    names = ["data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl", "data/.hidden.jsonl",
             "data/_SUCCESS", "data/README.md", "data/LICENSE.txt", "data/10.jsonl.gz"]  # fmt: skip
    for name in names:
        write(name, LINE)


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("data/a.jsonl", ["data/a.jsonl"]),
        ("data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/**/*.jsonl", ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]),
        ("data/[ab].jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/?.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("data", ["data/10.jsonl.gz", "data/a.jsonl", "data/b.jsonl"]),
        ("data/", ["data/10.jsonl.gz", "data/a.jsonl", "data/b.jsonl"]),
        (["data/b.jsonl", "data/a.jsonl"], ["data/b.jsonl", "data/a.jsonl"]),
        (["data/deep", "data/a.*"], ["data/deep/c.jsonl", "data/a.jsonl"]),
    ],
    ids=["file", "glob", "deep-glob", "choice", "question", "folder", "slash", "list", "mixed"],
)
def test_files_stand_in_a_fixed_order(tree, opened, path, files):
    source = opened(path)
    assert source.files == tuple(files)
    assert [row.where for row in source.rows()] == [f"{name}:1" for name in files]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("data/a.jsonl", "data/a.jsonl"),
        ("data/*.jsonl", "data/*.jsonl (2 files)"),
        (["data/a.jsonl", "data/b.jsonl"], "data/a.jsonl, ... (2 files)"),
    ],
    ids=["file", "glob", "list"],
)
def test_labels(tree, opened, path, label):
    assert opened(path).label == label


def test_home_and_file_addresses(tree, fields, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fields("~/data/a.jsonl") == [{"a": 1}]
    assert len(fields("~/data/*.jsonl")) == 2
    assert fields(f"file://{tmp_path}/data/a.jsonl") == [{"a": 1}]


def test_a_file_may_have_the_name_of_a_glob(write, fields):
    assert fields(write("a[1].jsonl", LINE)) == [{"a": 1}]


def test_a_list_may_mix_formats(write, opened):
    source = opened([write("a.jsonl", LINE), write("b.csv", "a\n2\n"), write("c.txt", "3\n")])
    assert [row.fields for row in source.rows()] == [{"a": 1}, {"a": "2"}, {"text": "3"}]
    assert source.settings()["format"] == ["jsonl", "csv", "text"]


def test_text_is_data_where_nothing_else_is(write, opened):
    for name in ("books/b.txt", "books/a.md", "books/README.md"):
        write(name, "x")
    assert opened("books").files == ("books/a.md", "books/b.txt")


def test_the_format_chooses_among_the_files_of_a_folder(write, opened):
    for name in ("mixed/a.csv", "mixed/b.json", "mixed/c.csv", "plain/part-0", "plain/part-1"):
        write(name, "a\n1\n")
    assert opened("mixed", format="csv").files == ("mixed/a.csv", "mixed/c.csv")
    assert opened("plain", format="text").files == ("plain/part-0", "plain/part-1")


def test_an_empty_file_among_others_is_a_bad_row(write, read):
    for name, content in (("1.jsonl", LINE), ("2.jsonl", ""), ("3.csv", ""), ("4.jsonl", LINE)):
        write(name, content)
    found = read(["1.jsonl", "2.jsonl", "3.csv", "4.jsonl"])
    assert found[1:3] == [
        BadRow("2.jsonl", "the file is empty: it has no rows", ""),
        BadRow("3.csv", "the file is empty: it has no rows", ""),
    ]
    assert [entry.where for entry in found] == ["1.jsonl:1", "2.jsonl", "3.csv", "4.jsonl:1"]


@pytest.mark.parametrize(
    ("path", "settings", "parts"),
    [
        ("trian.jsonl", {}, ["no file trian.jsonl (looked at /", "In that folder: train.jsonl."]),
        ("nowhere/a.jsonl", {}, ["nowhere is missing too; relative paths start at /"]),
        ("empty/a.jsonl", {}, ["There are no data files (.jsonl, .ndjson"]),
        ("*.josnl", {}, ["no file matches *.josnl", "In that folder: train.jsonl"]),
        ("nowhere/**/*.jsonl", {}, ["no file matches", "There is no folder /"]),
        ("empty", {}, ["empty holds no data files", "empty/**/*.jsonl"]),
        ("above", {}, ["above holds no data files"]),
        ("mixed", {}, ["mixed holds files of several formats (1 csv, 1 json)", "Set format to"]),
        ("mixed", {"format": "parquet"}, ["mixed holds no parquet files"]),
        ("splits", {}, ["several splits by their names, such as splits/train.jsonl and splits/te"]),
        ("splits", {"format": "jsonl"}, ["several splits"]),
        ("./what.bin", {}, ["./what.bin has none of the suffixes .jsonl", "dataset.format=jsonl."]),
        ("mixed/*", {}, ["mixed/c.bin has none of the suffixes"]),
        (["train.jsonl", "train.jsonl"], {}, ["train.jsonl is listed twice", "set repeats"]),
        (["*.jsonl", "./train.jsonl"], {}, ["./train.jsonl is listed twice", "also as train"]),
        (["train.jsonl", "owner/name"], {}, ["there is no file owner/name"]),
        ([], {}, ["dataset.path is not set"]),
        (None, {}, ["dataset.path is not set"]),
        ("train.jsonl", {"name": "main"}, ["dataset.name=main is for hub datasets, and train.js"]),
        ("train.jsonl", {"revision": "v1"}, ["Remove dataset.revision."]),
        ("train.jsonl", {"split": "test"}, ["dataset.split=test is for hub datasets"]),
        ("train.jsonl", {"options": {"by": 1}}, ["dataset.options.by: jsonl has no such option"]),
        ("train.jsonl", {"options": {"storage": 3}}, ["dataset.options.storage=3 is not a map"]),
        (["a", "b"], {"format": "hub"}, ["dataset.format=hub takes one path"]),
    ],
    ids=[
        "file", "folder-of-file", "nothing-beside", "glob", "folder-of-glob", "empty-folder",
        "folders-alone", "formats", "no-such-format", "splits", "splits-of-a-format", "suffix",
        "suffix-in-glob", "twice", "twice-by-glob", "hub-in-list", "no-paths", "no-path", "name",
        "revision", "split", "option", "storage", "list-of-hub",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_in_words(write, opened, tmp_path, path, settings, parts):
    for name in ("train.jsonl", "mixed/a.csv", "mixed/b.json", "mixed/c.bin", "above/deep/a.jsonl",
                 "splits/train.jsonl", "splits/test.jsonl", "what.bin"):  # fmt: skip
        write(name, LINE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        opened(path, **settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "names",
    [("train-0.jsonl", "train-1.jsonl"), ("contest.jsonl", "trainee.jsonl", "latest.jsonl"),
     ("test-0.jsonl", "test-1.jsonl")],
    ids=["one-split", "other-words", "held-out-alone"],
)  # fmt: skip
def test_names_of_one_split_are_no_matter(write, opened, names):
    for name in names:
        write(f"data/{name}", LINE)
    assert len(opened("data").files) == len(names)


def test_the_key_of_the_source_stands_in_errors(write, opened):
    from luthier.config.schema import SourceConfig
    from luthier.data.sources import open_source

    with pytest.raises(UserError, match=r"dataset\.sources\.mine\.split=test is for hub"):
        open_source(SourceConfig(path=write("a.jsonl", LINE), split="test"), "dataset.sources.mine")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_says_why(write, read):
    name = write("a.jsonl", LINE)
    Path(name).chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
        read(name)


def test_a_pipe_is_refused(opened):
    os.mkfifo("a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl is a pipe, not a file"):
        opened("a.jsonl")


def test_a_file_that_goes_away_is_missed(write, opened):
    source = opened(write("a.jsonl", LINE))
    Path("a.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no file a\.jsonl"):
        list(source.rows())


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("a.jsonl", True),
        ("owner/a.json", True),
        ("./a", True),
        ("../a", True),
        ("/a", True),
        ("~/a", True),
        ("a.csv", True),
        ("a.jsonl.zst", True),
        ("owner/*", True),
        ("here", True),
        ("trl-lib/Capybara", False),
        ("gsm8k", False),
        ("owner/name.v2", False),
    ],
)
def test_local_or_hub(tmp_path, path, local):
    (tmp_path / "here").mkdir()
    assert is_local(path) is local
