"""A sweep as one HTML page: its table, its plots and its best recipe, with nothing to fetch."""

import html
from collections.abc import Sequence
from pathlib import Path

from luthier.redaction import redact_text
from luthier.storage.atomic import write_text
from luthier.sweep.objective import Objective
from luthier.sweep.plots import Plot
from luthier.sweep.trials import (
    Trial,
    best_trial,
    describe_tie,
    format_distinct,
    format_value,
    rank_trials,
    short_names,
    tied_trials,
)
from luthier.terminal import format_duration
from luthier.web_page import render_page

_STYLE = """\
:root { --best: #fdf0f1; --mark: #d1495b }
@media (prefers-color-scheme: dark) { :root { --best: #3a2226; --mark: #f0818f } }
section { margin-top: 1.1rem } h2 { margin-bottom: .6rem }
svg { display: block; width: 100%; height: auto; min-width: 42rem; fill: var(--ink) }
td { white-space: nowrap }
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
    plots: Sequence[Plot],
    recipes: Sequence[tuple[str, str]],
    path: Path,
) -> None:
    """Write the page to `path`, its plots and its style sheet within it.

    `plots` are those of `draw_plots`; `recipes` are the best trials, each as the command that
    trains it and the text of its recipe.
    """
    goal = ", ".join(f"{objective.direction} {objective.name}" for objective in objectives)
    head = f"<h1>{html.escape(title)}</h1><p>{html.escape(goal)}; {_count_states(trials)}</p>"
    tie = describe_tie(trials, objectives)
    note = f'<p class="note">{html.escape(tie)}</p>' if tie else ""
    table = f"{_trial_table(trials, objectives)}{note}"
    sections = [_section("Trials, the best first", table)]
    for plot in plots:
        # Within the page, so that one file can be sent to others.
        sections.append(_section(_HEADINGS[plot.path.stem], f'<div class="wide">{plot.svg}</div>'))
    for command, text in recipes:
        recipe = f"<p><code>{html.escape(command)}</code></p><pre>{html.escape(text)}</pre>"
        sections.append(_section("The best as a recipe", recipe))
    body = "\n".join([head, *sections])
    write_text(path, redact_text(render_page(title, body, _STYLE)))


def _section(heading: str, body: str) -> str:
    """Return a card of the page; `body` is HTML."""
    return f"<section><h2>{heading}</h2>{body}</section>"


def _count_states(trials: Sequence[Trial]) -> str:
    """Return how many trials have each state, as in `4 finished, 2 failed`."""
    states = dict.fromkeys(trial.state for trial in trials)
    return ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in states)


def _trial_table(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """Return the trials as an HTML table, the best marked, an error below its trial."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    headings = ["trial", *(short for _, short in short_names(keys))]
    headings += [*(objective.name for objective in objectives), "steps", "time", "state"]
    leaders = [*best_trial(trials, objectives), *tied_trials(trials, objectives)]
    best_numbers = {trial.number for trial in leaders}
    ranked, rows = rank_trials(trials, objectives), []
    columns = [format_distinct([row.values.get(o.name) for row in ranked]) for o in objectives]
    for number, trial in enumerate(ranked):
        cells = [trial.name, *(format_value(trial.params.get(key, "")) for key in keys)]
        cells += [column[number] for column in columns]
        cells += [str(trial.step or ""), format_duration(trial.seconds), trial.state]
        style = ' class="best"' if trial.number in best_numbers else ""
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{style}>{row}</tr>")
        if trial.error:
            error = html.escape(trial.error)
            # An error is long and would stretch a column; in a row of its own it has the width.
            rows.append(f'<tr><td class="error" colspan="{len(cells)}">{error}</td></tr>')
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
