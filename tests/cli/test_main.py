"""The command line: help pages, and what is said of a wrong one."""

import subprocess
import sys

import pytest

import luthier as package
from luthier.cli.main import COMMANDS

Q = "recipe=quickstart"


def test_help_lists_the_commands(luthier):
    for words in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = luthier(*words)
        assert code == 0
        assert all(f"  luthier {name}" in out for name in COMMANDS)
        assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, luthier):
    code, out, err = luthier(command, "--help")
    assert code == 0 and not err
    assert f"luthier {command}" in out or command == "train"
    assert max(map(len, out.splitlines())) <= 100


def test_version(luthier):
    assert luthier("--version") == (0, f"luthier {package.__version__}\n", "")


def test_recipes(luthier):
    code, out, _ = luthier("recipes")
    assert code == 0
    assert any(line.split(maxsplit=2)[:2] == ["quickstart", "QLoRA"] for line in out.splitlines())


SAYS = {
    "command": (["chekc"], "there is no command 'chekc'. Did you mean `luthier check`?"),
    "command, far off": (["zzz"], "there is no command 'zzz'. There are: train, launch, init,"),
    "flag": (
        ["preview", Q, "--rows", "3"],
        "--rows: luthier preview has no such flag. Did you mean --row?",
    ),
    "flag, far off": (
        ["check", "--zzz"],
        "has no such flag. Flags: --limit, --served, --json, --png, --trust, --help",
    ),
    "short flag": (["check", "-x"], "-x: luthier check has no such flag."),
    "number missing": (["preview", Q, "--row"], "--row needs a number. Write --row 3."),
    "no number": (["preview", Q, "--n", "x"], "--n x: write a whole number of at least 1"),
    "zero": (["check", Q, "--limit=0"], "--limit 0: write a whole number of at least 1"),
    "switch with value": (["check", "--json=1"], "--json=1: --json takes no value."),
    "file missing": (["preview", Q, "--html", "--ids"], "--html needs a value. Write --html FILE."),
    "recipes with words": (["recipes", "all"], "`luthier recipes` takes no arguments."),
    "two comparisons": (
        ["evaluate", "x", "--alone", "--against", "y"],
        "--against: --alone compares with nothing. Leave one of them out.",
    ),
    "tasks without benchmarks": (
        ["evaluate", "x", "--tasks", "folder"],
        "--tasks: these are tasks for --benchmarks.",
    ),
    "another engine's command": (
        ["serve", "x", "--engine", "transformers", "--show"],
        "--show: this prints the command of vLLM.",
    ),
    "nothing chosen": (["check"], "recipe: nothing is chosen. Add recipe=NAME"),
    "key": (["check", Q, "chat.max_lenght=3"], "Did you mean chat.max_length?"),
    "recipe": (["preview", "recipe=quikstart"], "Did you mean quickstart?"),
    "data": (["check", Q, "dataset.path=none.jsonl"], "none.jsonl"),
    "model": (
        ["check", Q, "model=hub", "model.path=./none"],
        "model.path=none: there is no such folder",
    ),
}


@pytest.mark.parametrize("words, said", SAYS.values(), ids=SAYS)
def test_a_mistake_is_said_in_words(words, said, luthier):
    code, out, err = luthier(*words)
    assert (code, out) == (2, "")
    assert said in err


CALL = "from luthier.cli.main import main; main()"


MISTYPED = {
    "preview": ("recipe=typo", "there is no recipe 'typo'"),
    "check": ("recipe=typo", "there is no recipe 'typo'"),
    "doctor": ("--tests", "no such flag. Did you mean --test?"),
}


@pytest.mark.parametrize("command", MISTYPED)
def test_a_mistake_costs_no_heavy_import(command, tmp_path):
    typed, said = MISTYPED[command]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", CALL, command, typed],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    names = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 2 and said in done.stderr
    assert not names & {"torch", "transformers", "rich"}
