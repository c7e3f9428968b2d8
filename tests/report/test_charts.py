"""Charts of numbers over steps."""

import math

import pytest

from helpers.report_runs import PageReader
from luthier.report.charts import (
    MAX_POINTS,
    Line,
    draw_histogram,
    draw_lines,
    format_number,
    log_ticks,
    smooth_points,
    thin_out,
)

NUMBERS = {
    0: "0", 1: "1", 0.03125: "0.03125", 0.5: "0.5", 85.0: "85", 1400: "1,400", 2e-05: "2e-5",
    -0.25: "-0.25", 12345.6: "12,346", 10.8123: "10.81", math.nan: "nan", 9.9996: "10",
}  # fmt: skip


@pytest.mark.parametrize("value, text", NUMBERS.items(), ids=NUMBERS.values())
def test_numbers_have_four_digits_that_count(value, text):
    assert format_number(value) == text


def test_thin_points_keep_ends_and_spikes():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[777] = (777, -5.0)
    thin = thin_out(points)
    assert len(thin) <= MAX_POINTS
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert (54_321, 99.0) in thin and (777, -5.0) in thin
    assert thin == sorted(thin)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_POINTS])
def test_few_points_stay(count):
    points = [(float(n), 0.0) for n in range(count)]
    assert thin_out(points) == points


CURVES = {
    "one point": [(5, 3.0)],
    "a constant": [(1, 0.0), (2, 0.0)],
    "close values": [(1, 10.811), (2, 10.812)],
    "over powers of ten": [(n, 10.0 ** (3 - n)) for n in range(8)],
    "negative": [(0, -3.0), (4, 2.0)],
    "huge": [(0, 1e30), (1, 2e30)],
}


@pytest.mark.parametrize("points", CURVES.values(), ids=CURVES)
def test_a_curve_stays_inside_its_picture(points):
    page = draw_lines("loss", [Line("train", points)])
    reader = PageReader(page)
    assert reader.open == [] and reader.tags.count("svg") == 1
    places = [
        float(number)
        for path in page.split(' d="M')[1:]
        for pair in path.split('"')[0].split("L")
        for number in pair.split()
    ]
    assert all(0 <= x <= 360 for x in places[::2]) and all(0 <= y <= 200 for y in places[1::2])
    labels = page.split('text-anchor="end">')[1:]
    texts = [label.split("<")[0] for label in labels]
    assert len(set(texts)) == len(texts), "two grid lines have one number"


@pytest.mark.parametrize("name, is_log", [("eval_loss", True), ("learning_rate", False)])
def test_a_loss_alone_has_a_scale_of_ratios(name, is_log):
    page = draw_lines(name, [Line("train", [(0, 100.0), (1, 1.0)])])
    assert ("log scale" in page) == is_log


def test_values_that_are_not_finite_are_counted_and_not_drawn():
    page = draw_lines("loss", [Line("train", [(1, 1.0), (2, math.nan), (3, math.inf)])])
    assert "2 values are not finite" in page and "nan" not in page.lower().replace("finite", "")
    assert draw_lines("loss", [Line("train", [(1, math.nan)])]) == ""


def test_a_chart_says_how_many_points_it_leaves_out():
    page = draw_lines("loss", [Line("train", [(n, n % 7) for n in range(5000)])])
    assert f"{MAX_POINTS} of 5,000 points" in page
    assert len(PageReader(page).lines(0)["train"]) == MAX_POINTS


def test_names_are_text():
    page = draw_lines("<script>", [Line('"><script>', [(0, 1.0), (1, 2.0)])], "<b>")
    assert "<script>" not in page and "<small>&lt;b&gt;" in page
    assert PageReader(page).charts[0]["lines"][0]["name"] == '"><script>'


def test_a_smoothed_line_begins_at_the_first_value():
    points = [(n, 2.0) for n in range(60)]
    smooth = smooth_points(points)
    assert smooth is not None
    assert [value for _, value in smooth] == pytest.approx([2.0] * 60)
    assert smooth_points(points[:20]) is None
    assert all(math.isfinite(v) for _, v in smooth_points([(0, math.nan), *points]) or [])


@pytest.mark.parametrize(
    "bars",
    [[(97, 97, 3)], [(1, 5, 2), (6, 10, 0), (11, 4000, 1)]],
    ids=["one bar", "a long tail"],
)
def test_a_histogram_has_a_bar_for_each(bars):
    page = draw_histogram("lengths", bars)
    assert page.count("<rect") == len(bars)
    assert "tokens: 3 sequences" in page or "tokens: 1 sequence" in page


AXES = {
    "a lowest value of its own": (0.02, 5.0, [0.02, 0.1, 1.0, 10.0]),
    "one that would touch the next number": (0.0083, 1.7, [0.01, 0.1, 1.0, 10.0]),
}


@pytest.mark.parametrize(("low", "high", "ticks"), AXES.values(), ids=AXES)
def test_numbers_of_an_axis_of_ratios_do_not_touch(low, high, ticks):
    assert log_ticks(low, high) == ticks
