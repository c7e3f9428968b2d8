"""The report of one run: one HTML page that needs nothing else."""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from luthier.inspection.render import TOKEN_STYLE, render_key, render_row, render_tokens
from luthier.record.machine_info import main_versions
from luthier.redaction import redact_text
from luthier.report.charts import (
    CHART_SCRIPT,
    CHART_STYLE,
    Line,
    Points,
    draw_histogram,
    draw_lines,
    format_number,
    smooth_points,
)
from luthier.report.data_summary import StoredRow
from luthier.report.html_elements import (
    MAX_TEXT,
    REPORT_STYLE,
    format_duration,
    html_bars,
    html_charts,
    html_cut,
    html_details,
    html_pairs,
    html_table,
    html_texts,
)
from luthier.report.run_files import RunFiles, read_run_files
from luthier.report.scores import INTERVAL_NOTE, Result, describe_interval, read_results
from luthier.storage.atomic import write_text
from luthier.terminal import pluralize
from luthier.web_page import render_page

REPORT_FILE = "report.html"
_MAX_REPLIES = 24
"""Rows of replies on a page."""
_MAX_CONFIG_CHARS, _MAX_ERROR_CHARS = 60_000, 6_000
_MAX_OVERRIDES, _MAX_OVERRIDE_CHARS = 100, 500
_MAX_TILES = 6
_LINE_COLORS = {"train": 1, "eval": 2}


def write_report(folder: Path, path: Path | None = None) -> None:
    """Write the page of a run; `path` is `report.html` in its folder if it is None.

    Raises UserError where a file of the run is damaged, and OSError where the page cannot be
    written.
    """
    write_text(path or folder / REPORT_FILE, render_report(read_run_files(folder)))


def render_report(run: RunFiles) -> str:
    """Return the page of a run, without secrets."""
    results = read_results(run)
    sections = {
        "Results": _results_section(results) if len(results) > _MAX_TILES else "",
        "Curves": _curves_section(run),
        "Data": _data_section(run),
        "Replies": _replies_section(run),
        "Time and memory": _resources_section(run),
        "Configuration": _config_section(run),
        "Reproduce": _reproduce_section(run),
        "Warnings": _warnings_section(run),
    }
    sections = {name: html for name, html in sections.items() if html}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    parts = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{html}</section>'
        for name, html in sections.items()
    )
    body = f'{_top(run, results)}<nav class="parts">{links}</nav>\n{parts}'
    style = TOKEN_STYLE + CHART_STYLE + REPORT_STYLE
    return redact_text(render_page(f"{run.name}: report", body, style, CHART_SCRIPT))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


# The head of the page: what was trained, how it ended, and what came of it.


def _top(run: RunFiles, results: Sequence[Result]) -> str:
    state = escape(describe_state(run))
    error = str(run.record.get("error") or "")
    message = f'<pre class="error">{html_cut(error, _MAX_ERROR_CHARS)}</pre>' if error else ""
    began, ended = (str(run.record.get(name, "")) for name in ("started", "ended"))
    dates = " to ".join(filter(None, (_minutes(began), _minutes(ended))))
    tiles = "".join(_tile(result) for result in results[:_MAX_TILES])
    note = f'<p class="from">{INTERVAL_NOTE}</p>' if any(r.interval for r in results) else ""
    return (
        f'<div class="top"><header><h1>{escape(run.name)}</h1>'
        f'<span class="state {escape(run.status)}">{state}</span></header>'
        f"<p>{escape(describe_run(run))}</p>"
        f'<p class="from">{escape(str(run.folder))}{escape(f", {dates}" if dates else "")}</p>'
        f"{message}</div>" + (f'<div class="tiles">{tiles}</div>' if tiles else "") + note
    )


def describe_state(run: RunFiles) -> str:
    """Return how a run ended, in a few words."""
    if run.status != "stopped":
        after = f" after step {run.last_step}" if run.last_step else ""
        return run.status + ("" if run.status == "finished" else after)
    session = (run.record.get("sessions") or [{}])[-1]
    step, signal = session.get("to_step", run.last_step), session.get("signal")
    return f"stopped after step {step}" + (f" by {signal}" if signal else "")


