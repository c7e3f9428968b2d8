"""A sweep as one HTML page: its table, its pictures and its best recipe, with nothing to fetch."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from luthier.record.files import write_text
from luthier.sweep.objective import Objective
from luthier.sweep.table import best, ranked, shown_number, shown_time
from luthier.sweep.trials import Trial, short_names, shown_value

_STYLE = """\
:root { --ink: #222; --soft: #777; --line: #e4e4e4; --best: #fdf0f1; --mark: #d1495b; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2.5rem auto;
  padding: 0 1rem; max-width: 1080px; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p, .soft { color: var(--soft); margin: .2rem 0; }
img { max-width: 100%; display: block; } pre { background: #f6f6f4; padding: .8rem 1rem;
  overflow-x: auto; font-size: 13px; } code { font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px;
  width: 100%; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid var(--line);
  padding: .3rem .7rem; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: .25rem .7rem; }
th:last-child, td:last-child { text-align: left; } td.error { color: var(--mark); font-size: 12px;
  white-space: pre-wrap; }
tr.best td { background: var(--best); font-weight: 600; }
"""
_TITLES = {
    "parameters": "Parameters against the objective",
    "parallel": "Parallel coordinates",
    "importance": "Importance",
    "front": "One objective against the other",
}


def write_page(
    title: str,
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    pictures: Sequence[Path],
    recipes: Sequence[tuple[str, str]],
    path: Path,
) -> None:
    """Write the page; `recipes` are the best ones, each with its command and its text."""
    goal = ", ".join(f"{one.direction} {one.name}" for one in objectives)
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(goal)}; {_counts(trials)}</p>"]
    parts.append(f"<h2>Trials, the best first</h2>{_table(trials, objectives)}")
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        heading = _TITLES[picture.stem]
        image = f'<img alt="{heading}" src="data:image/png;base64,{data}">'
        parts.append(f"<h2>{heading}</h2>{image}")
    for typed, text in recipes:
        parts.append(f"<h2>The best as a recipe</h2><p><code>{html.escape(typed)}</code></p>")
        parts.append(f"<pre>{html.escape(text)}</pre>")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    write_text(path, head + "\n".join(parts) + "</body></html>\n")


def _counts(trials: Sequence[Trial]) -> str:
    states = dict.fromkeys(trial.state for trial in trials)
    return ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in states)


def _table(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    heads = ["trial", *(short for _, short in short_names(keys))]
    heads += [*(one.name for one in objectives), "steps", "time", "state"]
    front = {trial.number for trial in best(trials, objectives)}
    rows = []
    for trial in ranked(trials, objectives):
        cells = [trial.name, *(shown_value(trial.params.get(key, "")) for key in keys)]
        cells += [shown_number(trial.values.get(one.name)) for one in objectives]
        cells += [str(trial.step or ""), shown_time(trial.seconds), trial.state]
        style = ' class="best"' if trial.number in front else ""
        rows.append(f"<tr{style}>{''.join(f'<td>{html.escape(one)}</td>' for one in cells)}</tr>")
        if trial.error:
            span = len(cells)
            text = html.escape(trial.error)
            rows.append(f'<tr><td class="error" colspan="{span}">{text}</td></tr>')
    top = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(rows)}</table></div>'
