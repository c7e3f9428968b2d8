"""Tokens as one self-contained HTML page."""

from collections.abc import Sequence
from html import escape

from luthier.inspect.tokens import Token

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #23211d; --faint: #8b867c;
  --line: #e4dfd4; --trained: #bfe8c4; --trained2: #a6dcad; --control: #b4690e; --stop: #6cc479; }
@media (prefers-color-scheme: dark) { :root { --paper: #1b1a18; --ink: #ece8df; --faint: #8d877b;
  --line: #35322d; --trained: #285c33; --trained2: #316e3d; --control: #e6a64f; --stop: #3f9950; } }
body { background: var(--paper); color: var(--ink); max-width: 62rem; margin: 3rem auto;
  padding: 0 1.5rem; font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1rem; margin: 0 }
p { margin: .2rem 0 } .faint { color: var(--faint) }
section { border-top: 1px solid var(--line); padding: 1.4rem 0 }
header.row { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0 0; font: 14px/1.85
  ui-monospace, "SF Mono", Menlo, Consolas, monospace }
i { font-style: normal; border-radius: 3px; padding: 2px 0; color: var(--faint);
  box-shadow: inset 1px 0 0 var(--line) }
i.t { background: var(--trained); color: var(--ink) }
i.t:nth-child(even) { background: var(--trained2) }
i.c { color: var(--control); font-weight: 600 } i.t.c { background: var(--stop); color: var(--ink) }
i.p { opacity: .5 } i:hover { outline: 2px solid var(--control); outline-offset: 1px }
b { font-weight: 400; opacity: .45 } small { color: var(--faint); font-size: .7em; padding: 0 2px }
.ids small { display: inline } small { display: none }
.key i { padding: 2px 8px; margin-right: .5rem }
button { font: inherit; font-size: .85rem; color: inherit; background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; padding: .15rem .7rem }
"""

KEY = (
    '<p class="key"><i class="t">trained</i><i class="t c">trained control token</i>'
    '<i>context</i><i class="c">control token</i><i class="p">padding</i>'
    "<button onclick=\"document.body.classList.toggle('ids')\">ids</button></p>"
)


def page(title: str, about: str, rows: Sequence[tuple[str, list[Token]]]) -> str:
    """Return the page: for each row its heading and its tokens, the origin of each as a hint."""
    sections = "".join(_section(heading, tokens) for heading, tokens in rows)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="faint">{escape(about)}</p>{KEY}{sections}'
        "</body></html>\n"
    )


def _section(heading: str, tokens: list[Token]) -> str:
    trained = sum(token.trained for token in tokens)
    real = [token for token in tokens if token.kind != "padding"]
    return (
        f'<section><header class="row"><h2>{escape(heading)}</h2><span class="faint">{len(real)} '
        f"tokens, {trained} trained, {len(tokens) - len(real)} padding</span></header>"
        f"<pre>{''.join(map(_token, tokens))}</pre></section>"
    )


def _token(token: Token) -> str:
    classes = [
        name
        for name, on in (
            ("t", token.trained),
            ("c", token.kind == "control"),
            ("p", token.kind == "padding"),
        )
        if on
    ]
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    inner = f"{_text(token.text)}<small>{token.id}</small>"
    return f'<i{attribute} title="{escape(_hint(token))}">{inner}</i>'


def _hint(token: Token) -> str:
    if token.kind == "padding":
        return "padding"
    origin = "template" if token.field is None else f"message {token.message}, {token.field}"
    return f"id {token.id}, {token.role or 'no role'}, {origin}, {token.kind}"


def _text(text: str) -> str:
    shown = escape(text)
    for sign, mark in (("\n", "<b>↵</b>\n"), ("\t", "<b>⇥</b>"), ("\r", "<b>␍</b>")):
        shown = shown.replace(sign, mark)
    return shown
