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
MAIN_FAMILIES = (
    *("llama", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"),
    *("gpt_oss", "deepseek_v3", "glm4_moe", "mixtral", "gemma3", "gemma4_moe", "mamba2"),
    *("nemotron_h", "bloom", "t5", "bert"),
)
"""One family for each way in which models differ; the others are variations of these."""
REFUSED = {("bloom", "pack"): "ALiBi biases"}
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
    made = {}
    _, rows, _ = split_page()
    yield rows, made
    if WRITES_PAGE:
        before, rows, after = split_page()
        old = {row.split(" | ")[0].removeprefix("| "): row for row in rows}
        rows = [made.get(name) or old.get(name) for name in FAMILIES]
        PAGE.write_text("\n".join([*before, *filter(None, rows), *after, ""]), encoding="utf-8")


def split_page():
    """The page's lines before the rows of the table, the rows, and the lines behind them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER) + 2
    end = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    return lines[:start], lines[start:end], lines[end:]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in MAIN_FAMILIES else pytest.mark.long)
        for name in FAMILIES
    ],
)
def test_family(name, families_folder, page_rows):
    folder = families_folder / name
    folder.mkdir()
    run = FamilyRun(name, folder)
    outcomes = go_through(run)
    bad = {step: each for step, each in outcomes.items() if each[0] in ("wrong", "traceback")}
    if bad:
        raise AssertionError(bad) from getattr(run, "trace", None)
    refused = {step: words for step, (outcome, words) in outcomes.items() if outcome == "refused"}
    taken = {step for step, (outcome, _) in outcomes.items() if outcome != "-"}
    expected = {step for family, step in REFUSED if family == name}
    assert set(refused) == expected & taken
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


def test_the_page_has_every_family():
    _, rows, _ = split_page()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)


def test_what_is_refused_stands_on_the_page():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert [words for words in set(REFUSED.values()) if f"**{words}**" not in text] == []
