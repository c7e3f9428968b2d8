"""Every family of models goes through every step, or is refused in words for a reason of the page.

Tiny random models of the real classes; what each step holds them against stands in
`helpers/family_steps.py`. The table of docs/model.md is what came out, and a changed cell fails.
Write it anew, and read what changed, with

    LUTHIER_WRITE_FAMILIES=1 pytest tests/end_to_end/test_families.py
"""

import gc
import os
from pathlib import Path

import pytest

from helpers.family_steps import STEPS, FamilyRun, go_through
from helpers.model_families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "model.md"
WRITES_PAGE = bool(os.environ.get("LUTHIER_WRITE_FAMILIES"))
HEADER = f"| family | {' | '.join(STEPS)} |"
RECURRENT = "recurrent layers"
REFUSED = {
    ("qwen3_next", "pack"): RECURRENT,
    ("qwen3_5", "pack"): RECURRENT,
    ("qwen3_5_moe", "pack"): RECURRENT,
    ("granite_moe_hybrid", "pack"): RECURRENT,
    ("falcon_h1", "pack"): RECURRENT,
    ("mamba2", "pack"): RECURRENT,
    ("nemotron_h", "pack"): RECURRENT,
    ("lfm2", "pack"): RECURRENT,
    ("lfm2_moe", "pack"): RECURRENT,
    ("jamba", "pack"): RECURRENT,
}
"""What is refused, and the words for it that stand in the message and on the page."""


@pytest.fixture(scope="session")
def families_folder(tmp_path_factory):
    """A folder that all families share, so that equal rows are encoded once."""
    import bitsandbytes
    import matplotlib.pyplot
    import peft
    import trl

    import luthier.train.build  # noqa: F401

    assert bitsandbytes and matplotlib and peft and trl
    # Each run collects garbage twice; what the libraries hold need not be looked through each time.
    gc.collect()
    gc.freeze()
    yield tmp_path_factory.mktemp("families")
    gc.unfreeze()


@pytest.fixture(scope="session")
def page_rows(families_folder):
    """The rows of the page; written at the end where that was asked for."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER) + 2
    end = next(n for n in range(start, len(lines) + 1) if n == len(lines) or not lines[n])
    made = {}
    yield lines[start:end], made
    if WRITES_PAGE:
        old = {line.split(" | ")[0]: line for line in lines[start:end]}
        rows = [made.get(name) or old.get(f"| {name}", "") for name in FAMILIES]
        PAGE.write_text("\n".join([*lines[:start], *filter(None, rows), *lines[end:], ""]))


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, families_folder, page_rows):
    folder = families_folder / name
    folder.mkdir()
    run = FamilyRun(name, folder)
    outcomes = go_through(run)
    bad = {step: each for step, each in outcomes.items() if each[0] in ("wrong", "traceback")}
    if hasattr(run, "trace"):
        raise AssertionError(bad) from run.trace
    assert not bad
    refused = {step: words for step, (outcome, words) in outcomes.items() if outcome == "refused"}
    assert set(refused) == {step for family, step in REFUSED if family == name}
    for step, words in refused.items():
        assert REFUSED[name, step] in words
    old, made = page_rows
    made[name] = page_row(run)
    assert WRITES_PAGE or made[name] in old


def page_row(run):
    """The line of the page for a family."""
    shares = {"lora": run.share, "nf4": run.packed}
    cells = []
    for step in STEPS:
        outcome, _ = run.outcomes[step]
        if outcome == "refused":
            outcome = REFUSED[run.name, step]
        elif outcome == "ok" and shares.get(step) is not None:
            outcome = f"{shares[step]:.0%}"
        cells.append(outcome)
    return f"| {run.name} | {' | '.join(cells)} |"


def test_what_is_refused_stands_on_the_page():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert [words for words in set(REFUSED.values()) if f"**{words}**" not in text] == []
