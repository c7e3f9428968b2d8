"""Functions by dotted path: found, called with the options, their failures in words."""

import sys

import pytest

from luthier.data.rows import BadRow, Row
from luthier.errors import UserError

MODULE = '''
"""Rows of the test's own."""
import collections

def rows(count=3, word="a"):
    for number in range(count):
        yield {"text": word * number, "number": number}

def listed():
    return [collections.OrderedDict(text="a"), {"text": "b"}]

def mixed():
    yield {"text": "a"}
    yield ["b"]
    yield None
    yield {1, 2}

def fails(at=2):
    for number in range(at):
        yield {"text": "a"}
    {}["missing"]

def nothing():
    return []

def forgets_to_yield():
    [{"text": "a"}]

def text():
    return "abc"

VALUE = 3
'''


@pytest.fixture(autouse=True)
def module(write, monkeypatch):
    """A module in the working directory, forgotten afterwards."""
    write("own_rows.py", MODULE)
    write("own_package/__init__.py", "")
    write("own_package/deep.py", MODULE)
    write("own_broken.py", "import own_missing_dependency\ndef rows(): ...")
    write("own_syntax.py", "def rows(:")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "options", "texts"),
    [
        ("python:own_rows.rows", {}, ["", "a", "aa"]),
        ("python:own_rows.rows", {"count": 2, "word": "xy"}, ["", "xy"]),
        ("python:own_package.deep.rows", {"count": 1}, [""]),
        ("python:own_rows.listed", {}, ["a", "b"]),
    ],
    ids=["plain", "arguments", "package", "list"],
)
def test_what_it_yields_is_read(fields, path, options, texts):
    assert [row["text"] for row in fields(path, options=options)] == texts


def test_the_prefix_is_not_needed_where_the_format_is_named(fields):
    assert len(fields("own_rows.rows", format="python")) == 3


def test_rows_are_numbered_and_what_is_no_row_is_bad(read):
    path = "python:own_rows.mixed"
    assert read(path) == [
        Row({"text": "a"}, f"{path} row 0"),
        BadRow(f"{path} row 1", "this is a list, not a dict", "['b']"),
        BadRow(f"{path} row 2", "this is null, not a dict", "None"),
        BadRow(f"{path} row 3", "this is a set, not a dict", "{1, 2}"),
    ]


def test_each_reading_calls_it_anew(opened):
    source = opened("python:own_rows.rows", max_rows=2)
    assert [len(list(source.rows())) for _ in range(2)] == [2, 2]
    assert (source.size, source.files, source.label) == (None, (), "python:own_rows.rows")


def test_the_hash_is_that_of_the_rows(opened):
    def digest(**options):
        return opened("python:own_rows.rows", options=options).digest()

    assert digest() == digest(count=3) == digest(word="a")
    assert len({digest(), digest(count=2), digest(word="b")}) == 3
    assert opened("python:own_package.deep.rows").digest() == digest()


@pytest.mark.parametrize(
    ("path", "options", "parts"),
    [
        ("python:rows", {}, ["names no function", "python:module.name"]),
        ("python:own_nothing.rows", {}, ["there is no module own_nothing (looked in /"]),
        ("python:own_package.nothing.rows", {}, ["there is no module own_package.nothing"]),
        ("python:own_rows.row", {}, ["has no function or class 'row'", "Did you mean rows?"]),
        ("python:own_rows.VALUE", {}, ["is 3, and nothing that can be called"]),
        ("python:own_broken.rows", {}, ["importing own_broken failed", "own_missing_dependency",
                                        "own_broken.py:1"]),
        ("python:own_syntax.rows", {}, ["own_syntax.py, line 1: this is no valid Python"]),
        ("python:own_rows.rows", {"counts": 3}, ["dataset.options: ", "(count=3, word='a')",
                                                 "unexpected keyword argument 'counts'"]),
        ("python:own_rows.rows", {"count": "3"}, ["failed at row 0: TypeError", "own_rows.py:6"]),
        ("python:own_rows.fails", {}, ["failed at row 2: KeyError: 'missing'", "own_rows.py:21"]),
        ("python:own_rows.nothing", {}, ["yielded no rows"]),
        ("python:own_rows.forgets_to_yield", {}, ["returned null, and rows are needed"]),
        ("python:own_rows.text", {}, ["returned text, and rows are needed"]),
    ],
    ids=[
        "no-module-named", "module", "submodule", "function", "no-function", "import", "syntax",
        "argument", "argument-type", "failure", "empty", "none", "text",
    ],
)  # fmt: skip
def test_mistakes_in_words(read, path, options, parts):
    with pytest.raises(UserError) as error:
        read(path, options=options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["name", "revision", "split"])
def test_settings_of_the_hub_are_refused(opened, key):
    with pytest.raises(UserError, match=rf"dataset\.{key}=x is for hub datasets.*Python function"):
        opened("python:own_rows.rows", **{key: "x"})


def test_a_failure_after_good_rows_keeps_none_of_them_in_silence(opened):
    """The rows before come out, and then the error: nobody can take them for all."""
    rows = opened("python:own_rows.fails").rows()
    assert [next(rows).fields, next(rows).fields] == [{"text": "a"}] * 2
    with pytest.raises(UserError, match="failed at row 2"):
        next(rows)
