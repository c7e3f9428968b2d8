"""`luthier preview`: rows as the tokens that are trained on."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import TRUST, CommandLine, Flag, ParsedArguments
from luthier.errors import UserError, suggest_options
from luthier.storage.atomic import replace_file
from luthier.storage.write_errors import explain_write_errors
from luthier.terminal import make_console, print_json

if TYPE_CHECKING:
    from luthier.inspection.dataset import LoadedDataset
    from luthier.inspection.statistics import SelectedRows
    from luthier.inspection.tokens import DisplayedImage, DisplayedSequence, Token, TokenView

COMMAND_LINE = CommandLine(
    "preview",
    "luthier preview recipe=NAME [key=value ...] [flags]\n\n"
    "Shows rows of the dataset as the tokens that a run trains on: which tokens train, which are\n"
    "context, which are control tokens, and where each token ends. Of a preference it shows the\n"
    "prompt once, and each reply behind it; of other rows the labels or tags that train. It loads\n"
    "no model weights and writes nothing but the file of --html.",
    (
        Flag(
            "--row", "N", "begin with the Nth row (1 is the first); without --n, show only that row"
        ),
        Flag("--n", "N", "show N rows (default: 3)"),
        Flag("--source", "NAME", "show rows of one of dataset.sources"),
        Flag("--eval", None, "show held-out rows instead of those that train"),
        Flag("--set", "NAME", "show rows of one of dataset.eval.sets"),
        Flag("--ids", None, "show the id after each token"),
        Flag("--json", None, "print one JSON object, for programs"),
        Flag("--html", "FILE", "write the same as a page, with the origin of each token"),
        TRUST,
    ),
    "  luthier preview recipe=quickstart --n 2\n"
    "  luthier preview recipe=quickstart chat.boundaries=segments --row 7 --ids\n"
    "  luthier preview recipe=tiny_dpo --n 1\n"
    "  luthier preview model=hub model.path=Qwen/Qwen3-0.6B dataset=jsonl \\\n"
    "      dataset.path=my.jsonl --html preview.html\n",
)
_ROWS = 3
_SIDES = ("train", "held_out")


def run(arguments: list[str]) -> int:
    """Show the rows that were asked for; returns the exit code."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    # After the flags are parsed: loading brings transformers for the tokenizer.
    from luthier.inspection.dataset import load_dataset

    material = load_dataset(parsed.overrides, is_trusted=TRUST.name in parsed.switches)
    chosen, side = _chosen(parsed, material)
    # Counted over the chosen rows, so that --row 1 is the first of --source, not of the dataset.
    numbers = _numbers(parsed, sum(len(positions) for _, positions in chosen), side)
    from luthier.inspection.tokens import view_rows

    token_view = view_rows(material, chosen, numbers, side)
    if file := parsed.texts.get("--html"):
        _write(file, token_view, material.name, "--ids" in parsed.switches)
    # --html replaces the terminal's view; --json is printed beside it, for a script asked for it.
    if "--json" in parsed.switches:
        print_json(_plain(token_view, material.name, parsed))
    elif not file:
        from luthier.inspection.render import print_view

        print_view(make_console(), token_view, "--ids" in parsed.switches)
    return 0


def _chosen(parsed: ParsedArguments, material: "LoadedDataset") -> "tuple[SelectedRows, str]":
    """Return the rows that the flags select, and what their side is called in messages."""
    from luthier.inspection.statistics import select_split

    which, side = _side(parsed, material)
    source = parsed.texts.get("--source")
    if source is None:
        return select_split(material, which), side
    # A held-out file of its own belongs to no training source.
    if which in material.evaluated:
        raise UserError(f"--source {source}: these rows are those of {which}. Leave it out.")
    if source not in material.trained:
        options = suggest_options(source, material.trained)
        raise UserError(f"--source {source}: there is no such source. {options}")
    opened = material.trained[source]
    return [selected for selected in select_split(material, which) if selected[0] is opened], side


def _side(parsed: ParsedArguments, material: "LoadedDataset") -> tuple[str, str]:
    """Return the key of the split that the flags select, and what its rows are called."""
    if name := parsed.texts.get("--set"):
        sets = material.config.dataset.eval.sets
        if name not in sets:
            raise UserError(
                f"--set {name}: there is no such evaluation set. {suggest_options(name, sets)}"
            )
        return f"dataset.eval.sets.{name}", name
    if "--eval" not in parsed.switches:
        return "train", "training"
    # Named evaluation sets are shown with --set; --eval means the one without a name, which is a
    # file (dataset.eval.path) or rows drawn from the training rows.
    eval_keys = [key for key in material.evaluated if ".sets." not in key]
    return eval_keys[0] if eval_keys else "held out", "held-out"


def _numbers(parsed: ParsedArguments, count: int, side: str) -> range:
    """Return the positions, from 0, that the flags select of `count` rows; UserError for none."""
    if not count:
        raise UserError(_none(side))
    first = parsed.numbers.get("--row", 1)
    if first > count:
        there = "is 1 row" if count == 1 else f"are {count:,} rows"
        raise UserError(f"--row {first}: there {there} on the {side} side. Write 1 to {count}.")
    number = parsed.numbers.get("--n", 1 if "--row" in parsed.numbers else _ROWS)
    return range(first - 1, min(first - 1 + number, count))


def _none(side: str) -> str:
    """Return the message for a side without rows."""
    if side != "held-out":
        return f"preview: there are no {side} rows."
    return (
        "preview: no rows are held out. Leave --eval out, or hold rows out: "
        "dataset.eval.share=0.1, dataset.eval.count=100 or dataset.eval.path=FILE; rows of "
        "dataset.eval.sets are shown with --set NAME."
    )


def _write(file: str, token_view: "TokenView", name: str, ids: bool) -> None:
    """Write the page, and say where."""
    from luthier.inspection.render import render_html

    path = Path(file).expanduser()
    with explain_write_errors(path, "--html"):
        page = render_html(f"luthier preview: {name}", token_view, ids)
        with replace_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    print(f"written {file}", file=sys.stderr)


def _plain(token_view: "TokenView", name: str, parsed: ParsedArguments) -> dict[str, Any]:
    """Return the rows as values that JSON can hold."""
    return {
        "name": name,
        "side": parsed.texts.get("--set") or _SIDES["--eval" in parsed.switches],
        "boundaries": token_view.boundaries,
        "pad": {"id": token_view.pad_id, "text": token_view.pad},
        "rows": [_plain_row(row) for row in token_view.rows],
    }


def _plain_row(row: "DisplayedSequence") -> dict[str, Any]:
    return {
        "row": row.row,
        "place": row.place,
        "sequence": row.part,
        "sequences": row.parts,
        "part": row.name,
        "notes": row.notes,
        "trained_tokens": row.trained,
        "padding": row.padding,
        "tokens": [_plain_token(token) for token in row.tokens],
        "images": [_plain_image(image) for image in row.images],
    }


def _plain_token(token: "Token") -> dict[str, Any]:
    values = asdict(token)
    # Few rows have tags, and a token is written often.
    if token.tag is None:
        del values["tag"]
    return values


def _plain_image(image: "DisplayedImage") -> dict[str, Any]:
    return {
        "number": image.number,
        "start": image.start,
        "tokens": len(image.tokens),
        **image.ref,
    }
