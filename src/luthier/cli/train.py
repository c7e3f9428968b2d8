"""The command line of `train.py`: flags, then overrides, then one run."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import luthier
from luthier import errors
from luthier.cli.arguments import TRUST
from luthier.config import recipes
from luthier.config.code_settings import CODE_SETTINGS
from luthier.config.compose import CONFIG_NAME, check_overrides, compose_config, resolve_config
from luthier.config.load import LoadedConfig, check_composed, format_mistakes, load_config
from luthier.config.recipes import list_options, list_recipes, read_recipe_header
from luthier.config.schema import GROUPS
from luthier.errors import UserError, nearest_option
from luthier.redaction import redact, remember_secrets
from luthier.storage.write_errors import report_machine_error
from luthier.terminal import guard_output, leave_closed_pipe, print_yaml

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Columns of what `--help` prints.
_WIDTH = 100

_EXAMPLES = {
    "recipe=quickstart": "a real model on any machine, in minutes",
    "recipe=quickstart dry_run=true": "everything up to the first step",
    "recipe=quickstart lora.r=8 trainer.args.learning_rate=5e-4": "",
    "recipe=qlora_llama dataset=jsonl dataset.path=my.jsonl": "",
    "model=hub model.path=Qwen/Qwen3-0.6B dataset=jsonl dataset.path=my.jsonl": "",
    "-m recipe=quickstart lora.r=8,16,32": "a sweep: every value is a run",
}
_HELP_BOTTOM = """\
Settings of the libraries, by their own names
  trainer.args.NAME   trl.SFTConfig            lora.NAME          peft.LoraConfig
  model.kwargs.NAME   from_pretrained          quantization.NAME  transformers.BitsAndBytesConfig

Sweeps (-m): every combination of values is tried; how it is done
  hydra/sweeper=NAME  basic, random or optuna      hydra.sweeper.NAME   its settings
  hydra/launcher=NAME basic or submitit_slurm      hydra.launcher.NAME  its settings

Flags
  -m, --multirun           a sweep (luthier docs sweeps)
  --cfg job --resolve      print the whole configuration and stop (-p GROUP: a part of it)
  --info searchpath        where config groups and recipes are looked for
  --info defaults-tree     which file includes which
  --trust                  let a recipe run code that is not in this project (luthier docs runs)
  --version                luthier's version

