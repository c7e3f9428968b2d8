"""`luthier show RUN`: what a run's record says, on one page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import CommandLine, Flag
from luthier.record import checkpoints
from luthier.record.checkpoints import ROLLOUTS_FILE
from luthier.record.machine_info import main_versions
from luthier.record.record import read_record
from luthier.record.run_dir import describe_model_damage, find_run
from luthier.redaction import redact
from luthier.storage import lock
from luthier.storage.sizes import folder_size, format_bytes
from luthier.terminal import make_console, pluralize

if TYPE_CHECKING:
    from rich.console import Console

COMMAND_LINE = CommandLine(
    "show",
    "luthier show RUN [--rollouts]\n\nPrints a run's status, what made it, and its results. RUN is "
    "its folder, or its\nname below runs/.",
    (Flag("--rollouts", None, "print the last completions that GRPO or RLOO recorded"),),
    "  luthier show runs/quickstart/default\n  luthier show quickstart/default\n"
    "  luthier show runs/tiny_tools/default --rollouts\n",
)
SHOWN_ROLLOUTS = 5
"""The number of completions that `--rollouts` prints."""
RunPage = list[tuple[str, list[tuple[str, str]]]]
"""Headings, each with rows of a name and its value."""


def run(arguments: list[str]) -> int:
    """Print the page of each run; returns 0. Raises UserError where there is none."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    from luthier.errors import UserError

    parsed = COMMAND_LINE.parse(arguments)
    typed = parsed.overrides
    if not typed:
        raise UserError("`luthier show` needs a run: luthier show runs/RECIPE/NAME")
    for name in typed:
        folder = find_run(name)
        if "--rollouts" in parsed.switches:
            print_rollouts(folder)
        else:
            print_page(folder, make_page(folder))
    return 0


def print_page(folder: Path, sections: RunPage, console: "Console | None" = None) -> None:
    """Print the sections, names in one column."""
    from rich.markup import escape

    console = console or make_console()
    console.print(f"[bold]{escape(str(folder))}[/bold]")
    # One width over all sections, so that the values stand in one column down the page.
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for heading, rows in sections:
        if not rows:
            continue
        console.print(f"\n[bold]{heading}[/bold]")
        for name, value in rows:
            console.print(escape(f"  {name:<{width}}  {value}"), soft_wrap=True)


def print_rollouts(folder: Path) -> None:
    """Print the last completions of a run's `rollouts.jsonl`; UserError where there are none."""
    from rich.markup import escape

    from luthier.errors import UserError

    path = folder / ROLLOUTS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise UserError(
            f"{folder}: no completions are recorded there. Runs of GRPO and RLOO record some of "
            "each step with trainer.rollouts.record=4."
        )
    console = make_console()
    for line in lines[-SHOWN_ROLLOUTS:]:
        rollout = json.loads(line)
        rewards = "  ".join(f"{name} {_number(r)}" for name, r in rollout["rewards"].items())
        end = f"  {rollout['end']}" if "end" in rollout else ""
        advantage = f"advantage {rollout['advantage']:+.2f}"
        heading = f"step {rollout['step']}  {rewards}  {advantage}{end}"
        console.print(f"\n[bold]{escape(heading)}[/bold]")
        for message in (*rollout["prompt"], *rollout["completion"]):
            console.print(escape(_describe_message(message)), soft_wrap=True)


def _describe_message(message: dict[str, Any]) -> str:
    """Return a message as lines: who speaks, what is thought, said and called."""
    who = " ".join(filter(None, (message["role"], message.get("name"))))
    lines = []
    if message.get("reasoning_content"):
        lines.append(f"  {who} thinks: {message['reasoning_content']}")
    if message.get("content") or not message.get("tool_calls"):
        lines.append(f"  {who}: {message.get('content') or ''}")
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
        lines.append(f"  {who} calls {function['name']} {arguments}")
    return "\n".join(lines)


def make_page(folder: Path) -> RunPage:
    """Return what the record of a run says, without what an older luthier did not write."""
    # A record of an older luthier holds what is hidden today.
    record = redact(read_record(folder))
    sections: RunPage = [
        ("Run", [("status", _status(folder, record)), *_run(record)]),
        ("Model and data", _material(record)),
        ("Machine", _machine(record)),
        ("Code", _code(record)),
        ("Versions", _versions(record)),
        ("Results, before and after", _results(record)),
        ("Parts", _parts(record)),
        ("Checkpoints", _checkpoints(folder)),
    ]
    # Records of older versions lack fields: empty values are dropped here and not in each section.
    return [(heading, [row for row in rows if row[1]]) for heading, rows in sections]


def _status(folder: Path, record: dict[str, Any]) -> str:
    status = str(record.get("status", ""))
    # A killed process cannot write its end, but the system released its lock.
    if status == "running" and not lock.is_locked(folder):
        return "killed: it was running, and no process holds its folder"
    damage = describe_model_damage(folder) if status == "finished" else None
    return f"{status}, but {damage}" if damage else status


