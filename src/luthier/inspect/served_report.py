"""What `luthier check RUN --served` found, for people and for machines."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from luthier.errors import UserError
from luthier.inspect.arguments import Given

if TYPE_CHECKING:
    from luthier.inspection.served import Served


def run_served(given: Given) -> int:
    """Check what a run saved; returns 0 if every rule holds and 1 if one breaks."""
    if len(given.overrides) != 1:
        raise UserError("luthier check --served takes one run: luthier check RUN --served.")
    if "--png" in given.texts:
        raise UserError("--png: --served draws nothing. Leave it out.")
    from luthier.inspection.served import check

    served = check(given.overrides[0], given.numbers.get("--limit"))
    if "--json" in given.switches:
        rules = [asdict(rule) for rule in served.rules]
        found = {"name": given.overrides[0], "holds": served.holds, "rules": rules}
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(served)
    return 0 if served.holds else 1


def _show(served: "Served") -> None:
    from rich.console import Console
    from rich.text import Text

    from luthier.inspection.report import show_rule

    console = Console(highlight=False)
    console.print(Text(f"{served.artefact.folder}: as trained?", style="bold"))
    for rule in served.rules:
        show_rule(console, rule, "")
    if served.holds:
        end = "\nservers that read this folder get the tokens it was trained on"
    else:
        end = "\nservers that read this folder get other tokens than it was trained on"
    console.print(Text(end, style="bold"))
