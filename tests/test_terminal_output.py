"""Tables that lose no number, blocks of text, and numbers as people read them."""

import io

import pytest
from rich.table import Table

from luthier import terminal
from luthier.terminal import (
    ProgressReport,
    format_count,
    format_duration,
    format_number,
    format_table,
    make_block,
    make_console,
    pluralize,
    print_table,
)

TEXTS = {
    "seconds": (format_duration, 42.4, "42 s"),
    "a minute and a half": (format_duration, 99.6, "2 min"),
    "an hour": (format_duration, 7500, "2 h 5 min"),
    "a loss": (format_number, 0.03134, "0.0313"),
    "a very small number": (format_number, 0.00001234, "1.23e-05"),
    "nothing": (format_number, 0.0, "0.0000"),
    "few parameters": (format_count, 512, "512"),
    "thousands": (format_count, 3072, "3.07 k"),
    "nearly a million": (format_count, 999_600, "1 M"),
    "millions": (format_count, 134_515_008, "135 M"),
    "billions": (format_count, 70_553_706_496, "70.6 B"),
}


@pytest.mark.parametrize("formatter, value, text", TEXTS.values(), ids=TEXTS)
def test_numbers_as_people_read_them(formatter, value, text):
    assert formatter(value) == text


def test_one_thing_has_no_plural():
    assert [pluralize(n, "row") for n in (0, 1, 1400)] == ["0 rows", "1 row", "1,400 rows"]
    assert [pluralize(n, "reply", "replies") for n in (1, 2)] == ["1 reply", "2 replies"]


def test_columns_of_numbers_end_in_one_place():
    assert format_table(
        ["", "before", "after"], [["eval_loss", "10.5", ""], ["f1", "", "0.9"]]
    ) == [
        "           before  after",
        "eval_loss    10.5",
        "f1                   0.9",
    ]


def test_a_block_names_its_texts_and_wraps_long_ones():
    lines = make_block("held-out row 1", {"prompt": "one two " * 9, "before": ""}, 40)
    assert lines[0] == "held-out row 1"
    assert lines[1].startswith("  prompt  one two") and max(map(len, lines)) <= 40
    assert lines[2].startswith("          two one two")
    assert lines[-1] == "  before  (empty)"


def wide_table():
    table = Table(show_edge=False)
    for heading in ("trial", "learning_rate", "eval_loss", "state"):
        table.add_column(heading)
    table.add_row("000", "0.0001", "10.81224", "finished in good order")
    table.add_row("001", "0.0003", "10.81201", "")
    return table


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
def test_a_table_loses_no_number_however_narrow(width, is_terminal):
    file = io.StringIO()
    console = make_console(file=file, width=width, force_terminal=is_terminal, no_color=True)
    print_table(console, wide_table())
    for cell in ("0.0001", "10.81224", "10.81201", "finished in good order", "learning_rate"):
        assert cell in file.getvalue()
    assert "…" not in file.getvalue()


def test_a_row_that_does_not_fit_is_a_block():
    file = io.StringIO()
    console = make_console(file=file, width=30, force_terminal=True, color_system=None)
    print_table(console, wide_table())
    assert file.getvalue().splitlines()[4:] == [
        "trial 001",
        "  learning_rate  0.0003",
        "  eval_loss      10.81201",
    ]


def test_long_work_reports_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with ProgressReport(1200, "replies before training") as report:
        for _ in range(3):
            report.update(400)
    assert capsys.readouterr() == ("", "replies before training: 800 of 1,200 rows\n")
