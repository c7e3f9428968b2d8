"""`luthier init`: a recipe for the user's own rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import CommandLine, Flag, ParsedArguments
from luthier.config.compose import parse_overrides
from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.config.validate import validate_config
from luthier.errors import Mistake, UserError
from luthier.recipe_files.draft import (
    command_prefix,
    describe_shadowed,
    recipe_name,
    recipe_path,
    typed_recipe,
    wrap,
    write_recipe,
)
from luthier.terminal import pluralize

if TYPE_CHECKING:
    from luthier.recipe_files.new_recipe import RecipeInputs
    from luthier.recipe_files.row_survey import RowSurvey

COMMAND_LINE = CommandLine(
    "init",
    "luthier init DATA [dataset.KEY=VALUE ...] [flags]\n\n"
    "Looks at your rows (a file, a folder, a glob or the name of a hub dataset), says what it\n"
    "finds and what is odd, and writes a recipe with a comment at each key that runs as it is.\n"
    "Settings of the dataset can follow, such as dataset.columns.prompt=Question.",
    (
        Flag("--model", "PATH", "a local folder or a hub name; a small open model if not given"),
        Flag("-o", "FILE", "the recipe's file; recipes/NAME.yaml if not given"),
        Flag("--force", None, "replace a recipe of that name"),
    ),
    "  luthier init my_data.jsonl\n"
    "  luthier init 'chats/*.jsonl.gz' --model Qwen/Qwen3-0.6B -o recipes/chats.yaml\n"
    "  luthier init faq.csv dataset.columns.prompt=Frage dataset.columns.completion=Antwort\n",
)
_WIDTH = 80
_ROWS = {
    "conversation": "conversations",
    "text": "plain texts",
    "preference": "pairs of a better and a worse reply",
    "unpaired": "replies that are good or bad",
    "classification": "texts with a class",
    "tagging": "words with tags",
    "seq2seq": "texts with what is to be made of them",
}


def run(arguments: list[str]) -> int:
    """Look at the rows and write the recipe; returns 0."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    source, data = _source(parsed)
    path = recipe_path(parsed.texts.get("-o"), recipe_name(data), "--force" in parsed.switches)
    # After the flags are checked: what reads tables and tokenizers takes seconds to import.
    from luthier.recipe_files.model_choice import choose_model, gpu_memory, load_local_tokenizer
    from luthier.recipe_files.new_recipe import RecipeInputs, draft_recipe, find_method
    from luthier.recipe_files.row_survey import measure_tokens, survey_rows

    survey = survey_rows(source)
    _check_usable(survey)
    _print_rows(survey)
    memory = gpu_memory()
    method = find_method(survey)
    choice = choose_model(method, bool(survey.images), memory, parsed.texts.get("--model"))
    tokenizer = load_local_tokenizer(choice)
    lengths = None if tokenizer is None else measure_tokens(survey, tokenizer)
    inputs = RecipeInputs(survey, source, choice, lengths, memory)
    _print_lengths(inputs)
    _print_oddities(inputs)
    prefix, recipe = command_prefix(path), typed_recipe(path)
    note = describe_shadowed(path)
    write_recipe(path, draft_recipe(inputs, f"{prefix}luthier train {recipe}"))
    _print_recipe(inputs, path)
    if note:
        _print_line("name", note)
    _print_next(f"{prefix}luthier", recipe)
    return 0


def _source(parsed: ParsedArguments) -> tuple[SourceConfig, str]:
    """Return the source that was typed, and its first path."""
    lines = [w for w in parsed.overrides if w.startswith("dataset.") and "=" in w]
    paths = [word for word in parsed.overrides if word not in lines]
    if len(paths) != 1 or not paths[0].strip():
        raise UserError(
            "luthier init takes one file, folder, glob or hub name, and settings of the dataset "
            "such as dataset.columns.prompt=NAME: luthier init my_data.jsonl. Several files are a "
            "glob in quotes: luthier init 'data/*.jsonl'."
        )
    typed, mistakes = parse_overrides(lines)
    settings: dict[str, Any] = {"path": paths[0]}
    for override in typed:
        node, (*groups, name) = settings, override.key.split(".")[1:]
        first = (*groups, name)[0]
        if first in DatasetConfig.model_fields and first not in SourceConfig.model_fields:
            mistakes.append(Mistake(override.key, "change it in the recipe, once it is written."))
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = override.value
    if not mistakes:
        config, mistakes = validate_config(
            {"model": {"path": "x"}, "dataset": settings, "output_dir": "x"}
        )
        if config is not None:
            names = SourceConfig.model_fields
            return SourceConfig(**{n: getattr(config.dataset, n) for n in names}), paths[0]
    raise UserError("\n".join(f"{mistake.key}: {mistake.text}" for mistake in mistakes))


def _check_usable(survey: "RowSurvey") -> None:
    """Raise UserError where no row can be read."""
    if survey.rows == 0:
        survey.bad.raise_if_any(survey.opened)


