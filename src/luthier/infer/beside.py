"""Two replies in two columns while they are written."""

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Beside:
    """Columns that fill up; at the end they stand in the terminal as a table."""

    def __init__(self, console: Console, names: tuple[str, ...]) -> None:
        self._console, self._names = console, names
        self._texts = [""] * len(names)
        # What is longer than the terminal is cut while it is written, and whole at the end.
        self._live = Live(console=console, transient=True, refresh_per_second=12)

    def __enter__(self) -> "Beside":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if any(self._texts):
            self._console.print(self._table())

    def add(self, number: int, text: str) -> None:
        """Write on in a column, counted from 0."""
        self._texts[number] += text
        if self._console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        for name in self._names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, self._texts))
        return table
