"""Charts as inline SVG, drawn without a library: lines over the steps, and bars.

A chart is readable without its script, on paper too. `CHART_SCRIPT` shows the values of the step
that the pointer is at.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from luthier.terminal import pluralize

Points = list[tuple[float, float]]
"""Pairs of a step and a value, in the order of the steps."""

MAX_POINTS = 360
"""Points of a line that are drawn: more than the pixels that a chart is wide show nothing."""
COLORS = 8
"""The colours `--s1` to `--s8` of the page's style."""
_MARKED_POINTS = 40
"""Lines of so few points have a mark at each of them."""
_SMOOTHED_POINTS = 50
"""Curves of as many points have a smoothed line above them."""
_LOG_NAMES = ("loss", "perplexity", "grad_norm")
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24

CHART_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1.2rem 1.6rem; margin-top: .8rem }
figure { margin: 0; min-width: 0; break-inside: avoid }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: baseline;
  font-size: .85rem }
figcaption b { font-weight: 600; overflow-wrap: anywhere }
figcaption span { color: var(--soft); display: inline-flex; align-items: center; gap: .35rem;
  overflow-wrap: anywhere }
figcaption span::before { content: ""; width: .8rem; height: 3px; border-radius: 2px;
  background: var(--mark); flex: none }
figure small { color: var(--faint); display: block }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { fill: var(--faint); font: 10px system-ui, sans-serif }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .cursor { stroke: var(--faint) }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
svg .raw { stroke-width: 1; opacity: .35 }
svg .bar { fill: var(--s1) }
"""

CHART_SCRIPT = """
for (const figure of document.querySelectorAll('[data-chart]')) {
  const chart = JSON.parse(figure.dataset.chart), svg = figure.querySelector('svg');
  const cursor = svg.querySelector('.cursor');
  const format = value => Number(value.toPrecision(4)).toLocaleString('en');
  const leave = () => { cursor.style.display = 'none'; showHint(''); };
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = chart.width / box.width;
    const share = ((event.clientX - box.left) * scale - chart.left) / (chart.right - chart.left);
    const wanted = chart.first + share * (chart.last - chart.first);
    let step = null;
    for (const line of chart.lines) for (const [at] of line.points)
      if (step === null || Math.abs(at - wanted) < Math.abs(step - wanted)) step = at;
    if (step === null) return leave();
    const x = chart.left + (chart.right - chart.left) *
      (chart.last > chart.first ? (step - chart.first) / (chart.last - chart.first) : .5);
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.style.display = '';
    const texts = chart.lines.flatMap(line => line.points.filter(([at]) => at === step)
      .slice(0, 1).map(([, value]) => line.name + '  ' + format(value)));
    const left = box.left + x / scale + 12;
    showHint(['step ' + format(step), ...texts].join('\\n'),
      {left: left, top: box.top + box.height * .35, bottom: box.bottom});
  });
}
"""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Points
    color: int = 1
    """The number of its colour, from 1; 0 is faint."""
    smooth: Points | None = None
    """What is drawn boldly above faint points; None draws the points themselves boldly."""

    @property
    def stroke(self) -> str:
        """The colour as CSS."""
        return f"var(--s{self.color})" if self.color else "var(--line)"


def thin_out(points: Points) -> Points:
    """Return at most `MAX_POINTS` of these points: of each stretch its lowest and its highest.

    So no spike is lost. The first and the last point stay.
    """
    if len(points) <= MAX_POINTS:
        return points
    stretches = (MAX_POINTS - 2) // 2
    inner, thinned = points[1:-1], [points[0]]
    for number in range(stretches):
        begin, end = (len(inner) * n // stretches for n in (number, number + 1))
        ends = {min(range(begin, end), key=lambda n: inner[n][1]),
                max(range(begin, end), key=lambda n: inner[n][1])}  # fmt: skip
        thinned += [inner[n] for n in sorted(ends)]
    return [*thinned, points[-1]]


def smooth_points(points: Points) -> Points | None:
    """Return the moving average, corrected for its start (Kingma & Ba 2015, section 3).

    None where there are too few points: it would only lag behind.
    """
    if len(points) < _SMOOTHED_POINTS:
        return None
    weight, average, smooth, count = 0.9, 0.0, [], 0
    for step, value in points:
        if value - value == 0:  # neither infinite nor NaN
            count += 1
            average = weight * average + (1 - weight) * value
        smooth.append((step, average / (1 - weight ** max(count, 1))))
    return smooth


def draw_lines(title: str, lines: Sequence[Line], note: str = "") -> str:
    """Return a chart of values over steps as HTML; empty where no line has a finite value.

    The value axis of a loss has a scale of ratios where it changes by more than twenty times: on
    an even scale its start would flatten all the rest.
    """
    note_parts = [note] if note else []
    lines, invalid = _with_finite_values(lines)
    if not lines:
        return ""
    if invalid:
        note_parts.append(f"{pluralize(invalid, 'value is', 'values are')} not finite")
    values = [value for line in lines for _, value in (*line.points, *(line.smooth or ()))]
    steps = [step for line in lines for step, _ in line.points]
    is_log = title.endswith(_LOG_NAMES) and 0 < min(values) < max(values) / 20
    ticks = log_ticks(min(values), max(values)) if is_log else _ticks(min(values), max(values))
    frame = _Frame(min(steps), max(steps), min(*ticks, *values), max(*ticks, *values), is_log)
    total = sum(len(line.points) for line in lines)
    drawn = [
        Line(line.name, thin_out(line.points), line.color, thin_out(line.smooth or []) or None)
        for line in lines
    ]
    left_out = total - sum(len(line.points) for line in drawn)
    if left_out:
        note_parts.append(
            f"{total - left_out:,} of {total:,} points are drawn: the lowest and the highest of "
            "each stretch"
        )
    if is_log:
        note_parts.append("log scale")
    marks = "".join(
        f'<span style="--mark:{line.stroke}">{escape(line.name)} '
        f"{format_number(line.points[-1][1])}</span>"
        for line in lines
    )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_draw_axes(frame, ticks)}{''.join(_draw_line(frame, line) for line in drawn)}"
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" style="display:none"/></svg>'
    )
    small = f"<small>{escape('; '.join(note_parts))}</small>" if note_parts else ""
    return (
        f'<figure data-chart="{escape(_chart_values(frame, drawn))}"><figcaption>'
        f"<b>{escape(title)}</b>{marks}</figcaption>{svg}{small}</figure>"
    )


def draw_histogram(title: str, bars: Sequence[tuple[int, int, int]], note: str = "") -> str:
    """Return a histogram as HTML; a bar is where it begins, where it ends, and its count.

    Bars begin and end at whole numbers, both of which belong to them.
    """
    # A single bar would be a wall.
    margin = max(0, 8 - len(bars)) * (bars[0][1] + 1 - bars[0][0]) / 2
    low, high = bars[0][0] - margin, bars[-1][1] + 1 + margin
    most = max(count for *_, count in bars)
    ticks = _ticks(0, most)
    frame = _Frame(low, high, 0, max(most, ticks[-1]), False)
    shapes = []
    for begin, end, count in bars:
        left, right = frame.x(begin), frame.x(end + 1)
        top = frame.y(count)
        gap = min(1.0, (right - left) / 5)
        span = f"{begin:,}" if begin == end else f"{begin:,} to {end:,}"
        hint = escape(f"{span} tokens: {pluralize(count, 'sequence')}")
        shapes.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{right - left - gap:.1f}" '
            f'height="{max(_HEIGHT - _BOTTOM - top, 1 if count else 0):.1f}" data-h="{hint}"/>'
        )
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_draw_axes(frame, ticks)}{''.join(shapes)}</svg>{small}</figure>"
    )


def format_number(value: float) -> str:
    """Return a number with four digits that count, such as `0.03125`, `1,400` or `2e-05`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(abs(value)))
    text = f"{value:.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class _Frame:
    """Where a step and a value stand in the chart's picture."""

    first: float
    last: float
    low: float
    high: float
    is_log: bool

    def x(self, step: float) -> float:
        """Return the place of a step from the left; a single one stands in the middle."""
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Return the place of a value from the top."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _with_finite_values(lines: Sequence[Line]) -> tuple[list[Line], int]:
    """Return the lines that have finite values with these alone, and how many others there were."""
    finite, invalid = [], 0
    for line in lines:
        points = [point for point in line.points if math.isfinite(point[1])]
        invalid += len(line.points) - len(points)
        if points:
            smooth = [p for p in line.smooth if math.isfinite(p[1])] if line.smooth else None
            finite.append(Line(line.name, points, line.color, smooth))
    return finite, invalid


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values that span `low` to `high`."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(
        size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) <= count
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded: 3 * 0.1 is not 0.3.
    return [float(f"{n * step:.10g}") for n in range(first, last + 1)]


