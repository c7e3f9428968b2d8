"""`luthier convert`: a recipe of an axolotl, LLaMA-Factory or TRL config."""

from pathlib import Path

from luthier.cli.arguments import CommandLine, Flag
from luthier.errors import Mistake, UserError
from luthier.recipe_files.conversion import Conversion
from luthier.recipe_files.draft import (
    command_prefix,
    describe_shadowed,
    recipe_path,
    typed_recipe,
    wrap,
    write_recipe,
)
from luthier.terminal import pluralize

COMMAND_LINE = CommandLine(
    "convert",
    "luthier convert FILE [flags]\n\n"
    "Writes a recipe for a config of axolotl (YAML), LLaMA-Factory (YAML, JSON or a shell script\n"
    "with its command) or TRL's command line. It lists every key that is not carried over, with\n"
    "the reason, and every key that means something else here. Nothing is loaded or trained.\n\n"
    "Exit code: 0 if the recipe composes, 1 if something in it has to be corrected first, 2 for a\n"
    "file that cannot be converted.",
    (
        Flag("-o", "FILE", "the recipe's file; recipes/NAME.yaml if not given"),
        Flag("--dataset-info", "FILE", "LLaMA-Factory's dataset_info.json"),
        Flag("--trainer", "NAME", "the script of TRL that reads the file: sft, dpo, kto, ..."),
        Flag("--force", None, "replace a recipe of that name"),
    ),
    "  luthier convert qlora.yml\n"
    "  luthier convert llama3_lora_sft.yaml --dataset-info data/dataset_info.json\n"
    "  luthier convert dpo.yaml --trainer dpo -o recipes/preferences.yaml\n",
)
_WIDTH = 80


def run(arguments: list[str]) -> int:
    """Convert one config; returns 0 if the recipe composes, and 1 if it does not."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if len(parsed.overrides) != 1:
        raise UserError("luthier convert takes one file: luthier convert FILE. See --help.")
    from luthier.recipe_files.convert import convert_file, default_name
    from luthier.recipe_files.trl_config import TRL_METHODS

    file = Path(parsed.overrides[0]).expanduser()
    method = parsed.texts.get("--trainer")
    if method is not None and method not in TRL_METHODS:
        raise UserError(f"--trainer {method}: write one of {', '.join(TRL_METHODS)}.")
    info = parsed.texts.get("--dataset-info")
    path = recipe_path(parsed.texts.get("-o"), default_name(file), "--force" in parsed.switches)
    converted = convert_file(file, Path(info).expanduser() if info else None, method)
    conversion = converted.conversion
    note = describe_shadowed(path)
    command = f"{command_prefix(path)}luthier train {typed_recipe(path)}"
    conversion.draft.header.append(f"Command: {command}")
    write_recipe(path, conversion.draft)
    print(f"{conversion.project} config {file} -> {path}\n")
    _print(conversion)
    if note:
        print(f"{note}\n")
    _print_mistakes(converted.mistakes)
    _print_next(conversion, path)
    return 1 if converted.mistakes else 0


def _print(conversion: Conversion) -> None:
    count = pluralize(len(conversion.carried), "key is", "keys are")
    print(f"{count} carried over; the recipe names each beside its setting.")
    _print_keys("Not carried over", conversion.dropped)
    _print_keys("Not quite the same here", conversion.different)
    _print_grouped("No setting needed here", conversion.needless)
    if conversion.empty:
        print("\nWithout a value in the file, so there is nothing to carry over:")
        _print_wrapped(", ".join(conversion.empty))
    print()


def _print_keys(title: str, keys: dict[str, str]) -> None:
    if not keys:
        return
    print(f"\n{title} ({len(keys)}):")
    for key, text in keys.items():
        _print_wrapped(f"{key}: {text}")


def _print_grouped(title: str, keys: dict[str, str]) -> None:
    """Print keys with their reasons, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for key, why in keys.items():
        reasons.setdefault(why, []).append(key)
    _print_keys(f"{title}", {", ".join(names): why for why, names in reasons.items()})


def _print_wrapped(text: str) -> None:
    first, *more = wrap(text, _WIDTH - 4)
    print(f"  {first}")
    for line in more:
        print(f"    {line}")


def _print_mistakes(mistakes: list[Mistake]) -> None:
    if not mistakes:
        return
    print("To correct before it runs here:")
    for mistake in mistakes:
        _print_wrapped(f"{mistake.key}: {mistake.text}")
    print()


def _print_next(conversion: Conversion, path: Path) -> None:
    """Print the commands that come next."""
    prefix, recipe = command_prefix(path), typed_recipe(path)
    print("Next:")
    print(f"  {prefix}luthier check {recipe}")
    print(f"  {prefix}luthier plan {recipe}")
    if conversion.launch:
        print(f"  {prefix}luthier launch --config {conversion.launch} {recipe}")
    else:
        print(f"  {prefix}luthier train {recipe}")
