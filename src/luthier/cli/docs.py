"""`luthier docs PAGE`: the pages of the documentation, which came with luthier."""

import pydoc

from luthier.cli.arguments import CommandLine
from luthier.config.recipes import bundled_folder
from luthier.errors import UserError, ask_nearest

COMMAND_LINE = CommandLine(
    "docs",
    "luthier docs [PAGE]\n\nShows a page of the documentation of this version, or lists all pages."
    " In a terminal it\nopens in your pager.",
    (),
    "  luthier docs\n  luthier docs formats\n  luthier docs launch | less\n",
)


def run(arguments: list[str]) -> int:
    """Print a page, or the list; returns 0. Raises UserError for a page that does not exist."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    names = COMMAND_LINE.parse(arguments).overrides
    pages = {path.stem: path for path in sorted(bundled_folder("docs").glob("*.md"))}
    if not names:
        width = max(map(len, pages))
        for name, path in pages.items():
            title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            print(f"{name:<{width}}  {title}")
        return 0
    for name in names:
        page = name.removesuffix(".md").rpartition("/")[2]
        if page not in pages:
            near = ask_nearest(page, pages)
            raise UserError(
                f"{name}: there is no such page. {near} `luthier docs` lists them.".replace(
                    "  ", " "
                )
            )
        pydoc.pager(pages[page].read_text(encoding="utf-8"))
    return 0
