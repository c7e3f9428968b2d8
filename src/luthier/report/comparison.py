"""Several runs on one page: curves over one another, settings that differ, results, replies."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from luthier.inspection.render import TOKEN_STYLE
from luthier.record.config_diff import NEUTRAL_KEYS, differing_keys, flatten_config
from luthier.redaction import redact_text
from luthier.report.charts import (
    CHART_SCRIPT,
    CHART_STYLE,
    COLORS,
    Line,
    draw_lines,
    format_number,
    smooth_points,
)
from luthier.report.html_elements import (
    MAX_TEXT,
    REPORT_STYLE,
    format_duration,
    html_charts,
    html_cut,
    html_table,
    html_texts,
)
from luthier.report.run_files import RunFiles, read_run_files
from luthier.report.run_report import describe_run, describe_state
from luthier.report.scores import INTERVAL_NOTE, Result, describe_interval, read_results
from luthier.storage.atomic import write_text
from luthier.web_page import render_page

_MAX_REPLIES, _MAX_SETTINGS, _MAX_VALUE = 12, 200, 200
_MAX_REPLY_RUNS = 8
"""Runs whose replies stand beside one another."""

_STYLE = """
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px;
  margin-right: .5rem; vertical-align: -1px; background: var(--mark) }
.runs td { vertical-align: top; white-space: nowrap }
.runs td:first-child { white-space: normal; min-width: 14rem }
td small { color: var(--faint); display: block; white-space: nowrap }
.settings td { text-align: left; min-width: 7rem; overflow-wrap: anywhere }
.settings th { text-align: left } .settings td:first-child { font: 12.5px var(--mono);
  overflow-wrap: normal }
.settings .other { color: var(--accent); font-weight: 600 }
"""


def write_comparison(folders: Sequence[Path], path: Path) -> None:
    """Write a page that compares these runs, of which the first is the one to compare with.

    Raises UserError where a file of a run is damaged, and OSError where the page cannot be written.
    """
    write_text(path, render_comparison([read_run_files(folder) for folder in folders]))


def render_comparison(runs: Sequence[RunFiles]) -> str:
    """Return the page, without secrets."""
    names = distinct_names(runs)
    sections = {
        "Runs": _runs_section(runs, names),
        "Results": _results_section(runs, names),
        "Curves": _curves_section(runs, names),
        "Settings": _settings_section(runs, names),
        "Replies": _replies_section(runs, names),
    }
    parts = "\n".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>{html}</section>'
        for name, html in sections.items()
        if html
    )
    title = f"{len(runs)} runs compared"
    links = "".join(
        f'<a href="#{name.lower()}">{name}</a>' for name, html in sections.items() if html
    )
    body = (
        f'<div class="top"><h1>{title}</h1><p>{escape(", ".join(names[:12]))}'
        f'{" …" if len(names) > 12 else ""}</p></div><nav class="parts">{links}</nav>{parts}'
    )
    style = TOKEN_STYLE + CHART_STYLE + REPORT_STYLE + _STYLE
    return redact_text(render_page(title, body, style, CHART_SCRIPT))


def distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    paths = [run.folder.parts or (str(run.folder),) for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {run.folder}" for number, run in enumerate(runs, start=1)]


def _color(number: int) -> int:
    """Return the colour of a run; runs beyond the colours of the page are faint."""
    return number + 1 if number < COLORS else 0


def _label(number: int, name: str) -> str:
    color = f"var(--s{_color(number)})" if _color(number) else "var(--line)"
    return f'<span class="swatch" style="--mark:{color}"></span>{escape(name)}'


def _runs_section(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    rows = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        peak = run.record.get("peak_memory_gib") or {}
        seconds = run.record.get("training_seconds")
        rows.append(
            [
                f"{_label(number, name)}<small style='white-space:normal'>"
                f"{escape(describe_run(run))}</small>",
                escape(describe_state(run)),
                f"{run.last_step:,}",
                format_duration(seconds) if seconds else "–",
                ", ".join(f"{gib:,.2f} GiB" for gib in peak.values()) or "–",
            ]
        )
    heads = ["", "status", "steps", "training", "memory"]
    return html_table(heads, rows).replace("<table>", '<table class="runs">', 1)


def _results_section(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    results = [{result.name: result for result in read_results(run)} for run in runs]
    measured = dict.fromkeys(name for each in results for name in each)
    if not measured:
        return ""
    rows = [
        [_label(number, name), *(_result_cell(each.get(measure)) for measure in measured)]
        for number, (name, each) in enumerate(zip(names, results, strict=True))
    ]
    has_intervals = any(r.interval for each in results for r in each.values())
    note = f'<p class="from">{INTERVAL_NOTE}</p>' if has_intervals else ""
    return html_table(["", *measured], rows) + note


def _result_cell(result: Result | None) -> str:
    if result is None or result.after is None:
        return "–"
    before = "" if result.before is None else f"before: {format_number(result.before)}"
    notes = [text for text in (describe_interval(result), before) if text]
    return format_number(result.after) + "".join(f"<small>{text}</small>" for text in notes)


def _curves_section(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return a chart for each logged number, with a line for each run."""
    curves = [run.curves() for run in runs]
    order = dict.fromkeys(
        (name, line) for each in curves for name, lines in each.items() for line in lines
    )
    charts = []
    for name, line in order:
        drawn = []
        for number, (run_name, each) in enumerate(zip(names, curves, strict=True)):
            if points := each.get(name, {}).get(line):
                smooth = smooth_points(points) if line == "train" else None
                drawn.append(Line(run_name, points, _color(number), smooth))
        # Faint lines first, so that the others lie above them.
        drawn.sort(key=lambda each: each.color != 0)
        title = (
            name if line == "train" else f"{line}_{name}" if line == "eval" else f"{line}: {name}"
        )
        charts.append(draw_lines(title, drawn))
    return html_charts(charts)


