"""Code that a config names, and whose word it takes to run it.

A config can name functions (`python:module.function`), metrics whose code comes from the hub
(`evaluate:NAME`), and code that a model's repository brings (`model.trust_remote_code`). None of it
runs because a file says so: what the user types runs, what `--trust` allows runs, and a recipe may
call the functions of the user's own project. A run's folder may call nothing.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.env_references import find_references
from luthier.errors import UserError
from luthier.python_code import (
    PYTHON_PREFIX,
    find_python_file,
    is_own_file,
    is_python_path,
    split_python_path,
)
from luthier.redaction import HIDDEN, is_secret_variable, redact_override

TRUST_FLAG = "--trust"

_HUB_METRIC = "evaluate:"
_SWITCHES = {
    "trust_remote_code": "Python code of the model's repository",
    "use_kernels": "compiled code of the hub",
}
"""Settings that are true where code may run, wherever they stand -> what then runs."""
_MAPPINGS = ("auto_map", "auto_mapping", "custom_generate")
"""Settings of transformers and peft that name code, wherever they stand."""
_ATTENTION = ("attention", "attn_implementation")
_TEMPLATED = re.compile(r"(^|::)reference(://|::|$)")
"""fsspec's reference file system renders Jinja templates, outside of any sandbox."""


@dataclass(frozen=True)
class CodeReference:
    """A setting that names code, or a secret of the environment that it would read."""

    key: str
    """The setting, such as `dataset.path`."""
    text: str
    """Its value, such as `python:subprocess.getoutput`."""
    effect: str
    """What would run or be read, in words."""


@dataclass(frozen=True)
class Trust:
    """What of the code that a file names the user has allowed."""

    everything: bool = False
    """`--trust` was typed."""
    typed_keys: frozenset[str] = frozenset()
    """Settings that were typed: their values are the user's own, not the file's."""

    def allows(self, reference: CodeReference) -> bool:
        """Return whether the code of this setting may run."""
        is_typed = any(
            reference.key == key or reference.key.startswith(f"{key}.") for key in self.typed_keys
        )
        return self.everything or is_typed


NO_TRUST = Trust()
"""Nothing that a file names runs."""
EVERYTHING = Trust(everything=True)
"""All that a file names runs."""


def trust_of(switches: Iterable[str], settings: Iterable[tuple[str, Any]] = ()) -> Trust:
    """Return what was allowed by the flags of a command and its settings, as keys and values."""
    return Trust(TRUST_FLAG in switches, typed_keys(settings))


def typed_keys(settings: Iterable[tuple[str, Any]]) -> frozenset[str]:
    """Return the keys that settings set; of a mapping (`dataset={path: x}`), those inside it."""
    return frozenset(key for name, value in settings for key in _leaves(name, value))


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            # Code with arguments is a mapping under its path, and stands for the key above it.
            yield from [key] if is_python_path(name) else _leaves(f"{key}.{name}", below)
    else:
        yield key


def find_code(config: Any, key: str = "") -> list[CodeReference]:
    """Return every setting of a config, in plain values, that names code."""
    if isinstance(config, Mapping):
        references = []
        for name, below in config.items():
            key_below = f"{key}.{name}" if key else str(name)
            # A metric with settings is a mapping under its name: {python:my.score: {scale: 2}}.
            # A metric's setting `reference` names a column, and no file system.
            is_text = isinstance(name, str) and name != "reference"
            references += _find_in_text(key, name) if is_text else []
            references += _find_in_setting(key_below, str(name), below)
            references += find_code(below, key_below)
        return references + _find_in_source(key, config)
    if isinstance(config, list | tuple):
        return [reference for item in config for reference in find_code(item, key)]
    return _find_in_text(key, config) if isinstance(config, str) else []


def _find_in_text(key: str, text: str) -> list[CodeReference]:
    """Return the code that a text names by itself, such as `python:module.function`."""
    if is_python_path(text):
        where = find_python_file(text) or "there is no such module or file here"
        name = text.removeprefix(PYTHON_PREFIX)
        return [CodeReference(key, text, f"calls {name} ({where})")]
    if text.startswith(_HUB_METRIC):
        name = text.removeprefix(_HUB_METRIC)
        return [CodeReference(key, text, f"runs the code of the metric {name} of the hub")]
    if _TEMPLATED.search(text):
        return [CodeReference(key, text, "renders templates that the data brings")]
    return []


def _find_in_source(key: str, config: Mapping[Any, Any]) -> list[CodeReference]:
    """Return the functions of a source with `format: python`, whose paths need no prefix."""
    if config.get("format") != "python":
        return []
    held_out = config.get("eval")
    held_out_path = held_out.get("path") if isinstance(held_out, Mapping) else None
    paths = {"path": config.get("path"), "eval.path": held_out_path}
    return [
        reference
        for name, path in paths.items()
        if isinstance(path, str) and not path.startswith(PYTHON_PREFIX)
        for reference in _find_in_text(f"{key}.{name}", f"{PYTHON_PREFIX}{path}")
    ]


