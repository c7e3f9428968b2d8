"""`luthier docs` shows the pages, and every message that names a page names one that is there."""

import re
from pathlib import Path

import pytest

from luthier.cli.docs import run
from luthier.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_page_is_printed_and_all_are_listed(capsys):
    assert run(["launch"]) == 0
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()
    assert run([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_an_unknown_page_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean launch"):
        run(["lanch"])


def test_messages_name_pages_that_a_wheel_has():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    named = {
        page for text in texts.values() for page in re.findall(r"luthier docs ([a-z_]+)", text)
    }
    assert named - {"formats"} and named <= {path.stem for path in (ROOT / "docs").glob("*.md")}
    in_messages = [
        f"{path.name}: {line.strip()}"
        for path, text in texts.items()
        for line in text.splitlines()
        if re.match(r'\s*[a-z]*"(?!"").*docs/\w+\.md', line)
    ]
    assert in_messages == []
