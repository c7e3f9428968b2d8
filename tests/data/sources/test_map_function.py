"""`dataset.map`: the rows that a function makes: counted, hashed, and refused in words."""

import sys

import pytest

from luthier.data.rows import BadRow
from luthier.errors import UserError

CODE = """
import random
from pathlib import Path

def double(row, factor=2):
    row["number"] *= factor
    return row

def even(row):
    return row if row["number"] % 2 == 0 else None

def twice(row):
    return [row, {"number": -row["number"]}]

def none(row):
    return None

def text(row):
    return "a row"

def listed(row):
    return [row, 3]

def fails_at_two(row):
    if row["number"] == 2:
        return {}["absent"]
    return row

def exits(row):
    raise SystemExit(3)

def draws(row):
    return {"number": random.random()}

def reads(row):
    return {"number": int(Path("factor.txt").read_text()) * row["number"]}
"""
ROWS = [{"number": number} for number in range(4)]


@pytest.fixture(autouse=True)
def code(write, monkeypatch):
    """Rows, and a file with functions beside them."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    write("own_map.py", CODE)
    write("rows.jsonl", ROWS)


def map_of(name):
    return f"python:own_map.py:{name}"


@pytest.mark.parametrize(
    ("setting", "settings", "numbers", "left_out"),
    [
        (map_of("double"), {}, [0, 2, 4, 6], (0, 4)),
        ({map_of("double"): {"factor": 3}}, {}, [0, 3, 6, 9], (0, 4)),
        (map_of("even"), {}, [0, 2], (2, 4)),
        (map_of("even"), {"max_rows": 3}, [0, 2], (1, 3)),
        (map_of("twice"), {"max_rows": 2}, [0, 0, 1, -1], (0, 2)),
    ],
    ids=["a row", "arguments", "null", "the first rows are the source's", "several"],
)
def test_rows_are_what_the_function_makes(opened, setting, settings, numbers, left_out):
    source = opened("rows.jsonl", map=setting, **settings)
    assert [row.fields["number"] for row in source.rows()] == numbers
    assert source.left_out == left_out
    assert [row.fields["number"] for row in source.peek()] == numbers


def test_places_name_the_row_of_the_source(read):
    places = [row.where for row in read("rows.jsonl", map=map_of("twice"), max_rows=1)]
    assert places == ["rows.jsonl:1 (map row 1)", "rows.jsonl:1 (map row 2)"]


def test_a_row_that_the_function_fails_at_is_bad_and_names_function_and_line(read, tmp_path):
    rows = read("rows.jsonl", map=map_of("fails_at_two"))
    line = CODE[: CODE.index('return {}["absent"]')].count("\n") + 1
    (bad,) = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 4
    assert bad == BadRow(
        "rows.jsonl:3",
        f"{map_of('fails_at_two')} failed: KeyError: 'absent' ({tmp_path / 'own_map.py'}:{line})",
        '{"number": 2}',
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "rows.jsonl:1: dataset.map: python:own_map.py:text returned text. Return the row"),
        ("listed", "returned a list with a number in it. Return the row (a dict), a list of rows,"),
        ("none", "dataset.map: python:own_map.py:none left out all of 4 rows."),
        ("absent", "dataset.map: python:own_map.py:absent: the file own_map.py has no function"),
    ],
)
def test_mistakes_in_words(read, name, words):
    with pytest.raises(UserError) as caught:
        read("rows.jsonl", map=map_of(name))
    assert words in str(caught.value)


def test_a_function_that_ends_the_program_is_a_bad_row(read):
    first = read("rows.jsonl", map=map_of("exits"))[0]
    assert isinstance(first, BadRow) and "SystemExit: it ends the program (3)" in first.problem


def test_the_key_holds_the_source_of_the_function_and_the_rows_that_it_makes(opened, write):
    def key(setting):
        source = opened("rows.jsonl", map=setting)
        return source.digest(), str(source.settings())

    write("factor.txt", "1")
    plain, reads = key(map_of("double")), key(map_of("reads"))
    assert plain == key({map_of("double"): {"factor": 2}})
    # Other rows by another argument, and by another file that the same function reads.
    assert key({map_of("double"): {"factor": 3}})[0] != plain[0]
    write("factor.txt", "5")
    assert key(map_of("reads"))[0] != reads[0] and key(map_of("reads"))[1] == reads[1]
    # The same rows by another source.
    write("own_map.py", CODE.replace("*= factor", "= row['number'] * factor"))
    assert key(map_of("double"))[0] == plain[0] and key(map_of("double"))[1] != plain[1]
    assert "map" not in opened("rows.jsonl").settings()


def test_a_function_that_draws_is_found_out(opened):
    # More rows than are looked at first, so that they are read again to be encoded.
    source = opened("rows.jsonl", map=map_of("draws"))
    source.digest()
    with pytest.raises(UserError, match=r"through python:own_map\.py:draws gave other rows"):
        list(source.rows(verify=True))


def test_rows_of_a_function_are_mapped_too(opened, write):
    write("own_mapped_rows.py", "def rows():\n    yield from ({'number': n} for n in range(4))\n")
    source = opened("python:own_mapped_rows.rows", map=map_of("even"))
    assert [row.fields["number"] for row in source.rows()] == [0, 2]


def test_without_a_map_nothing_is_left_out(opened):
    assert opened("rows.jsonl").left_out == (0, 0)