def _run(record: dict[str, Any]) -> list[tuple[str, str]]:
    seeds, seconds = record.get("seeds", {}), record.get("seconds")
    trained = record.get("training_seconds")
    peak = record.get("peak_memory_gib", {})
    kernels = ", deterministic kernels only" if seeds.get("deterministic") else ""
    took = "" if seconds is None else f"{seconds:,.0f} s"
    return [
        ("error", str(record.get("error", ""))),
        ("recipe", str(record.get("recipe") or "")),
        ("overrides", " ".join(record.get("overrides", []))),
        ("began", str(record.get("started", ""))),
        ("ended", str(record.get("ended", ""))),
        ("took", took + (f", of which training {trained:,.0f} s" if trained else "")),
        ("memory", ", ".join(f"{where} {gib} GiB at the peak" for where, gib in peak.items())),
        ("seed", f"{seeds['seed']}{kernels}" if "seed" in seeds else ""),
        *(
            ("extended", f"at step {extension['at_step']}: {', '.join(extension['changes'])}")
            for extension in record.get("extended", [])
        ),
        *(("tracked", f"{name}: {run['id']}") for name, run in record.get("trackers", {}).items()),
    ]


def _material(record: dict[str, Any]) -> list[tuple[str, str]]:
    model, tokenizer = record.get("model") or {}, record.get("tokenizer") or {}
    data = record.get("data") or {}
    train = data.get("train") or {}
    rows = f"{train['rows']:,} rows, {train['tokens']:,} tokens" if train.get("rows") else ""
    # Records of runs without images, and of older versions, have no such number.
    rows += f", {train['images']:,} images" if train.get("images") else ""
    return [
        ("model", str(model.get("path", ""))),
        ("revision", str(model.get("commit") or model.get("revision") or "")),
        ("weights", _hash(model.get("weights_sha256"))),
        ("tokenizer", _hash(tokenizer.get("sha256"))),
        ("template", _hash(tokenizer.get("template_sha256"))),
        ("training rows", rows),
        ("data", _hash(data.get("sha256"))),
    ]


def _hash(value: str | None) -> str:
    return f"SHA-256 {value[:16]}..." if value else ""


def _machine(record: dict[str, Any]) -> list[tuple[str, str]]:
    hardware, launch = record.get("hardware", {}), record.get("launch", {})
    gpus = [gpu["name"] for gpu in hardware.get("gpus", [])]
    ways = [f"{name} {launch[name]}" for name in ("sharding", "precision") if name in launch]
    count = launch.get("processes")
    processes = f"{pluralize(count, 'process', 'processes')}, " if count else ""
    return [
        ("launch", processes + ", ".join(ways)),
        ("device", f"{launch.get('device', '')} {', '.join(gpus)}".strip()),
        ("processor", f"{hardware.get('cpu', '')}, {hardware.get('cores', '?')} cores"),
        ("threads", str(hardware.get("torch_threads", ""))),
        ("memory", f"{hardware['memory_gib']} GiB" if "memory_gib" in hardware else ""),
        ("system", str(hardware.get("system", ""))),
    ]


def _code(record: dict[str, Any]) -> list[tuple[str, str]]:
    git = record.get("git", {})
    luthier, here = git.get("luthier"), git.get("here")
    rows = [("luthier", _commit(luthier))]
    # luthier's commit and that of the working directory are one where it runs from its clone.
    if here != luthier:
        rows.append(("here", _commit(here)))
    return rows + [
        (", ".join(entry["settings"]), f"{path} {_hash(entry['sha256'])}".rstrip())
        for path, entry in record.get("code", {}).items()
    ]


def _commit(state: dict[str, Any] | None) -> str:
    if not state:
        return ""
    changed = f", with changes in {len(state['changed_files'])} files" if state["dirty"] else ""
    diff_note = f" ({state['diff']})" if state.get("diff") else ""
    return f"{state['commit'][:12]} on {state['branch']}{changed}{diff_note}"


def _versions(record: dict[str, Any]) -> list[tuple[str, str]]:
    versions = record.get("versions", {})
    rows = list(main_versions(versions).items())
    more = len(versions) - len(rows)
    return rows + ([("others", f"{more} packages, in run.json")] if more else [])


def _results(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, " -> ".join(_number(pair.get(when)) for when in ("before", "after")))
        for name, pair in record.get("results", {}).items()
    ]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _parts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each session of a run that took several; none for a run in one go."""
    sessions = record.get("sessions", [])
    if len(sessions) < 2:
        return []
    rows = []
    versions: dict[str, str] = sessions[0].get("versions", {})
    for session in sessions:
        before, versions = versions, session.get("versions", versions)
        changed = [
            f"{name} {versions[name]}" for name in versions if before.get(name) != versions[name]
        ]
        under = f", under other versions: {', '.join(changed)}" if changed else ""
        rows.append((session.get("started", ""), _part(session) + under))
    return rows


def _part(session: dict[str, Any]) -> str:
    begin = (
        f"from step {session['from_step']}" if "from_step" in session else "before its first step"
    )
    end = f" to step {session['to_step']}" if "to_step" in session else ""
    signal = f" by {session['signal']}" if "signal" in session else ""
    where = f", on {session['host']}" if "host" in session else ""
    return f"{session.get('status', 'unknown')}{signal}, {begin}{end}{where}"


def _checkpoints(folder: Path) -> list[tuple[str, str]]:
    return [
        (path.name, format_bytes(folder_size(path)))
        for _, path in checkpoints.list_checkpoints(folder / "checkpoints")
    ]
