"""Lengths in a few numbers and in a picture of text."""


def quantiles(values: list[int]) -> dict[str, int]:
    """The least, the middle, the 90th and 99th percentile (nearest rank) and the most."""
    ranked = sorted(values)
    if not ranked:
        return {}
    parts = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ranked) - 1
    return {name: ranked[round(share * last)] for name, share in parts.items()}


def histogram(values: list[int], bins: int = 8) -> list[tuple[int, int | None, int]]:
    """Counts of values from (inclusive) and to (exclusive); None: no upper bound.

    The last bin takes what lies beyond the 99th percentile, so that one long row does not make
    all others equal.
    """
    if not values:
        return []
    found = quantiles(values)
    width = _round_up(max((found["p99"] - found["min"] + 1) / bins, 1))
    start = found["min"] // width * width
    edges = [start + n * width for n in range((found["p99"] - start) // width + 2)]
    counts = [0] * len(edges)
    for value in values:
        counts[min((value - start) // width, len(edges) - 1)] += 1
    ends = [*edges[1:], None]
    rows = list(zip(edges, ends, counts, strict=True))
    return rows if counts[-1] else rows[:-1]


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= width:
                return step * power
        power *= 10