_LEAST_GAP = 0.08
"""How far apart two numbers of an axis are at least, as a share of its height."""


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that span `low` to `high`, with their halves where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 5)
    ticks = [
        float(f"{factor}e{power}") for power in range(first, last + 1, every) for factor in factors
    ]
    inside = [tick for tick in ticks if low <= tick <= high]
    above = min((tick for tick in ticks if tick >= high), default=high)
    # The lowest value has a number of its own, unless that would touch the one above it.
    nearest = min([*inside, above])
    is_apart = math.log(nearest / low) > _LEAST_GAP * math.log(above / low)
    return sorted({*inside, above} | ({low} if is_apart else set()))


def _draw_axes(frame: _Frame, ticks: Sequence[float]) -> str:
    """Return the grid with its numbers."""
    pieces = []
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        y = frame.y(tick)
        pieces.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{text}</text>'
        )
    for step in _step_ticks(frame.first, frame.last):
        pieces.append(
            f'<text x="{frame.x(step):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">'
            f"{_tick_text(step)}</text>"
        )
    return "".join(pieces)


def _step_ticks(first: float, last: float) -> list[float]:
    """Return whole numbers within the steps."""
    if first == last:
        return [first]
    ticks = [tick for tick in _ticks(first, last, 5) if first <= tick <= last]
    return [tick for tick in ticks if tick == int(tick)] or [math.ceil(first)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return the numbers of an axis, with as many digits as tell them apart."""
    texts = [_tick_text(tick) for tick in ticks]
    digits = 3
    while len(set(texts)) < len(texts) and digits < 12:
        digits += 1
        texts = [f"{tick:,.{digits}g}" for tick in ticks]
    return texts


def _tick_text(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):g}{sign}"
    return format_number(value)


def _draw_line(frame: _Frame, line: Line) -> str:
    style = f'style="stroke:{line.stroke}"'
    path = _path(frame, line.points)
    if line.smooth:
        smooth = _path(frame, line.smooth)
        return (
            f'<path class="line raw" {style} d="{path}"/><path class="line" {style} d="{smooth}"/>'
        )
    marks = ""
    if len(line.points) <= _MARKED_POINTS:
        marks = "".join(
            f'<circle cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.4" '
            f'style="fill:{line.stroke}"/>'
            for step, value in line.points
        )
    return f'<path class="line" {style} d="{path}"/>{marks}'


def _path(frame: _Frame, points: Points) -> str:
    return "M" + "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in points)


def _chart_values(frame: _Frame, lines: Sequence[Line]) -> str:
    """Return what the script needs, as JSON."""
    return json.dumps(
        {
            "width": _WIDTH, "left": _LEFT, "right": _WIDTH - _RIGHT,
            "first": frame.first, "last": frame.last,
            "lines": [
                {"name": line.name, "points": [[s, float(f"{v:.5g}")] for s, v in line.points]}
                for line in lines
            ],
        },
        separators=(",", ":"),
    )  # fmt: skip