def _find_in_setting(key: str, name: str, value: Any) -> list[CodeReference]:
    """Return the code that a setting allows by its name and value."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    if name in _SWITCHES and value not in (False, None, "", 0):
        return [CodeReference(key, shown, f"runs {_SWITCHES[name]}")]
    if name in _MAPPINGS and value:
        return [CodeReference(key, shown, "runs Python code that it names")]
    if name == "megatron_config" and value:
        return [CodeReference(key, shown, "imports the module that megatron_core names")]
    if name == "weights_only" and value is False:
        return [CodeReference(key, shown, "loads pickles, which run code")]
    # transformers loads an attention with a slash as a compiled kernel of the hub.
    if name in _ATTENTION and isinstance(value, str) and "/" in value:
        return [CodeReference(key, shown, "runs a compiled kernel of the hub")]
    return []


def find_secrets_read(config: Any, keys: tuple[str, ...]) -> list[CodeReference]:
    """Return the settings below these keys that take a secret from this environment."""
    return [
        CodeReference(key, f"${{oc.env:{name}}}", f"reads {name} of your environment")
        for key, name in find_references(config)
        if is_secret_variable(name) and key.split(".")[0] in keys
    ]


def find_judge_keys(config: Any) -> list[CodeReference]:
    """Return the judges among a config's rewards that are sent a key of this environment."""
    trainer = config.get("trainer") if isinstance(config, Mapping) else None
    rewards = trainer.get("rewards") if isinstance(trainer, Mapping) else None
    references = []
    for entry in rewards if isinstance(rewards, list) else []:
        judge = entry.get("judge") if isinstance(entry, Mapping) else None
        # Written as `{judge: ADDRESS, ...}` or as `{judge: {address: ADDRESS, ...}}`.
        settings = judge if isinstance(judge, Mapping) else entry
        if judge is None or not settings.get("key_variable"):
            continue
        address = str(settings.get("address", judge))
        effect = f"reads {settings['key_variable']} of your environment and sends it there"
        references.append(CodeReference("trainer.rewards", address, effect))
    return references


def check_recorded(config: Any, where: str, trust: Trust, keys: tuple[str, ...] = ()) -> None:
    """Raise UserError for what the config of a run's folder would run and nobody has allowed.

    `config` is in plain values and `where` is the file. Below `keys`, secrets of the environment
    are refused too.
    """
    references = [*find_code(config), *find_secrets_read(config, keys)]
    references += find_judge_keys(config) if "trainer" in keys else []
    _refuse([each for each in references if not trust.allows(each)], where)


def check_composed_code(
    config: Any, trust: Trust, find_origin: Callable[[str], str | None]
) -> None:
    """Raise UserError for code that recipes and options name, outside of the user's own project.

    `find_origin` gives the file and line of a setting.
    """
    foreign = [
        reference
        for reference in find_code(config)
        if not trust.allows(reference)
        and not _is_own_function(reference.text, find_origin(reference.key))
    ]
    origins = [find_origin(reference.key) for reference in foreign]
    where = next((origin.rpartition(":")[0] for origin in origins if origin), "the recipe")
    _refuse(foreign, where)


def _is_own_function(text: str, origin: str | None) -> bool:
    """Return whether code lies in the user's own files; `origin` is the file that names it.

    Those of Python and of installed packages are not: `python:subprocess.getoutput` in a recipe of
    someone else's runs any command. Nor are files within a run's folder, which comes as a whole,
    and a file that is named by its path lies in the working folder or beside the recipe.
    """
    name = find_python_file(text) if is_python_path(text) else None
    if name is None or not Path(name).is_file() or not is_own_file(name):
        return False
    file = Path(name).resolve()
    if split_python_path(text).file is not None:
        recipe = Path((origin or "").rpartition(":")[0])
        if not any(file.is_relative_to(folder.resolve()) for folder in (Path(), recipe.parent)):
            return False
    return not any((folder / "run.json").is_file() for folder in file.parents)


def _refuse(references: list[CodeReference], where: str) -> None:
    """Raise UserError that lists what would run; nothing where there is nothing."""
    if not references:
        return
    unique = dict.fromkeys(references)
    lines = [f"  {each.key}: {each.text}  ({each.effect})" for each in unique]
    switches = [f"{each.key}={each.text}" for each in unique if each.text == "true"]
    typed = f", or type what you mean to run yourself ({switches[0]})" if switches else ""
    reads = any(each.effect.startswith("reads") for each in unique)
    noun = "code or takes secrets" if reads else "code"
    raise UserError(
        f"{where} names {noun} that you have not typed, so nothing was run. It would do this:\n"
        + "\n".join(lines)
        + f"\nIf you trust it, add {TRUST_FLAG}{typed}:\n    {_command()}"
    )


def _command() -> str:
    """Return the command that was typed, with --trust."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        start = ["python", "-m", "luthier"]
    elif program.suffix == ".py":
        start = ["python", sys.argv[0]]
    else:
        start = program.name.split()
    return shlex.join([*start, *map(redact_override, sys.argv[1:]), TRUST_FLAG])


def find_hidden(config: Any, key: str = "") -> Iterator[str]:
    """Yield the key of each value that a record holds no more, as it was a secret."""
    if isinstance(config, Mapping):
        for name, below in config.items():
            yield from find_hidden(below, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for item in config:
            yield from find_hidden(item, key)
    elif isinstance(config, str) and HIDDEN in config:
        yield key
