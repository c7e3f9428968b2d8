"""Pieces of HTML that the pages of reports are made of. Cells named HTML are taken as they are."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from luthier.report.charts import format_number
from luthier.terminal import pluralize

MAX_TEXT = 1500
"""Characters of a reply or a prompt on a page."""
_MAX_CHARTS, _FIRST_CHARTS = 48, 8
"""Charts on a page, and those of them that are open at first."""

REPORT_STYLE = """
main { max-width: 68rem }
.top p { font-size: 1rem; max-width: 52rem; overflow-wrap: anywhere }
.top p.from, p.from { color: var(--faint); font-size: .85rem }
.state { font-size: .8rem; font-weight: 600; padding: .15rem .6rem; border-radius: 1rem;
  border: 1px solid currentColor; color: var(--note); white-space: nowrap }
.state.finished { color: var(--good) } .state.failed, .state.killed { color: var(--bad) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr));
  gap: .8rem; margin: 1.3rem 0 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem 1rem; min-width: 0; box-shadow: 0 1px 3px var(--lift) }
.tile b { display: block; font-size: .85rem; font-weight: 500; color: var(--soft);
  overflow-wrap: anywhere }
.tile span { font-size: 1.45rem; font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.tile span em { font-style: normal; color: var(--faint); font-size: 1rem }
.tile small { display: block; color: var(--faint); font-size: .8rem }
.better { color: var(--good) } .worse { color: var(--bad) }
nav.parts { position: sticky; top: 0; z-index: 1; background: var(--paper); display: flex;
  flex-wrap: wrap; gap: .2rem 1.2rem; padding: .6rem 0; margin: 1.2rem 0 1rem; font-size: .88rem;
  border-bottom: 1px solid var(--line) }
a { color: var(--accent); text-decoration: none } a:hover { text-decoration: underline }
section { scroll-margin-top: 4rem } section h2 { font-size: 1.05rem }
section h3 { font-size: .9rem; margin: 1.3rem 0 .2rem } section > p { font-size: .9rem }
section > .wide { margin-top: .7rem }
td { overflow-wrap: break-word } .left td { overflow-wrap: anywhere }
td code { font: 12.5px var(--mono) }
.left td, .left th { text-align: left } .left td:first-child { color: var(--soft); width: 11rem }
pre { background: var(--sunk); padding: .6rem .8rem; border-radius: 6px }
pre.tokens { background: none; padding: 0 } pre.error { color: var(--bad) }
details { margin-top: .9rem } summary { cursor: pointer; color: var(--accent); font-size: .9rem }
article { border-top: 1px solid var(--line); padding: .9rem 0 .3rem; margin-top: .9rem }
.reply { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: .7rem; margin-top: .5rem }
.reply > div { min-width: 0 } .reply b { font-size: .78rem; color: var(--faint); font-weight: 500 }
.reply pre { margin: .15rem 0 0; color: var(--ink); max-height: 22rem; overflow-y: auto }
.reply .same pre { box-shadow: inset 3px 0 0 var(--good) }
.prompt { margin: 0; color: var(--ink); background: none; padding: 0; font-weight: 500 }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .25rem .7rem;
  align-items: center; font-size: .87rem; margin-top: .5rem }
.bars i { display: block; height: .8rem; border-radius: 3px; background: var(--s1); min-width: 2px }
.bars span { font-variant-numeric: tabular-nums; color: var(--soft); max-width: 34vw;
  overflow-wrap: anywhere }
@media (max-width: 560px) { main { padding: 1.3rem .8rem 3rem } section { padding: .8rem .8rem }
  nav.parts { position: static } th, td { padding: .3rem .4rem }
  .left td:first-child { width: 7rem } }
@media print { .reply pre { max-height: none } a { color: inherit } details > * { display: block } }
"""

Rows = Iterable[tuple[str, str]]
"""Names with their values; those without a value are left out."""


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are HTML, heads are plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def html_pairs(rows: Rows) -> str:
    """Return names and values as a table; both are plain text."""
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows if value
    )
    return f'<div class="wide"><table class="left">{body}</table></div>' if body else ""


def html_bars(values: Mapping[str, float]) -> str:
    """Return bars with their names and values."""
    most = max(values.values(), default=0) or 1
    cells = "".join(
        f"<span>{escape(name)}</span><i style='width:{100 * value / most:.1f}%'></i>"
        f"<span>{format_number(value)}</span>"
        for name, value in values.items()
    )
    return f'<div class="bars">{cells}</div>'


def html_texts(columns: Iterable[tuple[str, Any, bool]]) -> str:
    """Return texts side by side: what each is called, the text, and whether it is as expected."""
    cells = "".join(
        f"<div{' class=same' if is_same else ''}><b>{escape(name)}{' ✓' if is_same else ''}</b>"
        f"<pre>{html_cut(text, MAX_TEXT)}</pre></div>"
        for name, text, is_same in columns
        if text is not None
    )
    return f'<div class="reply">{cells}</div>'


def html_cut(value: Any, limit: int) -> str:
    """Return a text as HTML, cut where it is longer than `limit` characters."""
    text = "" if value is None else str(value)
    if len(text) <= limit:
        return escape(text)
    return f"{escape(text[:limit])} … {len(text) - limit:,} more characters"


def html_details(summary: str, html: str) -> str:
    """Return what is shown when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def html_charts(charts: Iterable[str]) -> str:
    """Return charts in columns, the later ones folded away; charts that are empty are left out."""
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    first, more = charts[:_FIRST_CHARTS], charts[_FIRST_CHARTS:_MAX_CHARTS]
    html = f'<div class="charts">{"".join(first)}</div>'
    if more:
        count = pluralize(len(more), "more curve")
        html += html_details(count, f'<div class="charts">{"".join(more)}</div>')
    if len(charts) > _MAX_CHARTS:
        left_out = f"{len(charts) - _MAX_CHARTS:,} further curves are left out"
        html += f"<p>{left_out}; all numbers are in metrics.jsonl.</p>"
    return html


def format_duration(seconds: float) -> str:
    """Return a time such as `42 s`, `5 min 16 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
