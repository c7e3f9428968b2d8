"""`luthier completion SHELL` and what a completion script asks at each Tab.

The scripts call `luthier __complete SHELL WORDS...`, which must answer before a user notices: no
training library and no Hydra is imported for it.
"""

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.cli.arguments import CommandLine
from luthier.errors import UserError

COMMAND_LINE = CommandLine(
    "completion",
    "luthier completion bash|zsh|fish\n\nPrints a script that completes commands, flags, recipes, "
    "groups and their options, keys, paths\nand runs. To load it in each new shell:\n\n"
    "  bash  echo 'eval \"$(luthier completion bash)\"' >> ~/.bashrc\n"
    "  zsh   echo 'eval \"$(luthier completion zsh)\"' >> ~/.zshrc   (behind compinit)\n"
    "  fish  luthier completion fish > ~/.config/fish/completions/luthier.fish",
)

_SCRIPTS = {
    # bash cuts words at `=` and `:`, so the whole line is sent, and what stands before the last
    # cut is left out of each answer.
    "bash": """\
_luthier() {
  local line="${COMP_LINE:0:COMP_POINT}"
  mapfile -t COMPREPLY < <(luthier __complete bash "$COMP_WORDBREAKS" "$line" 2>/dev/null)
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace; fi
}
complete -o nosort -F _luthier luthier
""",
    "zsh": """\
#compdef luthier
_luthier() {
  local -a answers open closed
  answers=("${(@f)$(luthier __complete zsh "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  open=(${(M)answers:#*[=./]}) closed=(${answers:#*[=./]})
  (( $#open )) && compadd -S '' -- $open
  (( $#closed )) && compadd -- $closed
}
compdef _luthier luthier
""",
    "fish": """\
function __luthier_complete
  set -l words (commandline -opc) (commandline -ct)
  luthier __complete fish $words[2..-1] 2>/dev/null
end
complete -c luthier -f -a '(__luthier_complete)'
""",
}


