"""What a sweep tries and measures may be any text: tables, pages and plots show it as text."""

import csv
import re

import pytest

from luthier.record.plots import plot_loss
from luthier.sweep.objective import Objective
from luthier.sweep.page import write_page
from luthier.sweep.plots import draw_plots
from luthier.sweep.trials import Trial, write_csv

FORMULAS = [
    "=HYPERLINK(1)", '=cmd|"/c calc"!A0', "+1+2", "-1+2", "@SUM(1)", "\t=1", "\r=1", "-", "=",
    "+cmd", "-lora", "@", "=1",
]  # fmt: skip
NUMBERS = ["1", "-1", "+1", "-1e-4", "1e5", "-.5", "-inf", "+0.1"]
TEXTS = ["a=b", "q_proj", "[q,v]", "1-2", "", "a\n=b", "nf4", "'=1"]
MARKUP = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table>", "&lt;b"]
MATH = [r"$\frac{$", "$x^{$", "$", "$$", r"\$a$", "$a$b$"]


def read_cells(tmp_path, trials, objectives):
    write_csv(trials, objectives, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("value", FORMULAS)
def test_no_cell_is_a_formula(value, tmp_path):
    trial = Trial(0, {f"a.{value}": value}, "failed", {value: 1.0}, error=value)
    cells = read_cells(tmp_path, [trial], [Objective(value, False)])
    assert len({len(row) for row in cells}) == 1
    assert sum(value.strip("\r") in cell for row in cells for cell in row) >= 4
    for row in cells:
        for cell in row:
            assert not re.match(r"[=+\-@\t\r]", cell) or is_number(cell), cell


def is_number(cell):
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]inf", cell) is not None


@pytest.mark.parametrize("value", [*NUMBERS, *TEXTS])
def test_numbers_and_plain_texts_stay(value, tmp_path):
    trial = Trial(0, {"lora.r": value}, "finished", {"loss": -0.5})
    _, row = read_cells(tmp_path, [trial], [Objective("loss", False)])
    assert row[2:4] == [value.strip("'\"") if value != "'=1" else "'=1", "-0.5"]


@pytest.mark.parametrize("value", MARKUP)
def test_a_page_has_no_markup_of_values(value, tmp_path):
    trials = [
        Trial(0, {f"a.{value}": value}, "finished", {value: 1.0}),
        Trial(1, {f"a.{value}": value}, "failed", error=value),
    ]
    write_page(value, trials, [Objective(value, True)], [], [(value, value)], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert value not in text
    assert text.count("<script") == 0
    assert text.count("<td") == text.count("</td>")


@pytest.mark.parametrize("value", MATH)
def test_plots_show_text_that_looks_like_a_formula(value, tmp_path):
    others = ["a", "b", "c"]
    trials = [
        Trial(n, {f"a.{value}": choice, "b": str(n)}, "finished", {value: n / 7, "other": -n / 7})
        for n, choice in enumerate([value, *others])
    ]
    objectives = [Objective(value, False), Objective("other", True)]
    assert len(draw_plots(trials, objectives, tmp_path)) >= 3
    assert plot_loss([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], value, tmp_path / "l")
