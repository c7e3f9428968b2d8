"""Tokens in a terminal: colours where there are any, marks where there are none."""

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.text import Text

from luthier.inspect.tokens import Token

# Two shades of each kind take turns, so that the boundary between two tokens can be seen.
SHADES = {
    "trained": ("black on #8fd694", "black on #b9e8bc"),
    "context": ("#9a9a9a", "#c4c4c4"),
    "control": ("bold #d08c2c", "bold #e6b566"),
    "trained control": ("bold black on #5fbf68", "bold black on #5fbf68"),
    "padding": ("#5a5a5a", "#5a5a5a"),
}


def legend(console: Console) -> None:
    """Say what the colours or marks mean."""
    if not console.color_system:
        console.print("«trains», {control}, other tokens are context; | stands between tokens")
        return
    text = Text()
    for name in ("trained", "trained control", "context", "control", "padding"):
        text.append(f" {name} ", style=SHADES[name][0]).append("  ")
    console.print(text)


def show(console: Console, tokens: list[Token], ids: bool = False) -> None:
    """Print one sequence; with `ids`, each token is followed by its id."""
    real = [token for token in tokens if token.kind != "padding"]
    drawn = _coloured(real, ids) if console.color_system else Text(_marked(real, ids))
    if len(real) < len(tokens):
        drawn.append(f" {tokens[-1].text} × {len(tokens) - len(real)}", SHADES["padding"][0])
    console.print(drawn, soft_wrap=True)


def _coloured(tokens: list[Token], ids: bool) -> Text:
    text = Text()
    for n, token in enumerate(tokens):
        name = "trained control" if token.trained and token.kind == "control" else token.kind
        text.append(visible(token.text), style=SHADES[name][n % 2])
        if ids:
            text.append(f"{token.id} ", style="dim")
    return text


def _marked(tokens: Iterable[Token], ids: bool) -> str:
    parts = []
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        inner = "|".join(_mark(token, ids) for token in run)
        parts.append(f"«{inner}»" if trained else inner)
    return "|".join(parts)


def _mark(token: Token, ids: bool) -> str:
    text = visible(token.text)
    text = f"{{{text}}}" if token.kind == "control" else text
    return f"{text}:{token.id}" if ids else text


def visible(text: str) -> str:
    """Show line breaks and tabs as signs; a line break also breaks the line."""
    return text.replace("\r", "␍").replace("\t", "⇥").replace("\n", "↵\n")
