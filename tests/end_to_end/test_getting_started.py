"""The commands of docs/getting-started.md, in their order, as a newcomer types them."""

import io
import shlex
from pathlib import Path

from helpers import format_rows, train_command

PAGE = train_command.ROOT / "docs" / "getting-started.md"
RUN_ELSEWHERE = ("doctor", "serve")
"""Commands that tests of their own run: one trains on the machine, the other does not end."""


def page_commands():
    """Return the words of each command that is about the reader's own rows."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    typed = [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("    luthier ")
    ]
    return [
        words for words in typed if words[0] not in RUN_ELSEWHERE and "quickstart" not in str(words)
    ]


def test_the_page_leads_from_own_rows_to_a_chat(
    forks, tiny, luthier, tmp_path, workplace, monkeypatch
):
    format_rows.write_rows(tmp_path / "my_data.jsonl", "prompt_completion", count=40)
    said = {}
    for name, *words in [*page_commands(), ["show", "runs/my_data/default"], ["runs"]]:
        if name == "train":
            assert forks.run(tmp_path, *words) == 0, train_command.said(tmp_path)
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("the old violin\n"))
        model = ["--model", tiny / "model"] if name == "init" else []
        code, out, err = luthier(name, *words, *model)
        assert code == 0, f"luthier {name} {shlex.join(words)}\n{out}\n{err}"
        said[name] = out
    run = Path("runs/my_data/default")
    assert (run / "report.html").exists()
    assert Path("preview.html").exists()
    assert "40 rows" in said["init"]
    assert "every rule holds" in said["check"]
    assert "eval_loss" in said["show"]
    assert "perplexity" in said["evaluate"]
    assert "my_data/default" in said["runs"]
    assert len(list(run.parent.glob("*/run.json"))) == 2, "the short run and the whole one"