def _print_rows(survey: "RowSurvey") -> None:
    opened, row_format = survey.opened, survey.opened.row_format
    what = _ROWS[survey.example_type]
    if row_format.type == "prompt":
        what = "prompts without a reply"
    more = "" if survey.is_all else "; these are the first of more"
    count = pluralize(survey.rows + len(survey.bad.rows), "row")
    print(f"{opened.source.label}: {count}{more}, {what} (type {row_format.type})")
    names = row_format.columns.source_names
    used = [f"{column} (as {ours})" if column != ours else ours for ours, column in names.items()]
    _print_line("columns", ", ".join(used))
    if row_format.unused:
        _print_line("not used", ", ".join(row_format.unused))
    turns = survey.turns
    if survey.example_type == "conversation" and any(turns):
        most = pluralize(max(turns), "reply", "replies")
        text = f"median {survey.median(turns)}, at most {most} per row"
        _print_line("turns", text if max(turns) > 1 else "1 reply per row")
    extras = [
        f"{number:,} with {what}"
        for number, what in (
            (survey.systems, "a system prompt"),
            (survey.tools, "tools"),
            (survey.images, "images"),
        )
        if number
    ]
    if extras:
        _print_line("rows", ", ".join(extras))
    if survey.labels:
        verdicts = {"True": "good", "False": "bad"} if survey.example_type == "unpaired" else {}
        common = survey.labels.most_common(8)
        shown = [f"{verdicts.get(label, label)} ({count:,})" for label, count in common]
        more = f", and {len(survey.labels) - 8:,} more" if len(survey.labels) > 8 else ""
        _print_line("labels", f"{len(survey.labels):,}: {', '.join(shown)}{more}")


def _print_line(name: str, text: str) -> None:
    first, *more = wrap(text, _WIDTH - 12)
    print(f"  {name:<9} {first}")
    for line in more:
        print(f"{'':12}{line}")


def _print_lengths(inputs: "RecipeInputs") -> None:
    survey, lengths = inputs.survey, inputs.lengths
    if lengths is not None:
        text = f"median about {lengths.median:,} tokens, longest row about {lengths.longest:,}"
        _print_line("length", f"{text} ({inputs.choice.name})")
        return
    longest = max(survey.characters, default=0)
    text = f"median {survey.median(survey.characters):,} characters, longest row {longest:,}"
    _print_line("length", f"{text} (no tokenizer is at hand to count tokens)")


def _print_oddities(inputs: "RecipeInputs") -> None:
    """Print what a user should know of the rows before training, and what the recipe does."""
    from luthier.recipe_files.new_recipe import max_length, rows_over
    from luthier.recipe_files.row_survey import describe_roles

    survey = inputs.survey
    lines = []
    if rows := survey.bad.rows:
        first = f"{rows[0].where}: {rows[0].problem}"
        count = pluralize(len(rows), "row cannot", "rows cannot")
        them = "it" if len(rows) == 1 else "them"
        lines.append(f"{count} be read; the recipe leaves {them} out. The first: {first}")
    if locations := survey.empty:
        count = pluralize(len(locations), "row has", "rows have")
        them = "it" if len(locations) == 1 else "them"
        lines.append(
            f"{count} an empty reply ({_list_locations(locations)}); the recipe leaves {them} out."
        )
    if locations := survey.repeated:
        count = pluralize(len(locations), "row repeats", "rows repeat")
        them = "it" if len(locations) == 1 else "them"
        lines.append(
            f"{count} an earlier one ({_list_locations(locations)}); the recipe leaves {them} out."
        )
    few = sum(survey.roles.values()) * 10 <= survey.rows
    for line in describe_roles(survey):
        end = "the recipe leaves such rows out" if few else "rename it: training stops there"
        lines.append(f"{line[:-1]}; {end}.")
    if survey.placeholders:
        count = pluralize(survey.placeholders, "row holds", "rows hold")
        lines.append(f"{count} the text <image> and no image; it trains as plain text.")
    length = max_length(inputs)
    over = rows_over(inputs, length)
    if over and inputs.method != "pretrain":
        count = pluralize(over, "row is", "rows are")
        lines.append(f"About {count} longer than chat.max_length={length} of the recipe.")
    if survey.usable < 50:
        count = pluralize(survey.usable, "row")
        lines.append(f"Only {count} to train on: a model learns their form, and little else.")
    if len(survey.labels) == 1:
        lines.append(f"All rows have the same label, {next(iter(survey.labels))}.")
    if not lines:
        return
    print("\nBefore you train:")
    for line in lines:
        first, *more = wrap(line, _WIDTH - 4)
        print(f"  {first}")
        for each in more:
            print(f"    {each}")


def _list_locations(locations: list[str]) -> str:
    here = f"{Path.cwd()}/"
    shown = ", ".join(place.removeprefix(here) for place in locations[:3])
    return f"{shown}, ..." if len(locations) > 3 else shown


def _print_recipe(inputs: "RecipeInputs", path: Path) -> None:
    choice = inputs.choice
    how = "all its weights train"
    if choice.lora:
        how = "QLoRA" if choice.quantization else "LoRA"
    print(f"\nwritten {path}: trainer={inputs.method}, {choice.name} ({how})")
    if not choice.is_typed:
        _print_line("model", f"{choice.why}. Another one: luthier init ... --model PATH")
    if choice.note:
        _print_line("model" if choice.is_typed else "", choice.note)


def _print_next(command: str, recipe: str) -> None:
    print("\nNext:")
    print(f"  {command} preview {recipe:<24} # which tokens train, in colour")
    print(f"  {command} check {recipe:<26} # the whole dataset against the rules")
    print(f"  {command} train {recipe}")
