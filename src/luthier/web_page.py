"""Pages of one HTML file with one look: `preview --html`, a run's report, a sweep's page.

Nothing is fetched: style, script and pictures are in the file. What others wrote comes through
`html.escape` where it is put into a page.
"""

from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #262420;
  --soft: #6d685f; --faint: #918b80; --line: #e6e1d7; --sunk: #f4f1ea; --note: #a5470f;
  --note-bg: #fdf1e6; --lift: #0000000f; --good: #2c7a3f; --bad: #b3261e; --accent: #2563a8;
  --s1: #2563a8; --s2: #d1573c; --s3: #3c8a4e; --s4: #8a5fb5; --s5: #b07d10; --s6: #15858c;
  --s7: #c04a86; --s8: #6b6f76;
  --mono: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", Consolas, monospace }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --card: #1e1d1a; --ink: #ebe7de;
  --soft: #a8a296; --faint: #858075; --line: #34312c; --sunk: #26241f; --note: #f0a56b;
  --note-bg: #3a2717; --lift: #00000040; --good: #6cc07d; --bad: #f28b82; --accent: #82b1e8;
  --s1: #82b1e8; --s2: #f0957c; --s3: #7cc48d; --s4: #bda0e0; --s5: #dcb55a; --s6: #66c3c9;
  --s7: #ea93bf; --s8: #a3a7ae } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { background: var(--paper); color: var(--ink); margin: 0;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.45rem; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: .95rem; margin: 0 }
p { margin: .25rem 0 0; color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1.1rem 1.1rem; margin: 0 0 1.1rem; box-shadow: 0 1px 3px var(--lift) }
header { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline }
.note { background: var(--note-bg); color: var(--note); border-radius: 6px; padding: .4rem .7rem;
  margin: .7rem 0 0; overflow-wrap: anywhere }
pre { margin: .7rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font: 13px/1.6 var(--mono); tab-size: 4 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem;
  width: 100% }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: baseline }
th { color: var(--soft); font-weight: 600; overflow-wrap: break-word }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
th:last-child, td:last-child { padding-right: 0 }
tr:last-child > td { border-bottom: 0 }
#hint { position: fixed; z-index: 2; pointer-events: none; background: var(--ink);
  color: var(--paper); font-size: .8rem; padding: .25rem .6rem; border-radius: 6px; display: none;
  max-width: 90vw; white-space: pre-line }
@media print { body { background: #fff; font-size: 12px } main { max-width: none; padding: 0 }
  nav { position: static !important } section { box-shadow: none; break-inside: avoid } }
"""
"""The look of every page: colours for light and dark, text, cards, tables, paper."""

HINT_SCRIPT = """
const hint = document.getElementById('hint');
function showHint(text, at) {
  hint.style.display = text ? 'block' : 'none';
  if (!text) return;
  hint.textContent = text;
  const width = hint.offsetWidth, height = hint.offsetHeight;
  hint.style.left = Math.max(8, Math.min(at.left, innerWidth - width - 8)) + 'px';
  hint.style.top = (at.top > height + 12 ? at.top - height - 7 : at.bottom + 7) + 'px';
}
document.addEventListener('mouseover', event => {
  const marked = event.target.closest('[data-h]');
  if (marked) showHint(marked.dataset.h, marked.getClientRects()[0]);
  else if (!event.target.closest('[data-chart]')) showHint('');
});
"""
"""Shows the text of `data-h` of what the pointer is over."""


def render_page(title: str, body: str, style: str = "", script: str | None = None) -> str:
    """Return a page with the common style; `body` is HTML, `title` is plain text.

    `style` is added to the common one. `script` runs behind the one that shows hints; None leaves
    out both.
    """
    scripts = ""
    if script is not None:
        scripts = f'<div id="hint"></div><script>{HINT_SCRIPT}{script}</script>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head>\n<body><main>{body}</main>{scripts}</body></html>\n"
    )
