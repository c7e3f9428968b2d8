"""A sweep as one HTML page: its table, its plots and its best recipe, with nothing to fetch."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from luthier.redaction import redact_text
from luthier.storage.atomic import write_text
from luthier.sweep.objective import Objective
from luthier.sweep.trials import (
    Trial,
    best_trial,
    format_number,
    format_time,
    format_value,
    rank_trials,
    short_names,
)
from luthier.web_page import render_page

_STYLE = """\
:root { --best: #fdf0f1; --mark: #d1495b }
@media (prefers-color-scheme: dark) { :root { --best: #3a2226; --mark: #f0818f } }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem }
img { max-width: 100%; display: block; background: #fff; border-radius: 6px }
pre { background: var(--sunk); padding: .8rem 1rem } code { font: 13px var(--mono) }
th:last-child, td:last-child { text-align: left } td.error { color: var(--mark); font-size: 12px;
  white-space: pre-wrap }
tr.best td { background: var(--best); font-weight: 600 }
"""
_HEADINGS = {
    "parameters": "Parameters against the objective",
    "parallel": "Parallel coordinates",
    "importance": "Importance",
    "front": "One objective against the other",
}
"""What stands above each plot, by the stem of its file."""


def write_page(
    title: str,
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    plots: Sequence[Path],
    recipes: Sequence[tuple[str, str]],
    path: Path,
) -> None:
    """Write the page to `path`, its plots and its style sheet within it.

    `plots` are PNG files of `draw_plots`; `recipes` are the best trials, each as the command that
    trains it and the text of its recipe.
    """
    goal = ", ".join(f"{objective.direction} {objective.name}" for objective in objectives)
    sections = [f"<h1>{html.escape(title)}</h1><p>{html.escape(goal)}; {_count_states(trials)}</p>"]
    sections.append(f"<h2>Trials, the best first</h2>{_trial_table(trials, objectives)}")
    for plot in plots:
        # Within the page, so that one file can be sent to others.
        data = base64.b64encode(plot.read_bytes()).decode()
        heading = _HEADINGS[plot.stem]
        image = f'<img alt="{heading}" src="data:image/png;base64,{data}">'
        sections.append(f"<h2>{heading}</h2>{image}")
    for command, text in recipes:
        sections.append(f"<h2>The best as a recipe</h2><p><code>{html.escape(command)}</code></p>")
        sections.append(f"<pre>{html.escape(text)}</pre>")
    write_text(path, redact_text(render_page(title, "\n".join(sections), _STYLE)))


def _count_states(trials: Sequence[Trial]) -> str:
    """Return how many trials have each state, as in `4 finished, 2 failed`."""
    states = dict.fromkeys(trial.state for trial in trials)
    return ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in states)


def _trial_table(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """Return the trials as an HTML table, the best marked, an error below its trial."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    headings = ["trial", *(short for _, short in short_names(keys))]
    headings += [*(objective.name for objective in objectives), "steps", "time", "state"]
    best_numbers = {trial.number for trial in best_trial(trials, objectives)}
    rows = []
    for trial in rank_trials(trials, objectives):
        cells = [trial.name, *(format_value(trial.params.get(key, "")) for key in keys)]
        cells += [format_number(trial.values.get(objective.name)) for objective in objectives]
        cells += [str(trial.step or ""), format_time(trial.seconds), trial.state]
        style = ' class="best"' if trial.number in best_numbers else ""
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{style}>{row}</tr>")
        if trial.error:
            error = html.escape(trial.error)
            # An error is long and would stretch a column; in a row of its own it has the width.
            rows.append(f'<tr><td class="error" colspan="{len(cells)}">{error}</td></tr>')
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
