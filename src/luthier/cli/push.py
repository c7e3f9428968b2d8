"""`luthier push`: an adapter or a merged model with its card to the Hugging Face hub."""

import json
import re
from dataclasses import replace
from pathlib import Path

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag, ParsedArguments
from luthier.config.trust import trust_of
from luthier.errors import UserError
from luthier.export import model_facts, write_card
from luthier.export.hub_upload import UploadPlan, plan_upload, upload
from luthier.export.model_facts import DataFacts, ModelFacts
from luthier.model.artifact import Artifact, find_artifact

COMMAND_LINE = CommandLine(
    "push",
    "luthier push RUN --to USER/NAME [flags]\n\n"
    "Sends a run's adapter (or, with --merged, what luthier merge made of it) with tokenizer,\n"
    "template, card and notes for servers to the Hugging Face hub. The repository is private\n"
    "unless --public is given. Weights go as safetensors; optimizer states, pickles and files\n"
    "that belong to no model stay here.",
    (
        Flag("--to", "NAME", "the repository: USER/NAME or ORGANISATION/NAME"),
        Flag("--merged", None, "the merged model in the run's merged/ folder"),
        Flag("--public", None, "for everyone to see"),
        Flag("--dry-run", None, "show every file and the card; nothing is sent"),
        Flag("--overwrite", None, "replace what is in the repository"),
        Flag("--license", "NAME", "the licence of the model, such as apache-2.0"),
        Flag("--data-license", "NAME", "the licence of the rows that state none"),
        Flag("--language", "LIST", "the languages of the model, such as en,de"),
        BASE,
        TRUST,
    ),
    "  luthier push runs/quickstart/default --to ada/reminders --dry-run\n"
    "  luthier push runs/quickstart/default --to ada/reminders --license apache-2.0\n"
    "  luthier push runs/quickstart/default --to ada/reminders-merged --merged --public\n",
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def run(arguments: list[str]) -> int:
    """Push what was typed; returns the exit code."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    target = _target(parsed)
    if len(parsed.overrides) != 1:
        raise UserError("luthier push: name one run, such as luthier push runs/quickstart/default.")
    artifact = _artifact(parsed.overrides[0], parsed)
    if artifact.folder is None:
        raise UserError(f"{artifact.name}: this model is on the hub already.")
    facts = _collect_facts(artifact, target, parsed)
    from luthier.environment import quiet_libraries

    quiet_libraries()
    written = write_card.description_texts(facts, write_card.chat_format_of(artifact), target)
    upload_plan = plan_upload(artifact.folder, facts, written)
    _add_what_the_run_has(upload_plan, artifact)
    # Printed with and without --dry-run: what leaves this machine is seen before it does.
    print_upload_plan(upload_plan, target, "--public" in parsed.switches)
    if "--dry-run" in parsed.switches:
        print(f"\n{written[write_card.CARD]}\nnothing was sent (--dry-run)")
        return 0
    upload(upload_plan, target, "--public" in parsed.switches, "--overwrite" in parsed.switches)
    return 0


def print_upload_plan(upload_plan: UploadPlan, target: str, public: bool) -> None:
    """Print every file with its size, and what stays here."""
    print(f"to        {target}, {'public' if public else 'private'}")
    sizes = upload_plan.sizes()
    for name, size in sizes.items():
        print(f"  {_readable(size):>10}  {name}")
    print(f"  {_readable(sum(sizes.values())):>10}  in {len(sizes)} files")
    for name, why in upload_plan.left.items():
        print(f"  not uploaded: {name} ({why})")


def _target(parsed: ParsedArguments) -> str:
    target = parsed.texts.get("--to", "")
    if not _NAME.fullmatch(target):
        typed = f"--to {target}: " if target else ""
        raise UserError(f"luthier push: {typed}name a repository: --to USER/NAME.")
    return target


def _artifact(word: str, parsed: ParsedArguments) -> Artifact:
    trust = trust_of(parsed.switches)
    artifact = find_artifact(word, parsed.texts.get("--base"), trust)
    if "--merged" not in parsed.switches:
        return artifact
    merged_folder = None if artifact.run is None else artifact.run / "merged"
    # Never merged on the way: a merge takes memory and minutes that a push does not announce.
    if merged_folder is None or not merged_folder.is_dir():
        raise UserError(
            f"{word}: there is no merged model yet. Make it first:\n    luthier merge {word}"
        )
    return find_artifact(str(merged_folder), trust=trust)


def _collect_facts(artifact: Artifact, target: str, parsed: ParsedArguments) -> ModelFacts:
    """The facts with what was typed besides."""
    facts = model_facts.load_or_collect_facts(artifact)
    # What is typed wins over the record, and where nothing is typed the record's stands.
    languages = [item for item in parsed.texts.get("--language", "").split(",") if item]
    rows = parsed.texts.get("--data-license")
    data: list[DataFacts] = [
        item if item.licence or rows is None else replace(item, licence=rows) for item in facts.data
    ]
    return replace(
        facts,
        title=target.partition("/")[2],
        licence=parsed.texts.get("--license", facts.licence),
        language=languages or facts.language,
        data=data,
    )


def _add_what_the_run_has(upload_plan: UploadPlan, artifact: Artifact) -> None:
    """The plot, the chat settings and the processor, which a checkpoint need not hold."""
    for file in write_card.find_missing_processor(artifact):
        upload_plan.texts.setdefault(file.name, file.content.decode())
    plot = Path() if artifact.run is None else artifact.run / write_card.PLOT
    if plot.is_file():
        upload_plan.files.setdefault(write_card.PLOT, plot)
    if artifact.chat is not None:
        text = json.dumps(artifact.chat, indent=2, ensure_ascii=False) + "\n"
        upload_plan.texts.setdefault("chat.json", text)


def _readable(size: float) -> str:
    # Decimal units, as the hub's own pages show the sizes of files.
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