def describe_run(run: RunFiles) -> str:
    """Return what was trained, on what and on which machine, as one sentence."""
    model = str((run.record.get("model") or {}).get("path") or run.setting("model.path") or "")
    files = (run.record.get("model") or {}).get("files") or []
    gguf = [name for name in files if str(name).endswith(".gguf")]
    method = run.setting("trainer.method") or "sft"
    train = (run.record.get("data") or {}).get("train") or {}
    rows = f"{train['rows']:,} rows" if train.get("rows") else "rows"
    processes = (run.record.get("launch") or {}).get("processes") or 1
    seconds = run.record.get("training_seconds") or run.record.get("seconds")
    took = f" in {format_duration(seconds)}" if seconds else ""
    steps = pluralize(run.last_step, "step") if run.last_step else "no step was logged"
    return (
        f"{model}{f' ({gguf[0]})' if gguf else ''}, trained by {method} ({_describe_weights(run)}) "
        f"on {rows} of {_describe_data(run)}: {steps}{took} on "
        f"{_describe_machine(run)}{f', {processes} processes' if processes > 1 else ''}."
    )


def _describe_weights(run: RunFiles) -> str:
    """Return what trains: an adapter or all weights, and in how many bits the base is."""
    lora, quantization = run.setting("lora") or {}, run.setting("quantization") or {}
    bits = next((f"{n} bits" for n in (4, 8) if quantization.get(f"load_in_{n}bit")), "")
    if not lora:
        what = "all weights"
    elif lora.get("r") is not None:
        what = f"LoRA of rank {lora['r']}"
    else:
        what = str(lora.get("peft_type") or "an adapter")
    return what + (f" on a base in {bits}" if bits else "")


def _describe_data(run: RunFiles) -> str:
    sources = run.setting("dataset.sources") or {}
    if sources:
        return ", ".join(map(str, sources))
    path = str(run.setting("dataset.path") or "the dataset")
    return Path(path).name if path.startswith(("/", ".")) else path


def _describe_machine(run: RunFiles) -> str:
    hardware = run.record.get("hardware") or {}
    gpus = [str(gpu.get("name")) for gpu in hardware.get("gpus") or []]
    if gpus and (run.record.get("launch") or {}).get("device") != "cpu":
        return f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else gpus[0]
    cores = hardware.get("cores")
    return f"{hardware.get('cpu') or 'a CPU'}{f' ({cores} cores)' if cores else ''}"


def _tile(result: Result) -> str:
    before = f"<em>{_number(result.before)} → </em>" if result.before is not None else ""
    notes = [text for text in (describe_change(result), describe_interval(result)) if text]
    small = "".join(f"<small>{text}</small>" for text in notes)
    value = f"<span>{before}{_number(result.after)}</span>"
    return f'<div class="tile"><b>{escape(result.name)}</b>{value}{small}</div>'


def describe_change(result: Result) -> str:
    """Return by how much a result changed, as HTML whose colour says whether that is good."""
    if result.before is None or result.after is None or result.before == result.after:
        return ""
    change = result.after - result.before
    sign = "+" if change >= 0 else "−"
    style = {True: ' class="better"', False: ' class="worse"', None: ""}[result.is_better]
    return f"<span{style} style='font-size:inherit'>{sign}{format_number(abs(change))}</span>"


def _number(value: float | None) -> str:
    return "–" if value is None else format_number(value)


# The sections; each is empty where the run has nothing for it.


def _results_section(results: Sequence[Result]) -> str:
    rows = [
        [
            escape(r.name),
            _number(r.before),
            _number(r.after),
            describe_change(r),
            describe_interval(r),
        ]
        for r in results
    ]
    return html_table(["", "before", "after", "change", "interval after"], rows)


def _curves_section(run: RunFiles) -> str:
    return html_charts(draw_curve(name, lines) for name, lines in run.curves().items())