Your own files: ./conf/GROUP/NAME.yaml is group=NAME; ./recipes/NAME.yaml is recipe=NAME."""


def help_text() -> str:
    """Return the page that `--help` prints."""
    from luthier.train.launch.request import format_train_command

    start = format_train_command()
    lines = [
        "luthier turns a recipe into a fine-tuned language model.",
        "",
        f"  {start} recipe=NAME [group=option ...] [key=value ...]",
        "  luthier launch recipe=NAME ...        the same on several devices",
        "",
        "Examples",
    ]
    width = max(len(words) for words, about in _EXAMPLES.items() if about) + 3
    lines += [f"  {start} {words:<{width}}{about}".rstrip() for words, about in _EXAMPLES.items()]
    lines += ["", "Recipes"]
    lines += _help_table({recipe.name: recipe.header for recipe in list_recipes()})
    lines += ["", "Groups and their options"]
    for group in GROUPS:
        headers = {
            f"{group}={name}": read_recipe_header(path)
            for name, path in list_options(group).items()
        }
        lines += _help_table(headers)
    lines += ["", "Your own code, as python:module.name or python:file.py:name (luthier docs code)"]
    lines += _help_table({name: setting.summary for name, setting in CODE_SETTINGS.items()})
    return "\n".join([*lines, "", _HELP_BOTTOM])


def _help_table(texts: dict[str, str]) -> list[str]:
    """Return lines with a name and its text, which is cut where the line is full."""
    width = max([29, *(len(name) + 1 for name in texts)])
    room = _WIDTH - width - 2
    lines = []
    for name, text in texts.items():
        text = text if len(text) <= room else f"{text[: room - 3].rstrip()}..."
        lines.append(f"  {name:<{width}}{text}")
    return lines


INTERRUPTED_EXIT_CODE = 130
"""The exit code of a program that SIGINT ended, as shells have it."""

FLAGS = (
    *("--help", "--version", "--cfg", "--resolve", "--package", "--info", "--multirun"),
    TRUST.name,
)
_SHORT_FLAGS = {
    "-h": "--help",
    "-c": "--cfg",
    "-p": "--package",
    "-i": "--info",
    "-m": "--multirun",
}
_FLAGS_WITH_VALUE = ("--cfg", "--package", "--info")
_CFG_VALUES = ("job", "hydra", "all")
_INFO_VALUES = ("searchpath", "defaults", "defaults-tree", "config", "plugins", "all")
# Hydra accepts these without -m and ignores them, so a forgotten -m would train once.
_SWEEP_KEYS = ("hydra/sweeper", "hydra.sweeper", "hydra/launcher", "hydra.launcher")


class TrainCommandLine(NamedTuple):
    """The command line taken apart: flags with their values, and the overrides as typed."""

    flags: dict[str, str]
    overrides: list[str]


def main(task: Callable[[LoadedConfig], int | None], argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit code.

    `task` gets the valid configuration. A user's mistake is printed in words, and the code is 2.
    """
    began = time.monotonic()
    guard_output()
    try:
        arguments = _parse_command_line(sys.argv[1:] if argv is None else argv)
        is_trusted = arguments.flags.pop(TRUST.name, None) is not None
        # Imported only here: a single run needs nothing of sweeps.
        if set(arguments.flags) == {"--multirun"}:
            from luthier.cli.sweep import run_sweep

            return run_sweep(arguments.overrides, is_trusted)
        if arguments.flags:
            return _print_information(arguments)
        _refuse_sweep_settings(arguments.overrides)
        # A task that returns None has ended well.
        loaded = load_config(arguments.overrides, is_trusted)
        return task(replace(loaded, began=began)) or 0
    except UserError as mistake:
        return errors.report_error(mistake)
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to resume.", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        if not arguments.flags:  # a run is not over because nobody reads what it prints
            raise
        leave_closed_pipe()
        return 0
    except Exception as error:
        # Whatever cannot be read or written, or has no memory: in words; others are raised again.
        return report_machine_error(error)


def _parse_command_line(argv: list[str]) -> TrainCommandLine:
    """Take the command line apart; UserError for a flag that does not exist."""
    flags: dict[str, str] = {}
    overrides: list[str] = []
    arguments = iter(argv)
    for word in arguments:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        short, _, value = word.partition("=")
        name = _SHORT_FLAGS.get(short, short)
        if name not in FLAGS:
            raise UserError(_unknown_flag(word, name, value or next(arguments, "")))
        flags[name] = (value or next(arguments, "")) if name in _FLAGS_WITH_VALUE else ""
    return TrainCommandLine(flags, overrides)


def _unknown_flag(word: str, name: str, value: str) -> str:
    """Return the message for a flag that does not exist; mostly it is a setting with dashes."""
    from luthier.config.validate import suggest_setting

    is_setting = not value.startswith("-") and "=" not in value
    if setting := suggest_setting(name, value if is_setting else ""):
        return f"{word}: there is no such flag. Settings have no dashes: write {setting}."
    close = nearest_option(name, FLAGS)
    guess = f"Did you mean {close}? " if close else ""
    return (
        f"{word}: there is no such flag. {guess}"
        f"Flags: {', '.join(FLAGS)}; settings are written key=value."
    )


def _refuse_sweep_settings(overrides: list[str]) -> None:
    """Raise UserError for settings of a sweep where one run was asked for."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(_SWEEP_KEYS):
            raise UserError(
                f"{key}: this is a setting of a sweep, and one run was asked for. Add -m."
            )


def _print_information(arguments: TrainCommandLine) -> int:
    """Print what the flags ask for, instead of training; return the exit code."""
    flags = arguments.flags
    if "--help" in flags:
        print(help_text())
    elif "--version" in flags:
        print(f"luthier {luthier.__version__}")
    elif "--info" in flags:
        _print_info(_check_choice("--info", flags["--info"], _INFO_VALUES), arguments.overrides)
    elif "--cfg" in flags:
        return _print_config(_check_choice("--cfg", flags["--cfg"], _CFG_VALUES), arguments)
    else:
        raise UserError(f"{', '.join(flags)} is used with --cfg: --cfg job --resolve")
    return 0


def _check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return the value of a flag; UserError where it is none of the allowed ones."""
    if value in allowed:
        return value
    raise UserError(f"{flag} {value}: write {flag} {'|'.join(allowed)}.")


