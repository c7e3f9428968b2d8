"""Tokens in a terminal, with colours or marks, and as one self-contained HTML page."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from io import BytesIO
from itertools import groupby

from rich.console import Console
from rich.text import Text

from luthier.data.images.decode import decode_image
from luthier.data.rows import RowError
from luthier.inspection.tokens import DisplayedImage, DisplayedSequence, Token, TokenView
from luthier.web_page import render_page

TOKEN_STYLE = """
:root { --t1: #cdeed1; --t2: #abdfb2; --c: #a85d06; --stop: #58b163; --on-stop: #0d2b11 }
@media (prefers-color-scheme: dark) { :root { --t1: #244d2c; --t2: #2d6137; --c: #e5a954;
  --stop: #57b262; --on-stop: #0b210e } }
.key { display: flex; flex-wrap: wrap; gap: .5rem 1.1rem; align-items: center; font-size: .85rem;
  color: var(--soft) }
.key span { display: inline-flex; align-items: center; gap: .45rem }
.key i { padding: 1px 7px; font-family: var(--mono) }
.key label { margin-left: auto; cursor: pointer }
.row header span { color: var(--faint); font-size: .85rem; overflow-wrap: anywhere }
.row header .counts { margin-left: auto }
.tokens { font: 13.5px/1.95 var(--mono) }
.key i, .tokens i { font-style: normal; border-radius: 3px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone }
.tokens i { padding: 2px 0; box-shadow: inset 1px 0 0 var(--line) }
i.t { background: var(--t1); color: var(--ink) }
.tokens i.t { box-shadow: none }
i.t:nth-of-type(even) { background: var(--t2) }
i.c { color: var(--c); font-weight: 600 }
i.t.c, i.t.c:nth-of-type(even) { background: var(--stop); color: var(--on-stop) }
.tokens i.p { color: var(--faint); border: 1px dashed var(--line); padding: 1px 6px;
  box-shadow: none }
.key i.m, .tokens i.m { display: inline-block; vertical-align: middle; padding: 4px;
  margin: 2px 3px; border: 1px solid var(--line); border-radius: 6px; line-height: 1.4;
  box-shadow: none; white-space: normal; max-width: 100% }
i.m img { display: block; max-width: 100%; height: auto; margin: 0 auto 3px; border-radius: 3px }
.tokens u { text-decoration: none; font-size: .72em; font-weight: 600; margin: 0 5px 0 2px;
  opacity: .75 }
section.row.part { margin-top: -.6rem }
article.row.part { border-top: 0; margin-top: 0; padding-top: .7rem }
i.m em { color: var(--note); font-style: normal }
.tokens i:hover { outline: 2px solid var(--c); outline-offset: 1px }
.tokens b { font-weight: 400; opacity: .4 } .tokens small { display: none }
.ids .tokens small { display: inline; font-size: .68em; opacity: .65; margin: 0 3px 0 2px;
  font-weight: 400; vertical-align: 1px }
@media print { i.t, i.c { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""
"""How tokens look, on top of the style of all pages."""

_PAGE_STYLE = """
nav.key { position: sticky; top: 0; z-index: 1; margin: 1.2rem 0 1.4rem; padding: .6rem 0;
  background: var(--paper); border-bottom: 1px solid var(--line) }
"""

_KEY = (
    '<span><i class="t">trained</i>learned</span>'
    '<span><i class="t c">trained control</i>such as the stop token</span>'
    '<span><i class="c">control</i>steers, not learned</span>'
    "<span><i>context</i>read, not learned</span>"
)
_IMAGE_KEY = '<span><i class="m">image</i>read, not learned</span>'
THUMBNAIL_PIXELS = 192
"""The longest side of a picture on the page."""
_SMALL_PIXELS = 64
"""Pictures whose sides are all shorter are shown twice as large."""

_SCRIPT = """
const box = document.getElementById('ids');
box.onchange = () => document.body.classList.toggle('ids', box.checked);
box.onchange();
"""


def render_html(title: str, view: TokenView, ids: bool = False) -> str:
    """Return the page: for each sequence its heading and its tokens, each with where it is from."""
    sections = "\n".join(_section(row, view.pad) for row in view.rows)
    switch = f'<label><input type="checkbox" id="ids"{" checked" if ids else ""}> ids</label>'
    key = render_key(any(row.images for row in view.rows))
    body = (
        f"<h1>{escape(title)}</h1><p>{escape(view.about)}</p>"
        f'<nav class="key">{key}{switch}</nav>\n{sections}'
    )
    return render_page(title, body, TOKEN_STYLE + _PAGE_STYLE, _SCRIPT)


def render_key(has_images: bool) -> str:
    """Return what the colours of tokens mean, for an element of the class `key`."""
    return _KEY + (_IMAGE_KEY if has_images else "")


def _section(row: DisplayedSequence, pad: str) -> str:
    tokens = render_tokens(row.pieces)
    if row.padding:
        space = "" if row.tokens[-1].text.endswith("\n") else " "
        tokens += f'{space}<i class="p" data-h="padding">{_text(pad)} × {row.padding}</i>'
    place = row.place if row.is_first else ""
    return render_row(row.heading, place, row.counts, row.notes, tokens)


def render_row(
    heading: str, place: str, counts: str, notes: Iterable[str], tokens: str, tag: str = "section"
) -> str:
    """Return a sequence as an element of HTML; `tokens` is HTML, all else is plain text.

    Without a place it is a further part of the row above it.
    """
    paragraphs = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    body = f'<pre class="tokens">{tokens}</pre>' if tokens else ""
    names = "row" if place else "row part"
    return (
        f'<{tag} class="{names}"><header><h2>{escape(heading)}</h2><span>{escape(place)}</span>'
        f'<span class="counts">{escape(counts)}</span></header>{paragraphs}{body}</{tag}>'
    )


def render_tokens(pieces: Iterable[Token | DisplayedImage]) -> str:
    """Return tokens and images as HTML, in their order."""
    return "".join(map(_piece, pieces))


def _piece(piece: Token | DisplayedImage) -> str:
    return _image(piece) if isinstance(piece, DisplayedImage) else _token(piece)


def _image(image: DisplayedImage) -> str:
    """Return an image's box: the picture itself above its number of tokens."""
    hint = escape(f"{image.origin} · read, not learned")
    label = escape(image.label)
    try:
        picture = _thumbnail(image.read(), label)
    except RowError as error:
        picture = f"<em>{escape(f'the picture cannot be shown: {error}')}</em><br>"
    return f'<i class="m" data-h="{hint}">{picture}{label}<small> {image.ids}</small></i>'


def _thumbnail(data: bytes, label: str) -> str:
    """Return a small copy of a picture within the page; RowError where it cannot be decoded."""
    picture = decode_image(data)
    is_small = max(picture.size) <= THUMBNAIL_PIXELS
    if not is_small:
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # A drawing of a few pixels stays as it is, and a photograph takes few bytes.
    file, form = BytesIO(), "png" if is_small else "jpeg"
    picture.save(file, form)
    scale = 2 if max(picture.size) < _SMALL_PIXELS else 1
    address = f"data:image/{form};base64,{b64encode(file.getvalue()).decode()}"
    return f'<img src="{address}" alt="{label}" width="{picture.width * scale}">'


def _token(token: Token) -> str:
    names = ["t"] * token.trained + ["c"] * (token.kind == "control")
    attribute = f' class="{" ".join(names)}"' if names else ""
    hint = escape(f"{token.id} · {token.origin} · {_describe_role(token)}")
    # The id stands before the line break, beside its token.
    text = _text(token.text)
    body = text.removesuffix("\n")
    tag = "" if token.tag is None else f"<u>{escape(token.tag)}</u>"
    inner = f"{body}<small>{token.id}</small>{tag}{text[len(body) :]}"
    return f'<i{attribute} data-h="{hint}">{inner}</i>'


def _describe_role(token: Token) -> str:
    """What the token is there for, in words."""
    if token.kind == "control":
        return "trained control token" if token.trained else "control token"
    return token.kind if token.tag is None else f"{token.kind}: {token.tag}"


def _text(text: str) -> str:
    html = escape(text)
    for sign, mark in (("\n", "<b>↵</b>\n"), ("\t", "<b>⇥</b>\t"), ("\r", "<b>␍</b>")):
        html = html.replace(sign, mark)
    return html


# Two shades of each kind take turns, so that the boundary between two tokens can be seen. Ground
# and ink are both given: they can be read in a light and in a dark terminal.
SHADES = {
    "trained": ("#10240f on #a5dba9", "#10240f on #86cb8c"),
    "trained control": ("bold #10240f on #4caf57", "bold #10240f on #4caf57"),
    "context": ("#e8e4dc on #4b4843", "#e8e4dc on #605c55"),
    "control": ("bold #f0bd6d on #4b4843", "bold #f0bd6d on #605c55"),
    "image": ("#dbe8f7 on #35506e", "#dbe8f7 on #35506e"),
    "padding": ("dim", "dim"),
}
_TAG_STYLE = "bold #4caf57"
_MARKS = "«trained»  {control}  other tokens are context  | stands between tokens"


def has_colours(console: Console) -> bool:
    """Whether what is printed is seen in colours."""
    return bool(console.color_system) and not console.no_color


def print_legend(console: Console, has_images: bool = False, has_tags: bool = False) -> None:
    """Say what the colours or marks mean; `has_images`, `has_tags`: those of these, too."""
    if not has_colours(console):
        marks = _MARKS + "  [image WIDTHxHEIGHT: its tokens, not trained]" * has_images
        marks += "  =TAG is the tag that a word's first token trains" * has_tags
        console.print(marks, markup=False, soft_wrap=True)
        return
    text = Text()
    names = ("trained", "trained control", "context", "control", *["image"] * has_images)
    for name in names:
        text.append(f" {name} ", style=SHADES[name][0]).append("  ")
    if has_tags:
        text.append("=TAG", style=_TAG_STYLE).append("  ")
    console.print(text.append("× padding", style="dim"))


def print_view(console: Console, view: TokenView, ids: bool = False) -> None:
    """Print rows below one another, what the colours or marks mean first."""
    has_tags = any(token.tag is not None for row in view.rows for token in row.tokens)
    print_legend(console, any(row.images for row in view.rows), has_tags)
    for row in view.rows:
        # The parts of a row stand together.
        if row.is_first:
            console.print()
        print_sequence(console, row, view.pad, ids)


def print_sequence(console: Console, row: DisplayedSequence, pad: str, ids: bool = False) -> None:
    """Print one sequence under its heading; with `ids`, each token is followed by its id."""
    bright = Text(row.heading, style="bold")
    bright.append(f"  {row.place}" if row.is_first else "", style="not bold")
    console.print(bright.append(f"  {row.counts}", style="not bold dim"), soft_wrap=True)
    for note in row.notes:
        console.print(Text(note, style="bold #c8641e"), soft_wrap=True)
    if not row.tokens:
        return
    coloured = has_colours(console)
    drawn = _coloured(row.pieces, ids) if coloured else Text(mark_tokens(row.pieces, ids))
    if row.padding:
        drawn.append(f" {show_whitespace(pad)} × {row.padding}", SHADES["padding"][0])
    console.print(drawn, soft_wrap=True)


def _coloured(pieces: Iterable[Token | DisplayedImage], ids: bool) -> Text:
    text = Text()
    for n, token in enumerate(pieces):
        if isinstance(token, DisplayedImage):
            text.append(_box(token), style=SHADES["image"][0])
            text.append(f"{token.ids} " if ids else "", style="dim")
            continue
        name = "trained control" if token.trained and token.kind == "control" else token.kind
        shown = show_whitespace(token.text)
        # The id stands before the line break, beside its token.
        body = shown.removesuffix("\n") if ids or token.tag is not None else shown
        text.append(body, style=SHADES[name][n % 2])
        if token.tag is not None:
            text.append(f"={token.tag}", style=_TAG_STYLE).append("" if ids else " ")
        if ids:
            text.append(f"{token.id} ", style="dim").append(shown[len(body) :])
    return text


def mark_tokens(pieces: Iterable[Token | DisplayedImage], ids: bool = False) -> str:
    """The tokens in plain text with marks for their boundaries and what trains."""
    runs = []
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        inner = "|".join(_mark(token, ids) for token in run)
        runs.append(f"«{inner}»" if trained else inner)
    return "|".join(runs)


def _box(image: DisplayedImage) -> str:
    return f"[{image.label}]"


def _mark(token: Token | DisplayedImage, ids: bool) -> str:
    if isinstance(token, DisplayedImage):
        return _box(token) + (f":{token.ids}" if ids else "")
    shown = show_whitespace(token.text)
    text = shown.removesuffix("\n")
    body = f"{{{text}}}" if token.kind == "control" else text
    body += "" if token.tag is None else f"={token.tag}"
    return (f"{body}:{token.id}" if ids else body) + shown[len(text) :]


def show_whitespace(text: str) -> str:
    """Show line breaks and tabs as signs; a line break also breaks the line."""
    signs = {"\r": "␍", "\t": "⇥", "\x1b": "␛"}
    for sign, mark in signs.items():
        text = text.replace(sign, mark)
    return text.replace("\n", "↵\n")
