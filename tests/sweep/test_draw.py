"""Points of grids and random searches."""

from luthier.sweep import draw, space


def points(seed, count, *lines):
    return draw.at_random(space.read(lines, {})[0], count, seed)


def test_a_grid_is_every_combination_the_last_running_fastest():
    found, _ = space.read(["lora.r=8,16", "seed=1,2"], {})
    assert [tuple(point.values()) for point in draw.grid(found)] == [
        ("8", "1"), ("8", "2"), ("16", "1"), ("16", "2"),
    ]  # fmt: skip


def test_random_points_are_the_same_at_every_start_and_more_of_them_begin_alike():
    line = "trainer.args.learning_rate=tag(log,interval(1e-5,1e-2))"
    few, many = points(0, 3, line), points(0, 30, line)
    assert many[:3] == few
    assert points(1, 3, line) != few
    rates = [float(point["trainer.args.learning_rate"]) for point in many]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    # On a logarithmic scale two thirds lie below 1e-3.
    assert 12 <= sum(rate < 1e-3 for rate in rates) <= 28


def test_random_points_never_repeat_and_end_with_the_space():
    found = points(0, 50, "lora.r=8,16", "seed=range(1,4)")
    assert len(found) == 6
    assert len({tuple(point.values()) for point in found}) == 6


def test_whole_bounds_give_whole_numbers():
    drawn = {point["seed"] for point in points(0, 50, "seed=int(interval(1,4))")}
    assert drawn == {"1", "2", "3", "4"}
