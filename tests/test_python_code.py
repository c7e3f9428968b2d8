"""Code that a setting names: found, checked without running it, imported, hashed."""

import sys
from pathlib import Path

import pytest

from luthier import python_code
from luthier.errors import UserError
from luthier.python_code import (
    check_python_path,
    describe_exception,
    hash_python_source,
    is_python_path,
    load_python_object,
    select_arguments,
)

CODE = '''
"""Code of the test's own."""
import json
from dataclasses import dataclass

import neighbour

LIMIT = 3

def keep(row, limit=LIMIT, *, strict=False):
    return neighbour.helper(row) if strict else row

def unrelated(row):
    return None

def anything(**columns): ...

def decode(text):
    return json.loads(text)

class Base: ...

class Child(Base):
    def __init__(self, size, shade="red"): ...

class Foreign(neighbour.Outer): ...

@dataclass
class Record:
    size: int
'''
NEIGHBOUR = "def helper(row):\n    return row\n\ndef other():\n    pass\n\nclass Outer: ...\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a module, a package and a file; all forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(python_code, "_LOADED_SOURCES", {})
    before = set(sys.modules)
    (tmp_path / "own_code.py").write_text(CODE)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise SystemExit('must not run')")
    (tmp_path / "own_package" / "deep.py").write_text("def keep(row): return row\n")
    (tmp_path / "own broken.py").write_text("x = 1\nx / 0\ndef keep(row): return row\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("python:own_code.keep", True),
        ("python:own code.py:keep", True),
        ("python:keep", True),
        ("python: a language", False),
        ("own_code.keep", False),
        (None, False),
    ],
)
def test_which_settings_name_code(text, is_path):
    assert is_python_path(text) is is_path


@pytest.mark.parametrize(
    ("path", "arguments", "base", "words"),
    [
        ("python:own_code.keep", ["limit"], None, None),
        ("python:own_code.py:keep", ["limit", "strict"], None, None),
        ("python:own_package.deep.keep", [], None, None),
        ("python:own_code.anything", ["a", "b"], None, "takes (**columns)"),
        ("python:own_code.Record", ["no_such"], None, None),
        ("python:json.dumps", None, None, None),
        ("python:math.sqrt", [], None, None),
        ("python:own_code.Foreign", None, "transformers.TrainerCallback", None),
        ("python:own_code.Child", ["size"], None, "row, size: multiple values for"),
        ("python:keep", None, None, "names no function or class. Write python:module.name or"),
        ("python:own_code.py:", None, None, "names no function or class"),
        ("python:no_module.keep", None, None, "there is no module no_module (looked in /"),
        ("python:no_file.py:keep", None, None, "there is no file no_file.py (looked in /"),
        ("python:own_code.kept", None, None, "'kept'. Did you mean keep?"),
        ("python:own_code.LIMIT", None, None, "is 3, and nothing that can be called."),
        ("python:own_code.keep", ["limits"], None, "unexpected keyword argument 'limits'"),
        ("python:own_code.keep", None, "a.B", "is a function, and a class of a.B is needed"),
        ("python:own_code.Child", None, "a.B", "is a class of another base, and a class of a.B"),
    ],
)
def test_checks_that_run_nothing(path, arguments, base, words):
    positional = [] if arguments is None else ["row"]
    text = check_python_path(path, arguments, positional=positional, base=base)
    assert text is None if words is None else text and words in text, text
    assert not {"own_code", "own_package"} & set(sys.modules)


def test_a_syntax_error_is_named_with_its_line(folder):
    (folder / "wrong.py").write_text("x = 1\ndef keep(:\n")
    assert "wrong.py, line 2: this is no valid Python" in str(
        check_python_path("python:wrong.py:keep")
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("python:own broken.py:keep", "importing own broken.py failed: ZeroDivisionError: "),
        ("python:own broken.py:keep", "own broken.py:2)"),
        ("python:own_package.deep.keep", "SystemExit: it ends the program (must not run)"),
        ("python:own_code.LIMIT", "nothing that can be called"),
        ("python:own_code.py:Child", "is the class Child, and a class of builtins.dict is needed"),
    ],
)
def test_code_that_cannot_be_had_is_a_mistake_in_words(path, words):
    with pytest.raises(UserError) as caught:
        load_python_object(path, base=dict if path.endswith("Child") else None)
    assert words in str(caught.value)


def test_a_file_finds_its_neighbours_and_is_run_anew_once_it_is_edited(folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "tool.py").write_text("from beside import VALUE\ndef tool(): return VALUE\n")
    (folder / "sub" / "beside.py").write_text("VALUE = 1\n")
    first = load_python_object("python:sub/tool.py:tool")
    assert first() == 1
    assert load_python_object("python:sub/tool.py:tool") is first
    (folder / "sub" / "tool.py").write_text("def tool(): return 2\n")
    assert load_python_object("python:sub/tool.py:tool")() == 2
    assert load_python_object("python:own_code.keep")(5) == 5
    (folder / "own_code.py").write_text("def keep(row): return 7\n")
    assert load_python_object("python:own_code.keep")(5) == 7


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("own_code.py", "return None", "return 1", False),
        ("own_code.py", "    return neighbour", "    # a word\n\n    return neighbour", False),
        ("own_code.py", "LIMIT = 3", "LIMIT = 4", True),
        ("own_code.py", "if strict else row", "if strict else None", True),
        ("neighbour.py", "return row", "return dict(row)", True),
    ],
    ids=["another function", "a comment", "a constant", "its body", "a module that it calls"],
)
def test_the_hash_follows_what_the_code_refers_to(folder, file, old, new, changes):
    paths = ["python:own_code.keep", "python:own_code.py:keep"]
    before = [hash_python_source(path) for path in paths]
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    after = [hash_python_source(path) for path in paths]
    assert None not in before
    assert [a != b for a, b in zip(before, after, strict=True)] == [changes, changes]


def test_what_is_compiled_has_no_hash():
    assert hash_python_source("python:math.sqrt") is None


def test_arguments_are_taken_by_name():
    keep = load_python_object("python:own_code.keep")
    assert select_arguments(keep, {"row": 1, "other": 2}, "p") == {"row": 1}
    assert select_arguments(load_python_object("python:own_code.anything"), {"a": 1}, "p") == {
        "a": 1
    }
    with pytest.raises(UserError, match=r"p needs row, and there is no such .* are: other\."):
        select_arguments(keep, {"other": 2}, "p")


def test_a_failure_inside_a_library_is_told_at_the_users_own_line():
    decode = load_python_object("python:own_code.decode")
    line = CODE[: CODE.index("return json.loads")].count("\n") + 1
    with pytest.raises(ValueError) as caught:
        decode("{")
    assert f"({Path.cwd() / 'own_code.py'}:{line})" in describe_exception(caught.value)
