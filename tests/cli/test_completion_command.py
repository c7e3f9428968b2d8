"""Shell completion: the answers, and the scripts in real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.completion import complete

COMMAND = Path(sys.executable).with_name("luthier")

ANSWERS = {
    "commands": (["pre"], {"preview", "prepare"}),
    "flag": (["check", "--ser"], {"--served"}),
    "flag of train": (["train", "--res"], {"--resolve"}),
    "recipe": (["train", "recipe=quick"], {"recipe=quickstart"}),
    "option": (["train", "lora=do"], {"lora=dora"}),
    "group and keys": (["preview", "cha"], {"chat=", "chat."}),
    "key": (["train", "chat.max"], {"chat.max_length="}),
    "key step by step": (["train", "trainer.eva"], {"trainer.evaluation."}),
    "key of a library": (["train", "trainer.args.lear"], {"trainer.args.learning_rate="}),
    "key of a method": (["train", "trainer=dpo", "trainer.args.bet"], {"trainer.args.beta="}),
    "key of a recipe's method": (
        ["train", "recipe=dpo_qwen", "trainer.args.bet"],
        {"trainer.args.beta="},
    ),
    "key of another method": (["train", "trainer.args.bet"], set()),
    "value": (["train", "chat.on_long=d"], {"chat.on_long=drop"}),
    "true or false": (["train", "dry_run="], {"dry_run=true", "dry_run=false"}),
    "run": (["show", "runs/"], {"runs/mine/default", "runs/mine/"}),
    "path": (["train", "dataset.path=da"], {"dataset.path=data/"}),
    "file in a folder": (["train", "dataset.path=data/"], {"dataset.path=data/rows.jsonl"}),
    "value of a flag": (["generate", "runs/x", "rows.jsonl", "-o", "da"], {"data/"}),
    "key to explain": (["explain", "overw"], {"overwrite"}),
    "in quotes": (["train", "'lora=do"], {"'lora=dora"}),
    "no such command": (["trian", "lora="], set()),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/rows.jsonl", "runs/mine/default/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("words, answers", ANSWERS.values(), ids=ANSWERS)
def test_an_answer(words, answers, home):
    assert set(complete(words)) == answers


BASH = """
eval "$(luthier completion bash)"
answers() {
  COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  compopt() { :; }
  COMPREPLY=(); _luthier; echo "${COMPREPLY[*]}"
}
answers 'luthier sch'
answers 'luthier train lora=do'
answers 'luthier train recipe=quickstart chat.max'
answers 'luthier train dataset.path=da'
complete -p luthier
"""
ZSH = """
autoload -Uz compinit && compinit -D
eval "$(luthier completion zsh)"
compadd() { print -r -- "${@[(r)--,-1][2,-1]}" }
words=(luthier train lora=do) CURRENT=3; _luthier
"""
FISH = """
luthier completion fish | source
complete -C 'luthier train lora=do'
"""


def in_shell(shell, script, folder):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, env=environment, cwd=folder
    )
    return done.stdout.splitlines(), done.stderr


def test_in_bash(home):
    lines, errors = in_shell("bash", BASH, home)
    # bash takes what stands before `=` for a word of its own.
    assert lines[:4] == ["schema", "dora", "chat.max_length=", "data/"]
    assert lines[4].endswith("-F _luthier luthier")
    assert not errors


def test_in_zsh(home):
    lines, _ = in_shell("zsh", ZSH, home)
    assert lines == ["lora=dora"]


def test_in_fish(home):
    lines, _ = in_shell("fish", FISH, home)
    assert lines == ["lora=dora"]


def test_a_shell_is_named(luthier):
    code, out, err = luthier("completion", "tcsh")
    assert (code, out) == (2, "")
    assert "luthier completion bash, zsh or fish" in err


def test_an_answer_imports_neither_hydra_nor_a_training_library():
    code = (
        "import sys\nfrom luthier.cli.completion import answer\n"
        "answer(['zsh', 'train', 'trainer.args.lear'])\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