def run(arguments: list[str]) -> int:
    """Print the script of a shell."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    words = COMMAND_LINE.parse(arguments).overrides
    if len(words) != 1 or words[0] not in _SCRIPTS:
        raise UserError("Name your shell: luthier completion bash, zsh or fish.")
    print(_SCRIPTS[words[0]], end="")
    return 0


def answer(arguments: list[str]) -> int:
    """Print what can stand at the end of a command line, a line each.

    `arguments` are the shell, then its words up to the cursor: for bash its word breaks and the
    line, for the others the words behind `luthier`, the last of which may be empty.
    """
    shell, *words = arguments
    breaks = ""
    if shell == "bash":
        breaks, line = words
        words = re.split(r"(?<!\\)\s+", line)[1:]
    for text in complete(words or [""]):
        print(text[_cut(words[-1], breaks) :])
    return 0


def _cut(word: str, breaks: str) -> int:
    """Return how many characters of a word bash takes for words before it."""
    return max((word.rfind(mark) + 1 for mark in breaks if not mark.isspace()), default=0)


def complete(words: list[str]) -> list[str]:
    """Return what can stand in place of the last of the words behind `luthier`."""
    from luthier.cli.main import COMMANDS

    *before, current = words
    if not before:
        texts = [*COMMANDS, "--help", "--version"]
    elif before[0] not in COMMANDS:
        texts = []
    else:
        texts = list(_arguments(before[0], before[1:], current))
    # What is typed in quotes begins with one.
    typed = current.lstrip("\"'")
    quote = current[: len(current) - len(typed)]
    return [f"{quote}{text}" for text in dict.fromkeys(texts) if text.startswith(typed)]


def _arguments(command: str, before: list[str], current: str) -> Iterator[str]:
    """Yield what a command takes where the current word stands."""
    from luthier.cli.main import COMMANDS

    if current.startswith("-"):
        yield from _flags(command)
        return
    if before and _takes_value(command, before[-1]):
        yield from _paths(current)
        return
    typed = COMMANDS[command].typed.split()[1:]
    current = current.lstrip("\"'")
    positional = [word for word in before if "=" not in word and not word.startswith("-")]
    name = typed[len(positional)].strip("[]") if len(positional) < len(typed) else ""
    if command == "completion":
        yield from _SCRIPTS
    elif name in ("RUN", "MODEL", "FOLDER", "FILE") and "=" not in current:
        yield from _runs() if name != "FILE" else ()
        yield from _paths(current)
    elif "KEY" in typed[:1] or any(word.startswith(("[key=", "recipe=")) for word in typed):
        yield from _settings(before, current, is_key=command == "explain" and not positional)


def _flags(command: str) -> list[str]:
    """Return the flags of a command."""
    if command == "train":
        from luthier.cli.train import FLAGS

        return [*FLAGS, "-m"]
    return [*(flag.name for flag in _command_line(command).flags), "--help"]


def _command_line(command: str) -> Any:
    from luthier.cli.main import COMMANDS

    module = import_module(COMMANDS[command].place.partition(":")[0])
    return getattr(module, "COMMAND_LINE", CommandLine(command, ""))


def _takes_value(command: str, word: str) -> bool:
    """Return whether a word is a flag whose value is still to come."""
    if not word.startswith("-") or command == "train":
        return False
    return any(flag.name == word and flag.value for flag in _command_line(command).flags)


def _runs() -> Iterator[str]:
    """Yield the runs below runs/, the newest first."""
    folders = [path.parent for path in Path("runs").glob("*/*/config.yaml")]
    yield from map(str, sorted(folders, key=lambda folder: -folder.stat().st_mtime))


def _paths(typed: str, prefix: str = "") -> Iterator[str]:
    """Yield the files and folders whose names begin with what is typed, behind a prefix."""
    folder, slash, start = typed.rpartition("/")
    place = Path(f"{folder}{slash}" or ".").expanduser()
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            yield f"{prefix}{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"


_PATHS = re.compile(r"(.*\.)?(path|output_dir|cache|template|tokenizer|teacher)")


def _settings(before: list[str], current: str, is_key: bool) -> Iterator[str]:
    """Yield settings: groups with `=`, keys one name at a time, and the values of a key."""
    from luthier.config.json_schema import config_schema, find_node
    from luthier.config.recipes import list_options
    from luthier.config.schema import GROUPS

    key, equals, value = current.partition("=")
    if equals:
        if key in (*GROUPS, "recipe"):
            yield from (f"{key}={option}" for option in list_options(key))
        elif _PATHS.fullmatch(key):
            yield from _paths(value, f"{key}=")
        elif node := find_node(config_schema(_methods(before)), key):
            yield from (f"{key}={text}" for text in _values(node))
        return
    group, dot, _ = current.rpartition(".")
    node = find_node(config_schema(_methods(before)), group) if dot else None
    if not dot:
        node = config_schema(_methods(before))
        yield from (f"{name}{'' if is_key else '='}" for name in ("recipe", *GROUPS))
    for name, below in (node or {}).get("properties", {}).items():
        if name == "recipe" and not dot:
            continue
        has_keys = "properties" in below or isinstance(below.get("additionalProperties"), dict)
        yield f"{group}{dot}{name}{'.' if has_keys else '' if is_key else '='}"


def _values(node: dict[str, Any]) -> Iterator[str]:
    """Yield the values of a key that has few."""
    for each in node.get("anyOf", [node]):
        yield from map(str, [*each.get("enum", []), *each.get("examples", [])])
        yield from ["true", "false"] if each.get("type") == "boolean" else []
        yield from ["null"] if each.get("type") == "null" else []
    yield from map(str, node.get("examples", []))


def _methods(before: list[str]) -> dict[str, Any]:
    """Return the methods that the words before the cursor choose, as a config has them."""
    from luthier.config.recipes import list_options

    chosen = dict(word.partition("=")[::2] for word in before if "=" in word)
    recipe = list_options("recipe").get(chosen.get("recipe", ""))
    text = recipe.read_text(encoding="utf-8") if recipe else ""
    methods = {}
    for group, usual in (("trainer", "sft"), ("lora", "lora")):
        match = re.search(rf"override /{group}: (\w+)", text)
        option = chosen.get(group) or (match[1] if match else "")
        file = list_options(group).get(option)
        method = re.search(r"^method: (\w+)", file.read_text("utf-8"), re.M) if file else None
        methods[group] = {"method": method[1] if method else usual}
    return methods
