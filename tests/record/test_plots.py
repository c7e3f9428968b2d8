"""The picture of the data is a real one for any lengths, and absent where there are none."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from luthier.record.plots import DataNumbers, bin_edges, plot_data, plot_loss

DRAW = np.random.default_rng(0)
LENGTHS = {
    "one": np.array([7]),
    "equal": np.full(500, 2048),
    "a bell": DRAW.normal(120, 25, 1400).clip(40, 300).astype(int),
    "skewed": np.concatenate([DRAW.integers(5, 60, 20_000), [300, 4000, 100_000]]),
    "none short": np.arange(5, dtype=np.int32) + 1,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_length_is_in_a_bar(lengths):
    edges, _ = bin_edges(lengths)
    counts, _ = np.histogram(lengths, edges)
    assert counts.sum() == len(lengths)
    assert (np.diff(edges) > 0).all() and len(counts) <= 42


def test_lengths_of_all_sizes_are_drawn_by_ratio():
    assert [bin_edges(lengths)[1] for lengths in LENGTHS.values()] == [
        False,
        False,
        False,
        True,
        False,
    ]


def pixels(path):
    from matplotlib import image

    return image.imread(path)[..., :3]


@pytest.mark.parametrize("name", ["one", "a bell", "skewed"])
def test_a_picture_is_a_png_with_ink_on_it(name, tmp_path):
    numbers = DataNumbers(LENGTHS[name], 5, max_length=300)
    assert plot_data(numbers, name, tmp_path / "data.png")
    found = pixels(tmp_path / "data.png")
    assert found.shape[1] > 800 and found.std() > 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["data.png"]


def reds(path):
    """How many pixels are of the colour of `chat.max_length`."""
    found = pixels(path)
    return int(((found[..., 0] > 0.75) & (found[..., 1] < 0.4) & (found[..., 2] < 0.5)).sum())


@pytest.mark.parametrize(
    "max_length, least, most",
    [(None, 0, 0), (200, 400, 5000), (250, 400, 5000), (30_000, 0, 0)],
    ids=["none", "inside", "beside", "far off"],
)
def test_the_limit_is_marked_where_it_is_near(max_length, least, most, tmp_path):
    numbers = DataNumbers(LENGTHS["a bell"], 5, max_length)
    plot_data(numbers, "limit", tmp_path / "data.png")
    assert least <= reds(tmp_path / "data.png") <= most


def test_several_sources_stand_below_each_other(tmp_path):
    heights = {}
    for count in (1, 5, 60):
        sources = {f"source_{n}": n + 1 for n in range(count)}
        plot_data(DataNumbers(LENGTHS["a bell"], 5, None, sources), "mix", tmp_path / "data.png")
        heights[count] = len(pixels(tmp_path / "data.png"))
    assert heights[1] < heights[5] < heights[60] < 3 * heights[1]


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert not plot_data(DataNumbers(np.empty(0), 0), "empty", tmp_path / "data.png")
    assert not list(tmp_path.iterdir())


def test_a_plot_is_a_png_with_ink_on_it(tmp_path):
    from matplotlib import image

    metrics = [{"step": s, "loss": 3 / s} for s in range(1, 30)] + [{"step": 29, "eval_loss": 0.2}]
    assert plot_loss(metrics, "quickstart", tmp_path / "loss.png")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.02


def test_no_metrics_no_plot(tmp_path):
    assert not plot_loss([{"step": 1, "learning_rate": 1.0}], "empty", tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_rewards_are_drawn_in_place_of_a_loss_that_says_nothing(tmp_path):
    metrics = [{"step": s, "loss": 0.0, "reward": -1 / s} for s in range(1, 9)]
    assert plot_loss([*metrics, {"step": 8, "eval_reward": None}], "grpo", tmp_path / "loss.png")


def test_images_are_counted_in_the_title(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    for images in (0, 1200):
        numbers = DataNumbers(np.array([3, 5]), 4, images=images)
        plot_data(numbers, "some", tmp_path / "data.png")
    assert titles == [
        "some: 2 training sequences",
        "8 tokens, 50% trained",
        "some: 2 training sequences",
        "8 tokens, 50% trained, 1,200 images",
    ]


LIMITS = {
    # values, name -> ends of the axis
    "a loss that falls far": ([1.6, 0.4, 0.03], "loss", (0, 1.694)),
    "a loss that hardly moves": ([10.81, 10.80], "loss", (10.740, 10.870)),
    "a loss that falls by a fifth": ([5.0, 4.0], "loss", (3.9, 5.1)),
    "a single loss": ([2.0], "loss", (1.988, 2.012)),
    "rewards on both sides of zero": ([-1.0, 1.0], "reward", (-1.2, 1.2)),
}


@pytest.mark.parametrize("values, name, ends", LIMITS.values(), ids=LIMITS)
def test_no_line_is_flat_and_no_point_is_cut(values, name, ends):
    from luthier.record.plots import _value_limits

    assert _value_limits(values, name) == pytest.approx(ends, abs=1e-3)


AXES = {
    "tokens": ({"mean_token_accuracy": 0.5}, "loss per trained token (nats)"),
    "pairs": ({"mean_token_accuracy": 0.5, "rewards/margins": 0.1}, "loss"),
    "classes": ({"eval_accuracy": 0.5}, "loss"),
}


@pytest.mark.parametrize(("metrics", "label"), AXES.values(), ids=AXES)
def test_the_axis_says_what_the_loss_is_of(metrics, label, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, text, **_: labels.append(text))
    rows = [{"step": 1, "loss": 2.0, **metrics}, {"step": 2, "loss": 1.0, **metrics}]
    assert plot_loss(rows, "mine", tmp_path / "loss.png")
    assert labels == [label]
