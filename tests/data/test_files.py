"""Local files: what is read, and what every mistake says."""

import json
import os
from pathlib import Path

import pytest

from luthier.data.files import is_local, read_file
from luthier.errors import UserError

ROW = {"prompt": "Hi", "completion": "Hello"}
GOOD = json.dumps(ROW)


def places(rows):
    return [row.where for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f"{GOOD}\n{GOOD}\n", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", f"{GOOD}\r\n\r\n{GOOD}", ["a.jsonl:1", "a.jsonl:3"]),
        ("a.json", f"[{GOOD}, {GOOD}]", ["a.json:1", "a.json:1"]),
        ("a.json", f"\n[\n  {GOOD},\n\n  {GOOD}\n]\n", ["a.json:3", "a.json:5"]),
        ("a.json", json.dumps([ROW, ROW], indent=2), ["a.json:2", "a.json:6"]),
        ("a.json", f"{GOOD}\n{GOOD}\n", ["a.json:1", "a.json:2"]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), ["a.jsonl:1"]),
        ("a.json", b"\xef\xbb\xbf[" + GOOD.encode() + b"]", ["a.json:1"]),
    ],
    ids=[
        "lines",
        "blank-lines",
        "array",
        "spread-array",
        "indented",
        "lines-in-json",
        "bom",
        "bom2",
    ],
)
def test_rows_and_their_lines(write, name, content, where):
    rows = read_file(write(name, content))
    assert [row.fields for row in rows] == [ROW] * len(where)
    assert places(rows) == where


def test_a_line_separator_in_a_text_ends_no_line(write):
    row = {"prompt": "a\u2028b\u0085c", "completion": "d"}
    rows = read_file(write("a.jsonl", json.dumps(row, ensure_ascii=False)))
    assert rows[0].fields == row


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "a.jsonl",
            f"{GOOD}\n{{'a': 1}}\n",
            [
                "a.jsonl has 1 bad row:",
                "a.jsonl:2: this is not JSON",
                "(column 2)",
                "{'a': 1}",
                "Each row is to be one JSON object",
            ],
        ),
        (
            "a.jsonl",
            f'{GOOD}\n[1, 2]\n"x"\n3\nnull\ntrue',
            [
                "has 5 bad rows",
                "a.jsonl:2: this is a list, not",
                "a.jsonl:3: this is text,",
                "a.jsonl:4: this is a number,",
                ":5: this is null",
                "true or false",
            ],
        ),
        ("a.jsonl", "x" * 500, ["x" * 117 + "...\n"]),
        ("a.jsonl", "{\n" * 9, ["has 9 bad rows", "... and 4 more"]),
        ("a.jsonl", '{"a": NaN}', ["a.jsonl:1", "NaN is no JSON value"]),
        ("a.jsonl", '{"a": 1, "a": 2}', ["a.jsonl:1", "the key 'a' stands twice"]),
        ("a.jsonl", '{"a": "\\ud83d"}', ["a.jsonl:1", "half of a character"]),
        ("a.jsonl", '{"a":' * 50_000, ["a.jsonl:1", "not JSON"]),
        ("a.json", f"[{GOOD},\n 7]", ["a.json:2: this is a number, not a JSON object"]),
        ("a.json", f"[{GOOD},\n {{'a'}}]", ["a.json:2: this is not JSON", "line 2, column 3"]),
        ("a.json", f"[{GOOD}\n {GOOD}]", ["a.json:2", "expected ',' or ']'"]),
        ("a.json", f"[{GOOD}\n", ["a.json:2", "expected ',' or ']'", "the file ends"]),
        ("a.json", f"[{GOOD}]\n{GOOD}", ["there is text behind the array's end"]),
        ("a.json", '[{"a": NaN}]', ["a.json:1", "NaN is no JSON value"]),
        ("a.jsonl", "", ["a.jsonl is empty: it has no rows"]),
        ("a.jsonl", "\n \n", ["a.jsonl is empty"]),
        ("a.json", "[]", ["a.json is empty"]),
        (
            "a.jsonl",
            GOOD.encode() + b'\n{"a": "caf\xe9"}',
            ["a.jsonl:2: byte 0xe9 is not UTF-8", "iconv"],
        ),
        ("a.jsonl", GOOD.encode("utf-16"), ["a.jsonl is UTF-16", "iconv -f UTF-16"]),
        ("a.csv", "a,b\n", ["a.csv is a .csv file", "only JSON and JSONL"]),
        ("a.jsonl.gz", b"\x1f\x8b", ["a .gz file", "unpack"]),
    ],
    ids=[
        "not-json",
        "not-objects",
        "long-line",
        "many",
        "nan",
        "equal-keys",
        "surrogate",
        "nested",
        "array-item",
        "array-not-json",
        "array-comma",
        "array-cut",
        "array-tail",
        "array-nan",
        "empty",
        "blank",
        "empty-array",
        "latin1",
        "utf16",
        "csv",
        "gz",
    ],
)
def test_bad_files_in_words(write, name, content, parts):
    with pytest.raises(UserError) as error:
        read_file(write(name, content))
    for part in parts:
        assert part in str(error.value)


def test_a_missing_file_says_where_it_looked_and_what_is_there(write, tmp_path):
    write("train.jsonl", GOOD)
    write("heldout-rows.json", GOOD)
    with pytest.raises(UserError, match=r"there is no file trian\.jsonl") as error:
        read_file("trian.jsonl")
    assert str(tmp_path / "trian.jsonl") in str(error.value)
    assert "In that folder: train.jsonl." in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The folder .*nowhere is missing too"):
        read_file("nowhere/train.jsonl")


def test_an_empty_folder_is_said_to_be_empty():
    with pytest.raises(UserError, match=r"no \.json or \.jsonl files in that folder"):
        read_file("train.jsonl")


def test_a_folder_is_no_file(write, tmp_path):
    (tmp_path / "data").mkdir()
    write("data/a.jsonl", GOOD)
    with pytest.raises(UserError, match=r"data is a folder here.*In that folder: a\.jsonl"):
        read_file("data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_says_why(write):
    name = write("a.jsonl", GOOD)
    Path(name).chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
        read_file(name)


def test_a_file_is_read_once_until_it_changes(write):
    first = read_file(write("a.jsonl", GOOD))
    assert read_file("a.jsonl") is first
    assert len(read_file(write("a.jsonl", f"{GOOD}\n{GOOD}"))) == 2


def test_home_is_expanded(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.jsonl", GOOD)
    assert len(read_file("~/a.jsonl")) == 1


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
        ("here", True),
        ("trl-lib/Capybara", False),
        ("gsm8k", False),
        ("owner/name.v2", False),
    ],
)
def test_local_or_hub(tmp_path, path, local):
    (tmp_path / "here").mkdir()
    assert is_local(path) is local
