"""`luthier check`: the whole dataset against the rules, before anything is trained on it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from luthier.inspect.arguments import Flag, Grammar

if TYPE_CHECKING:
    from luthier.inspect.survey import Side, Survey

GRAMMAR = Grammar(
    "check",
    "luthier check recipe=NAME [key=value ...] [flags]\n\n"
    "Runs the whole dataset through the chat encoder and says what it makes: rows, sequences,\n"
    "tokens, how long they are, which rows are dropped, cut, split or not shown whole, and if\n"
    "every rule holds. A row that would stop the training does not stop the check. It loads no\n"
    "model weights and writes nothing.\n\n"
    "Exit code: 0 if every rule holds, 1 if one breaks, 2 for a mistake in what was typed.",
    (
        Flag("--limit", "N", "only the first N rows of each side"),
        Flag("--json", None, "one JSON object, for machines"),
    ),
    "  luthier check recipe=quickstart\n"
    "  luthier check recipe=quickstart chat.max_length=80 --limit 200\n"
    "  luthier check recipe=quickstart --json | jq .rules\n",
)


def run(words: list[str]) -> int:
    """Check the dataset; returns 0 if every rule holds and 1 if one breaks."""
    if GRAMMAR.asks_help(words):
        return 0
    given = GRAMMAR.parse(words)
    from luthier.inspect.material import gather
    from luthier.inspect.survey import Survey

    survey = Survey(gather(given.overrides), given.numbers.get("--limit"))
    _run(survey)
    if "--json" in given.switches:
        print(json.dumps(plain(survey), ensure_ascii=False))
    else:
        from luthier.inspect.report import show

        show(survey)
    return 0 if survey.holds else 1


def _run(survey: "Survey") -> None:
    """Run the survey with a bar on the terminal, if there is one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=survey.size)
        survey.run(lambda rows: bar.advance(task, rows))


def plain(survey: "Survey") -> dict[str, Any]:
    """The survey as plain values."""
    return {
        "name": survey.material.name,
        "holds": survey.holds,
        "limit": survey.limit,
        "sides": {name.replace(" ", "_"): _plain_side(side) for name, side in survey.sides.items()},
        "rules": [asdict(rule) for rule in survey.rules],
        "prompts": {
            "compared_rows": survey.compared_rows,
            "one_row_in": survey.every,
            "turns": survey.prompts.checked,
            "differ": survey.prompts.broken,
        },
        "boundaries": asdict(survey.boundaries),
    }


def _plain_side(side: "Side") -> dict[str, Any]:
    from luthier.inspect.lengths import histogram, quantiles

    tokens = sum(side.lengths)
    counts = {
        name: value
        for name, value in asdict(side).items()
        if name not in ("lengths", "findings", "trained_tokens")
    }
    return {
        **counts,
        "sequences": len(side.lengths),
        "tokens": tokens,
        "trained_tokens": side.trained_tokens,
        "trained_share": round(side.trained_tokens / tokens, 4) if tokens else None,
        "lengths": quantiles(side.lengths),
        "histogram": [
            {"from": start, "below": end, "sequences": count}
            for start, end, count in histogram(side.lengths)
        ],
        "findings": [asdict(finding) for finding in side.findings.values()],
    }