def draw_curve(name: str, lines: Mapping[str, Points]) -> str:
    """Return the chart of one logged number, with a line for training and each evaluation set."""
    drawn, color = [], 3
    for line, points in lines.items():
        if line not in _LINE_COLORS:
            color += 1
        smooth = smooth_points(points) if line == "train" else None
        drawn.append(Line(line, points, _LINE_COLORS.get(line, (color - 1) % 8 + 1), smooth))
    return draw_lines(name, drawn)


def _data_section(run: RunFiles) -> str:
    data, counts = run.data, run.record.get("data") or {}
    pieces = [_counts_table(counts)]
    sources = (counts.get("train") or {}).get("sources") or {}
    charts = ""
    if data.histogram:
        q = data.quantiles
        limit = run.setting("chat.max_length")
        note = f"median {q['median']:,}, 90% up to {q['p90']:,}, longest {q['max']:,}"
        note += f", chat.max_length {limit:,}" if limit else ""
        charts = draw_histogram("tokens of a training sequence", data.histogram, note)
    if charts:
        pieces.append(f'<div class="charts">{charts}</div>')
    if len(sources) > 1:
        pieces.append("<h3>Rows of an epoch, by source</h3>" + html_bars(sources))
    if data.rows:
        has_images = any(row.images for row in data.rows)
        pieces.append("<h3>What trains: rows as the model reads them</h3>")
        pieces.append(f'<p class="key">{render_key(has_images)}</p>')
        pieces += map(_row, data.rows)
    elif data.remark:
        pieces.append(f"<p>{escape(data.remark)}</p>")
    return "".join(pieces)


def _counts_table(counts: Mapping[str, Any]) -> str:
    """Return a table with a row for each split."""
    rows = []
    for name, split in counts.items():
        if not isinstance(split, dict) or not split.get("tokens"):
            continue
        dropped = sum((split.get("dropped") or {}).values())
        rows.append(
            [
                escape(name.replace("_", " ")),
                *(f"{int(split.get(key) or 0):,}" for key in ("rows", "sequences", "tokens")),
                f"{(split.get('trained_tokens') or 0) / split['tokens']:.0%}",
                f"{int(split.get('longest') or 0):,}",
                f"{dropped:,}",
            ]
        )
    heads = ["", "rows", "sequences", "tokens", "trained", "longest", "left out"]
    return html_table(heads, rows) if rows else ""


def _row(row: StoredRow) -> str:
    pieces = [*row.pieces()]
    # Images stand before the gap, where each is one piece for several tokens.
    inside = sum(image.tokens - 1 for image in row.images)
    at = row.left_out_at - inside
    tokens = render_tokens(pieces[:at] if row.left_out else pieces)
    if row.left_out:
        tokens += f' <i class="p">… {row.left_out:,} tokens left out …</i> '
        tokens += render_tokens(pieces[at:])
    return render_row(row.heading, row.place, row.counts, row.notes, tokens, "article")


def _replies_section(run: RunFiles) -> str:
    if not run.replies:
        return ""
    shown = run.replies[:_MAX_REPLIES]
    note = ""
    if len(run.replies) > len(shown):
        note = f"<p>{len(shown)} of {len(run.replies):,} rows; all are in replies.jsonl.</p>"
    first, more = shown[:6], shown[6:]
    html = note + "".join(map(_reply, first))
    if more:
        html += html_details(f"{len(more)} more rows", "".join(map(_reply, more)))
    return html


def _reply(row: Mapping[str, Any]) -> str:
    expected = row.get("expected")
    columns = [
        ("before", row.get("before"), False),
        ("after", row.get("after"), row.get("after") == expected and expected is not None),
        ("expected", expected, False),
    ]
    scores = row.get("scores")
    counts = []
    for name, pair in scores.items() if isinstance(scores, dict) else ():
        before, after = (
            pair.get(when) if isinstance(pair, dict) else None for when in ("before", "after")
        )
        counts.append(f"{name} {_score(before)} → {_score(after)}")
    head = f"{row['set']}: " if row.get("set") else ""
    return (
        f'<article><pre class="prompt">{escape(head)}{html_cut(row.get("prompt"), MAX_TEXT)}</pre>'
        f"{html_texts(columns)}<p>{escape(', '.join(counts))}</p></article>"
    )