def _print_config(what: str, arguments: TrainCommandLine) -> int:
    """Print a configuration; one with mistakes is printed as far as it goes, with the mistakes."""
    from omegaconf import OmegaConf

    composed = compose_config(arguments.overrides, with_hydra=True)
    assert composed.config is not None
    config = _select_config(composed.config, what)
    # Shown although it is wrong: who looks for a mistake needs the config that has it.
    mistake = None
    try:
        loaded = check_composed(composed, arguments.overrides, is_trusted=True)
        if "--resolve" in arguments.flags and what == "job":
            # Printed as it is recorded: what is printed is pasted elsewhere.
            config = OmegaConf.create(loaded.recorded)
    except UserError as error:
        mistake = error
    package = arguments.flags.get("--package", "")
    value = OmegaConf.select(config, package) if package else config
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    # Under its key, by which a secret is known.
    *_, name = ["", *package.split(".")]
    print_yaml(redact({name: plain})[name] if name else redact(plain))
    return 0 if mistake is None else errors.report_error(mistake)


def _select_config(config: "DictConfig", what: str) -> "DictConfig":
    """Return the part of a composed config that `--cfg job`, `hydra` or `all` prints."""
    from omegaconf import OmegaConf

    if what == "hydra":
        return OmegaConf.create({"hydra": config.get("hydra")})
    selected = config.copy()
    # Hydra composes in struct mode, in which no key can be removed.
    OmegaConf.set_struct(selected, False)
    if what == "job":
        selected.pop("hydra", None)
    return selected


def _print_info(what: str, overrides: list[str]) -> None:
    """Print what `--info` asks for: where configs are looked for, or what Hydra knows."""
    if what == "searchpath":
        print("Config groups are looked for in (the first that has an option wins):")
        print("\n".join(f"  {folder}" for folder in recipes.conf_folders()))
        print("Recipes (./recipes, $LUTHIER_RECIPES, bundled):")
        print("\n".join(f"  {folder}" for folder in recipes.recipe_folders()))
        return
    _print_hydra_info(what, overrides)


def _print_hydra_info(what: str, overrides: list[str]) -> None:
    """Let Hydra print what it knows about these overrides."""
    import hydra

    from luthier.config import hydra_plugins

    composed = compose_config(overrides)
    if composed.mistakes:
        raise UserError(format_mistakes(composed.mistakes, composed))
    # Hydra prints the values as they are; the output hides those that are remembered.
    remember_secrets(resolve_config(composed))
    typed, chain, *_ = check_overrides(overrides)
    conf = str(recipes.bundled_folder("conf"))
    # hydra.main (1.3) reads sys.argv and takes no list of words.
    argv, sys.argv = (
        sys.argv,
        [sys.argv[0], "--info", what, *(override.for_hydra for override in typed)],
    )
    try:
        with hydra_plugins.drop_groups(chain.dropped):
            hydra.main(version_base="1.3", config_path=conf, config_name=CONFIG_NAME)(_no_task)()
    finally:
        sys.argv = argv


def _no_task(_: object) -> None:
    """Stand in for a task where Hydra only prints."""


def train(loaded: LoadedConfig) -> int:
    """Train a valid configuration and write the card of its model; torch is imported here."""
    from luthier.train.run import run

    return run(loaded, _write_card)


def _write_card(folder: Path) -> str | None:
    """Write the card of a finished run's model; return what went wrong, or None."""
    # numpy comes with it, which a mistake before the training does not need.
    from luthier.export.write_card import write_card

    return write_card(folder)