def _settings_section(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return a table of the settings in which a run differs from the first one."""
    first = runs[0]
    keys: dict[str, None] = {}
    for run in runs[1:]:
        keys |= dict.fromkeys(
            key
            for key, *_ in differing_keys(first.config, run.config)
            if key.split(".")[0] not in NEUTRAL_KEYS
        )
    facts = [_facts(run) for run in runs]
    other = [name for name in facts[0] if len({each[name] for each in facts}) > 1]
    if not keys and not other:
        return "<p>Configuration, data, versions and machine are the same.</p>"
    settings = [flatten_config(run.config) for run in runs]
    rows = [
        [_breakable(key), *_value_cells([_value(each.get(key, "(absent)")) for each in settings])]
        for key in sorted(keys)[:_MAX_SETTINGS]
    ]
    rows += [[escape(name), *_value_cells([each[name] for each in facts])] for name in other]
    table = html_table(["", *names], rows).replace("<table>", '<table class="settings">', 1)
    left_out = len(keys) - _MAX_SETTINGS
    return table + (f"<p>{left_out:,} further settings differ.</p>" if left_out > 0 else "")


def _facts(run: RunFiles) -> dict[str, str]:
    """Return what decides a run's numbers besides its settings."""
    record = run.record
    git = (record.get("git") or {}).get("luthier") or {}
    hardware = record.get("hardware") or {}
    model = record.get("model") or {}
    versions = record.get("versions") or {}
    names = ("python", "luthier", "torch", "transformers", "trl", "peft", "bitsandbytes")
    return {
        "data (SHA-256)": str((record.get("data") or {}).get("sha256") or "")[:16],
        "weights (SHA-256)": str(model.get("weights_sha256") or "")[:16],
        "luthier's commit": str(git.get("commit") or "")[:12] + ("*" if git.get("dirty") else ""),
        "processor": str(hardware.get("cpu") or ""),
        "processes": str((record.get("launch") or {}).get("processes") or ""),
        **{f"{name} (version)": str(versions.get(name) or "") for name in names},
    }


def _breakable(key: str) -> str:
    """Return a key as HTML whose lines may break behind its dots and underscores."""
    return escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]} …"


def _value_cells(values: Sequence[str]) -> list[str]:
    """Return cells of a table; those that differ from the first one are marked."""
    return [
        f'<span class="other">{escape(value)}</span>' if value != values[0] else escape(value)
        for value in values
    ]


def _replies_section(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return the trained models' replies to the same prompts, side by side."""
    answered = [
        {(row.get("set") or "", str(row.get("prompt"))): row for row in run.replies}
        for run in runs[:_MAX_REPLY_RUNS]
    ]
    prompts = dict.fromkeys(key for each in answered for key in each)
    shared = [key for key in prompts if sum(key in each for each in answered) > 1]
    if not shared:
        return ""
    pieces = []
    for key in shared[:_MAX_REPLIES]:
        rows = [each.get(key) for each in answered]
        expected = next((row.get("expected") for row in rows if row), None)
        columns = [
            (name, row.get("after"), row.get("after") == expected and expected is not None)
            for name, row in zip(names, rows, strict=False)
            if row
        ]
        texts = html_texts([*columns, ("expected", expected, False)])
        label = f"{key[0]}: " if key[0] else ""
        prompt = escape(label) + html_cut(key[1], MAX_TEXT)
        pieces.append(f'<article><pre class="prompt">{prompt}</pre>{texts}</article>')
    notes = []
    if len(shared) > _MAX_REPLIES:
        notes.append(f"{_MAX_REPLIES} of {len(shared):,} shared prompts")
    if len(runs) > _MAX_REPLY_RUNS:
        notes.append(f"the first {_MAX_REPLY_RUNS} of {len(runs)} runs")
    note = f"<p>Shown: {'; '.join(notes)}.</p>" if notes else ""
    return note + "".join(pieces)