def _score(value: Any) -> str:
    return format_number(value) if isinstance(value, int | float) else "–"


def _resources_section(run: RunFiles) -> str:
    record = run.record
    hardware, launch = record.get("hardware") or {}, record.get("launch") or {}
    seconds, trained = record.get("seconds"), record.get("training_seconds")
    speed = [row["tokens_per_second"] for row in run.metrics if row.get("tokens_per_second")]
    tokens = [row["num_tokens"] for row in run.metrics if row.get("num_tokens")]
    peak = record.get("peak_memory_gib") or {}
    plan = record.get("memory_plan") or {}
    rows = [
        ("whole run", format_duration(seconds) if seconds else ""),
        ("training alone", format_duration(trained) if trained else ""),
        ("steps", f"{run.last_step:,}"),
        ("tokens seen", f"{int(tokens[-1]):,}" if tokens else ""),
        ("tokens per second", f"{sorted(speed)[len(speed) // 2]:,.0f} (median)" if speed else ""),
        ("memory planned", _describe_plan(plan)),
        *((f"memory at the peak ({name})", f"{gib:,.2f} GiB") for name, gib in peak.items()),
        (
            "processes",
            f"{launch.get('processes', '')} {_unless_none(launch.get('sharding'))}".strip(),
        ),
        ("precision", str(launch.get("precision") or "")),
        ("device", _describe_machine(run)),
        ("main memory", f"{hardware['memory_gib']:,} GiB" if hardware.get("memory_gib") else ""),
        ("system", str(hardware.get("system") or "")),
    ]
    bars = {}
    if plan.get("gib") and peak:
        measured = peak.get("gpu") or peak.get("host")
        bars = {"planned": float(plan["gib"]), "measured": float(measured or 0)}
    pictures = "<h3>Memory at the peak, in GiB</h3>" + html_bars(bars) if bars else ""
    return html_pairs(rows) + pictures + _sessions_table(record)


def _describe_plan(plan: Mapping[str, Any]) -> str:
    if not plan.get("gib"):
        return ""
    return f"{plan['gib']:,.2f} GiB for {plan.get('rows')} rows of {plan.get('tokens'):,} tokens"


def _unless_none(value: Any) -> str:
    return "" if value in (None, "none") else f"({value})"


def _sessions_table(record: Mapping[str, Any]) -> str:
    """Return a table of the parts of a run that took several."""
    sessions = record.get("sessions") or []
    if len(sessions) < 2:
        return ""
    rows = [
        [
            escape(_minutes(str(session.get("started", "")))),
            escape(str(session.get("status", ""))),
            escape(str(session.get("signal", ""))),
            f"{session.get('from_step', 0)} – {session.get('to_step', '')}",
            format_duration(session.get("seconds") or 0),
            escape(str(session.get("host", ""))),
        ]
        for session in sessions
    ]
    heads = ["started", "ended as", "signal", "steps", "time", "host"]
    return f"<h3>The run in {len(rows)} parts</h3>" + html_table(heads, rows)


def _config_section(run: RunFiles) -> str:
    overrides = [str(word) for word in run.record.get("overrides") or []]
    recipe = run.record.get("recipe")
    base = f"recipe <code>{escape(str(recipe))}</code>" if recipe else "no recipe"
    typed = [word for word in overrides if not word.startswith("recipe=")]
    html = f"<p>{base}, {pluralize(len(typed), 'override')}.</p>"
    if typed:
        words = [html_cut(word, _MAX_OVERRIDE_CHARS) for word in typed[:_MAX_OVERRIDES]]
        more = [f"… {len(typed) - len(words):,} more"] if len(typed) > len(words) else []
        html += f"<pre>{chr(10).join([*words, *more])}</pre>"
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        text = f"<pre>{html_cut(text, _MAX_CONFIG_CHARS)}</pre>"
        html += html_details("the whole configuration, resolved", text)
    return html


