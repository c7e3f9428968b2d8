"""Folders of `save_to_disk`: with and without splits, in the order of the rows, errors in words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.data.rows import Row
from luthier.errors import UserError

ROWS = [
    {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "assistant", "tool_calls": '[{"a": null}]'}], "n": 1},
]
COLUMNS = {"messages": [row["messages"] for row in ROWS], "n": [None, 1]}


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """What the real library leaves, as users have it."""
    from datasets import Dataset, DatasetDict, Features, Json, disable_progress_bars

    disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    one = Dataset.from_dict(COLUMNS)
    one.save_to_disk(folder / "one")
    one.select([1, 0, 1]).save_to_disk(folder / "shards", num_shards=2)
    DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(folder / "splits")
    calls = [{"arguments": {"a": None, "b": [{"c": 1}, {"d": None}]}}]
    Dataset.from_dict({"calls": [calls]}, features=Features({"calls": Json()})).save_to_disk(
        folder / "json"
    )
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "rows", "first"),
    [
        ("one", {}, ROWS, "one/data-00000-of-00001.arrow row 0"),
        ("one/", {"format": "saved"}, ROWS, "one/data-00000-of-00001.arrow row 0"),
        ("shards", {}, [ROWS[1], ROWS[0], ROWS[1]], "shards/data-00000-of-00002.arrow row 0"),
        ("splits", {}, ROWS, "splits/train/data-00000-of-00001.arrow row 0"),
        ("splits", {"split": "test"}, ROWS[1:], "splits/test/data-00000-of-00001.arrow row 0"),
        ("splits/test", {}, ROWS[1:], "splits/test/data-00000-of-00001.arrow row 0"),
    ],
    ids=["one", "named", "shards", "train", "test", "split-by-folder"],
)
def test_its_rows_are_read_in_order(saved, opened, monkeypatch, name, settings, rows, first):
    monkeypatch.chdir(saved)
    source = opened(name, **settings)
    found = list(source.rows())
    assert [row.fields for row in found] == rows
    assert found[0] == Row(rows[0], first)
    assert source.size == len(rows)


def test_columns_of_json_keep_their_nulls(saved, fields):
    calls = [{"arguments": {"a": None, "b": [{"c": 1}, {"d": None}]}}]
    assert fields(str(saved / "json")) == [{"calls": calls}]


def test_it_takes_no_import_of_datasets(saved):
    code = (
        "import sys; from luthier.config.schema import SourceConfig\n"
        "from luthier.data.sources import open_source\n"
        "assert len(list(open_source(SourceConfig(path=sys.argv[1])).rows())) == 2\n"
        "print({'datasets', 'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved / "one")], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "splits",
            {"split": "dev"},
            r"has no split 'dev'\. It has: train, test\. Set dataset\.split",
        ),
        ("one", {"split": "test"}, r"dataset\.split=test: .* was saved as one dataset without"),
        ("one", {"revision": "v1"}, r"dataset\.revision=v1 is for hub datasets"),
        ("one", {"options": {"by": "line"}}, "saved has no options"),
        ("none", {"format": "saved"}, "is not a folder of a saved dataset"),
        ("broken", {}, r"whose state\.json cannot be read"),
        ("lost", {}, r"there is no file .*lost/data-00000-of-00001\.arrow"),
    ],
    ids=["split", "split-of-one", "revision", "options", "no-folder", "broken", "lost-file"],
)
def test_mistakes_in_words(saved, read, tmp_path, name, settings, words):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    (tmp_path / "lost").mkdir()
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "lost" / "state.json").write_text(json.dumps(state))
    folder = tmp_path if Path(name).exists() else saved
    with pytest.raises(UserError, match=words):
        read(str(folder / name), **settings)


def test_equal_data_has_one_hash_wherever_it_lies(saved, opened, tmp_path):
    import shutil

    shutil.copytree(saved / "one", tmp_path / "copy")
    assert opened("copy").digest() == opened(str(saved / "one")).digest()
    assert opened("copy").settings() == opened(str(saved / "one")).settings()
    assert opened("copy").digest() != opened(str(saved / "shards")).digest()


def test_numbers_of_classes_become_their_names(tmp_path, fields):
    from datasets import ClassLabel, Dataset, Features, List, Value

    tags = ClassLabel(names=["O", "B-PER"])
    kinds = {"words": List(Value("string")), "tags": List(tags), "label": tags, "n": Value("int64")}
    rows = [
        {"words": ["Anna", "plays"], "tags": [1, 0], "label": 1, "n": 1},
        {"words": [], "tags": [], "label": -1, "n": 0},
    ]
    made = Dataset.from_list(rows, features=Features(kinds))
    made.save_to_disk(tmp_path / "folder")
    made.to_parquet(tmp_path / "rows.parquet")
    named = [
        {"words": ["Anna", "plays"], "tags": ["B-PER", "O"], "label": "B-PER", "n": 1},
        {"words": [], "tags": [], "label": -1, "n": 0},
    ]
    assert fields(str(tmp_path / "folder")) == named
    assert fields(str(tmp_path / "rows.parquet")) == named
