"""Tokens in a terminal: colours where there are any, marks where there are none."""

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.text import Text

from luthier.inspect.tokens import Shown, Token

# Two shades of each kind take turns, so that the boundary between two tokens can be seen. Ground
# and ink are both given: they can be read in a light and in a dark terminal.
SHADES = {
    "trained": ("#10240f on #a5dba9", "#10240f on #86cb8c"),
    "trained control": ("bold #10240f on #4caf57", "bold #10240f on #4caf57"),
    "context": ("#e8e4dc on #4b4843", "#e8e4dc on #605c55"),
    "control": ("bold #f0bd6d on #4b4843", "bold #f0bd6d on #605c55"),
    "padding": ("dim", "dim"),
}
_MARKS = "«trained»  {control}  other tokens are context  | stands between tokens"


def has_colours(console: Console) -> bool:
    """Whether what is printed is seen in colours."""
    return bool(console.color_system) and not console.no_color


def legend(console: Console) -> None:
    """Say what the colours or marks mean."""
    if not has_colours(console):
        console.print(_MARKS, markup=False, soft_wrap=True)
        return
    text = Text()
    for name in ("trained", "trained control", "context", "control"):
        text.append(f" {name} ", style=SHADES[name][0]).append("  ")
    console.print(text.append("× padding", style="dim"))


def show(console: Console, row: Shown, pad: str, ids: bool = False) -> None:
    """Print one sequence under its heading; with `ids`, each token is followed by its id."""
    bright = Text(row.heading, style="bold").append(f"  {row.place}", style="not bold")
    console.print(bright.append(f"  {row.counts}", style="not bold dim"), soft_wrap=True)
    for note in row.notes:
        console.print(Text(note, style="bold #c8641e"), soft_wrap=True)
    if not row.tokens:
        return
    coloured = has_colours(console)
    drawn = _coloured(row.tokens, ids) if coloured else Text(marked(row.tokens, ids))
    if row.padding:
        drawn.append(f" {visible(pad)} × {row.padding}", SHADES["padding"][0])
    console.print(drawn, soft_wrap=True)


def _coloured(tokens: list[Token], ids: bool) -> Text:
    text = Text()
    for n, token in enumerate(tokens):
        name = "trained control" if token.trained and token.kind == "control" else token.kind
        shown = visible(token.text)
        # The id stands before the line break, beside its token.
        body = shown.removesuffix("\n") if ids else shown
        text.append(body, style=SHADES[name][n % 2])
        if ids:
            text.append(f"{token.id} ", style="dim").append(shown[len(body) :])
    return text


def marked(tokens: Iterable[Token], ids: bool = False) -> str:
    """The tokens in plain text with marks for their boundaries and what trains."""
    parts = []
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        inner = "|".join(_mark(token, ids) for token in run)
        parts.append(f"«{inner}»" if trained else inner)
    return "|".join(parts)


def _mark(token: Token, ids: bool) -> str:
    shown = visible(token.text)
    text = shown.removesuffix("\n")
    body = f"{{{text}}}" if token.kind == "control" else text
    return (f"{body}:{token.id}" if ids else body) + shown[len(text) :]


def visible(text: str) -> str:
    """Show line breaks and tabs as signs; a line break also breaks the line."""
    signs = {"\r": "␍", "\t": "⇥", "\x1b": "␛"}
    for sign, mark in signs.items():
        text = text.replace(sign, mark)
    return text.replace("\n", "↵\n")