def _reproduce_section(run: RunFiles) -> str:
    record = run.record
    words = [str(word) for word in record.get("overrides") or []]
    command = shlex.join(["luthier", "train", *words])
    folder = shlex.quote(str(run.folder))
    git = (record.get("git") or {}).get("luthier") or {}
    here = (record.get("git") or {}).get("here") or {}
    model, tokenizer = record.get("model") or {}, record.get("tokenizer") or {}
    seeds = record.get("seeds") or {}
    kernels = ", deterministic kernels" if seeds.get("deterministic") else ""
    versions = main_versions(record.get("versions") or {})
    rows = [
        ("started in", str(record.get("cwd") or "")),
        (
            "seed",
            f"{seeds.get('seed', '')}{kernels}",
        ),
        ("luthier's commit", _commit(git)),
        ("commit of the folder", _commit(here) if here != git else ""),
        ("model revision", str(model.get("commit") or model.get("revision") or "")),
        ("weights, SHA-256", str(model.get("weights_sha256") or "")),
        ("tokenizer, SHA-256", str(tokenizer.get("sha256") or "")),
        ("template, SHA-256", str(tokenizer.get("template_sha256") or "")),
        ("token rows, SHA-256", str((record.get("data") or {}).get("sha256") or "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return (
        "<p>Train it again from its record, and compare every number:</p>"
        f"<pre>luthier reproduce {escape(folder)}</pre>"
        f"<p>It was started with:</p><pre>{html_cut(command, _MAX_ERROR_CHARS)}</pre>"
        f"{html_pairs(rows)}"
    )


def _commit(state: Mapping[str, Any]) -> str:
    if not state.get("commit"):
        return ""
    changed = len(state.get("changed_files") or [])
    files = f", with changes in {pluralize(changed, 'file')}" if changed else ""
    return f"{str(state['commit'])[:12]} on {state.get('branch')}{files}"


def _warnings_section(run: RunFiles) -> str:
    """Return what a reader of the numbers has to know: what was left out, changed or cut."""
    warnings = [*_recorded_warnings(run), *_data_warnings(run)]
    if any(session.get("status") == "killed" for session in run.record.get("sessions") or []):
        warnings.append("A part of the run was killed; it was resumed from a checkpoint.")
    for extension in run.record.get("extended") or []:
        changes = ", ".join(map(str, extension.get("changes", [])))
        warnings.append(
            f"The run was given another length at step {extension.get('at_step')}: {changes}."
        )
    git = (run.record.get("git") or {}).get("luthier") or {}
    if git.get("dirty"):
        warnings.append("luthier's own code had changes on top of its commit; they are in code/.")
    if not warnings:
        return ""
    return "".join(f'<p class="note">{text}</p>' for text in map(escape, warnings))


def _recorded_warnings(run: RunFiles) -> list[str]:
    warnings = []
    for warning in run.record.get("warnings") or []:
        if isinstance(warning, dict):
            fix = f" Set {warning['fix']}" if warning.get("fix") else ""
            warnings.append(f"{warning.get('key')}: {warning.get('text')}{fix}")
    return warnings


def _data_warnings(run: RunFiles) -> list[str]:
    train = (run.record.get("data") or {}).get("train") or {}
    warnings = [
        f"{pluralize(count, 'row was', 'rows were')} left out of training: {reason}."
        for reason, count in (train.get("dropped") or {}).items()
    ]
    if train.get("cut_rows"):
        count = pluralize(train["cut_rows"], "row was", "rows were")
        warnings.append(f"{count} cut to fit chat.max_length.")
    if train.get("lossy_rows"):
        count = pluralize(train["lossy_rows"], "row is", "rows are")
        warnings.append(f"{count} not shown whole by the chat template.")
    if run.dropped:
        examples = "; ".join(f"{row.get('where')}: {row.get('problem')}" for row in run.dropped[:3])
        count = pluralize(len(run.dropped), "row")
        warnings.append(f"dropped.jsonl lists {count}, such as {examples}"[:1000])
    return warnings


def _minutes(date: str) -> str:
    """Return a date without its seconds, such as `2026-11-29 16:05`."""
    return date[:16].replace("T", " ")
