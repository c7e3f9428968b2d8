"""What the launcher of this process was asked for: by its flags, its config file or variables.

Nothing here imports torch or accelerate, so that a mistake is told before they are loaded.
"""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from luthier.config.recipes import bundled_folder
from luthier.errors import UserError, ask_nearest, read_own_launch
from luthier.storage.typed_files import load_yaml

# The launcher's flags that decide what runs; all its other flags are left alone.
_VALUE_FLAGS = {
    "config_file": str,
    "num_processes": int,
    "num_machines": int,
    "mixed_precision": str,
    "zero_stage": int,
    "gradient_accumulation_steps": str,
    "gradient_clipping": str,
    "deepspeed_config_file": str,
}
_MODE_FLAGS = {
    "use_deepspeed": "deepspeed",
    "use_fsdp": "fsdp",
    "use_megatron_lm": "megatron_lm",
    "multi_gpu": "ddp",
    "tpu": "xla",
}
_PARALLEL_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
"""Sizes of accelerate's `ParallelismConfig`, whose keys begin with `parallelism_config_`."""
_DISTRIBUTED_TYPES = {
    "FSDP": "fsdp",
    "DEEPSPEED": "deepspeed",
    "MEGATRON_LM": "megatron_lm",
    "XLA": "xla",
}
_MODULE = ("-m", "luthier", "train")
"""What `accelerate launch` starts where there is no `train.py`."""
_SHARDING_VARIABLES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
_DEEPSPEED_SETTINGS = ("gradient_accumulation_steps", "gradient_clipping")
_KEY_PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}
# accelerate reads this one although its parser does not know it.
_UNLISTED_KEYS = {"fsdp_ignored_modules"}


@dataclass(frozen=True)
class LaunchRequest:
    """What the launcher was asked for; None where nobody asked for anything."""

    num_processes: int | None = None
    """Of all machines together."""
    num_machines: int = 1
    distributed: str | None = None
    """none, ddp, fsdp, deepspeed, megatron_lm or xla."""
    zero_stage: int | None = None
    mixed_precision: str | None = None
    """no, fp16, bf16 or fp8."""
    use_cpu: bool = False
    parallelism: Mapping[str, int] = field(default_factory=dict)
    """Sizes of `parallelism_config` above 1, such as `cp_size`; their origin is in `set_by`."""
    gradient_accumulation_steps: str | None = None
    """A number, or `auto` in a DeepSpeed config."""
    gradient_clipping: str | None = None
    deepspeed_config_file: Path | None = None
    config_file: Path | None = None
    set_by: Mapping[str, str] = field(default_factory=dict)
    """The flag, line of a file or variable that set each of the above, by its name here."""


@cache
def read_launch_request() -> LaunchRequest | None:
    """Return what the launcher of this process was asked for; None if nobody asked for anything.

    Looks at the command line of the nearest Python process above this one, if that is `accelerate
    launch`, and at the environment otherwise (torchrun, srun, a notebook, plain python).
    """
    command = find_launcher_command()
    if command is None:
        return parse_launch_environment(os.environ)
    return parse_launch_command(*command, os.environ)


def launched_by() -> dict[str, Any] | None:
    """Return how a run was launched, as far as it takes to launch it so again.

    That is the content of accelerate's config file; None where there was none.
    """
    request = read_launch_request()
    if request is None or request.config_file is None:
        return None
    config = _read_config(request.config_file)
    return {"config_file": str(request.config_file), "config": config}


def parse_launch_command(
    arguments: Sequence[str], folder: Path, environ: Mapping[str, str]
) -> LaunchRequest:
    """Return what `accelerate launch` was asked for, by accelerate's own precedence.

    `arguments` are the words after `launch`; they win over the config file. A relative config file
    lies in `folder`. The tests hold this against accelerate's parser and loader, which cannot be
    used here because they import torch.
    """
    flags = _parse_flags(arguments)
    path = _config_file(flags, folder, environ)
    config = _read_config(path)
    # The file as the user knows it.
    file = flags.config_file or f"{path} (accelerate's default config file)"
    set_by: dict[str, str] = {}

    def pick(name: str, file_value: Any) -> Any:
        """Return the flag's value, else the file's, and note which of them it is."""
        # The flag wins, as in accelerate, and messages name what won.
        flag = getattr(flags, name)
        if flag is not None:
            set_by[name] = f"`--{name} {flag}`"
            return flag
        if file_value is not None:
            set_by[name] = f"`{name}: {file_value}` in {file}"
        return file_value

    deepspeed = config.get("deepspeed_config") or {}
    use_cpu = flags.cpu or bool(config.get("use_cpu"))
    if use_cpu:
        set_by["use_cpu"] = "`--cpu`" if flags.cpu else f"`use_cpu: true` in {file}"
    deepspeed_file = pick("deepspeed_config_file", deepspeed.get("deepspeed_config_file"))
    return LaunchRequest(
        num_processes=pick("num_processes", config.get("num_processes"))
        or _world_size(environ, set_by),
        num_machines=pick("num_machines", config.get("num_machines")) or 1,
        distributed=_distributed(flags, config, file, set_by),
        zero_stage=pick("zero_stage", deepspeed.get("zero_stage")),
        mixed_precision=pick("mixed_precision", _setting_text(config.get("mixed_precision"))),
        use_cpu=use_cpu,
        parallelism=_parallelism(flags, config, file, set_by),
        **{name: pick(name, _setting_text(deepspeed.get(name))) for name in _DEEPSPEED_SETTINGS},
        deepspeed_config_file=None if deepspeed_file is None else folder / deepspeed_file,
        config_file=path,
        set_by=set_by,
    )


def parse_launch_environment(environ: Mapping[str, str]) -> LaunchRequest | None:
    """Return what torchrun, another launcher or the user asked for by environment variables.

    None means that they ask for nothing.
    """
    set_by: dict[str, str] = {}
    sharding = [name for key, name in _SHARDING_VARIABLES.items() if is_on(environ, key)]
    precision = environ.get("ACCELERATE_MIXED_PRECISION")
    if sharding:
        set_by["distributed"] = f"`ACCELERATE_USE_{sharding[0].upper()}` in the environment"
    if precision is not None:
        set_by["mixed_precision"] = f"`ACCELERATE_MIXED_PRECISION={precision}` in the environment"
    if is_on(environ, "ACCELERATE_USE_CPU"):
        set_by["use_cpu"] = "`ACCELERATE_USE_CPU` in the environment"
    sizes = {}
    if is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name in _PARALLEL_SIZES:
            variable = f"PARALLELISM_CONFIG_{name.upper()}"
            if (size := int(environ.get(variable, "1"))) > 1:
                sizes[name], set_by[name] = size, f"`{variable}={size}` in the environment"
    request = LaunchRequest(
        num_processes=_world_size(environ, set_by),
        parallelism=sizes,
        distributed=sharding[0] if sharding else None,
        mixed_precision=precision,
        use_cpu="use_cpu" in set_by,
        set_by=set_by,
    )
    return request if set_by else None


def is_on(environ: Mapping[str, str], variable: str) -> bool:
    """Tell whether a variable of the environment holds what accelerate takes for true."""
    return environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")


def find_unknown_keys(path: Path) -> list[tuple[str, str, list[str]]]:
    """Return (group, key, all valid keys) for each key of a config file that accelerate ignores.

    It refuses unknown keys at the top of the file, but not those within `fsdp_config` and its like.
    """
    # The parser's source is read as text, because importing it would import torch.
    spec = importlib.util.find_spec("accelerate")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "commands" / "launch.py").read_text(encoding="utf-8")
    valid_keys = set(re.findall(r'"--([a-z0-9_]+)"', source)) | _UNLISTED_KEYS
    unknown = []
    for group, keys in _read_config(path).items():
        prefix = _KEY_PREFIXES.get(group, "")
        for key in keys if isinstance(keys, dict) else ():
            name = key if key.startswith(prefix) else prefix + key
            if name not in valid_keys:
                unknown.append((group, key, sorted(valid_keys)))
    return unknown


def find_launch_file(name: str, option: str) -> Path:
    """Return the config file of a launch by luthier's name for it, such as `fsdp2`, or by its path.

    `option` is what it was typed with. Raises UserError, with the nearest name, where there is
    none.
    """
    folder = bundled_folder("launch")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    near = " ".join(filter(None, ("there is no such file.", ask_nearest(path.stem, names))))
    raise UserError(
        f"{option} {name}: {near} Names: {', '.join(names)}; or the path of a file that "
        "`accelerate config` wrote."
    )


def format_train_command(*words: str) -> str:
    """Return the command that trains with these words, quoted for a shell, as this one was started.

    That is `luthier train`, `python train.py`, either of them under `accelerate launch` with its
    flags, or `luthier launch`.
    """
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.is_file() and script.name != "__main__.py"
    start = ["python", sys.argv[0]] if is_script else ["luthier", "train"]
    own_launch, launcher = read_own_launch(), find_launcher_command()
    if own_launch is not None:
        start = own_launch["typed"]
    elif launcher is not None:
        start = ["accelerate", "launch", *launcher[0], *(start[1:] if is_script else _MODULE)]
    return shlex.join([*start, *words])


def find_launcher_command() -> tuple[list[str], Path] | None:
    """Return the launcher's flags and its working folder; None if there is no launcher."""
    own_launch = read_own_launch()
    if own_launch is not None:
        return list(own_launch["flags"]), Path.cwd()
    try:
        # Shells and other wrappers may stand between the launcher and this process.
        for process in psutil.Process().parents():
            command = process.cmdline()
            if command and Path(command[0]).name.lower().startswith("python"):
                flags = extract_launcher_flags(command, sys.orig_argv)
                return None if flags is None else (flags, Path(process.cwd()))
    except (psutil.Error, OSError):
        # Other users' processes, or a machine that hides them: the environment has to do.
        return None
    return None


def extract_launcher_flags(command: Sequence[str], child: Sequence[str]) -> list[str] | None:
    """Return the flags of `accelerate launch` from its command line; None if it is another command.

    `child` is the command line of the training process: what the two end with alike, the script
    and its arguments, is left out.
    """
    start = _flags_start(command)
    if start is None:
        return None
    end = len(command)
    for launcher_word, child_word in zip(reversed(command), reversed(child), strict=False):
        # Compared from the end: the script may have arguments that look like flags of the launcher.
        if launcher_word != child_word or end <= start:
            break
        end -= 1
    return list(command[start:end])


def _flags_start(command: Sequence[str]) -> int | None:
    """Return where the launcher's flags start in its command line; None if it is no launcher."""
    for at, word in enumerate(command[1:], start=1):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return at + 1
        if word.endswith("accelerate/commands/launch.py"):
            return at + 1
        if name in ("accelerate", "accelerate.commands.accelerate_cli"):
            return at + 2 if list(command[at + 1 : at + 2]) == ["launch"] else None
        if not word.startswith("-"):
            return None
    return None


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the launcher's flags that decide what runs, written with underscores or hyphens."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, value_type in _VALUE_FLAGS.items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, type=value_type)
    for name in _PARALLEL_SIZES:
        parser.add_argument(f"--parallelism_config_{name}", dest=name, type=int)
    for name in (*_MODE_FLAGS, "cpu"):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, action="store_true")
    return parser.parse_known_args(arguments)[0]


def _config_file(
    flags: argparse.Namespace, folder: Path, environ: Mapping[str, str]
) -> Path | None:
    """Return the config file that the launcher read: the given one, or the user's default."""
    if flags.config_file is not None:
        return folder / flags.config_file
    caches = Path(environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(environ.get("HF_HOME", str(caches / "huggingface"))).expanduser()
    # `accelerate launch --cpu` passes over the default file, but not over one that is named.
    default = home / "accelerate" / "default_config.yaml"
    return default if default.is_file() and not flags.cpu else None


def _read_config(path: Path | None) -> dict[str, Any]:
    """Return the settings of a YAML or JSON config file."""
    if path is None:
        return {}
    # YAML takes in JSON.
    config: dict[str, Any] | None = load_yaml(path, dict[str, Any])
    return config or {}


def _setting_text(value: Any) -> str | None:
    """Return a setting as text; YAML reads a bare `no` as false."""
    if value is None:
        return None
    return "no" if value is False else str(value)


def _distributed(
    flags: argparse.Namespace, config: Mapping[str, Any], file: str, set_by: dict[str, str]
) -> str | None:
    """Return how the work was asked to be shared: a flag wins over the config file."""
    for flag, name in _MODE_FLAGS.items():
        if getattr(flags, flag):
            set_by["distributed"] = f"`--{flag}`"
            return name
    distributed_type = _setting_text(config.get("distributed_type"))
    if distributed_type is None:
        return None
    set_by["distributed"] = f"`distributed_type: {distributed_type}` in {file}"
    if distributed_type.upper() == "NO":
        return "none"
    return _DISTRIBUTED_TYPES.get(distributed_type, "ddp")


def _parallelism(
    flags: argparse.Namespace, config: Mapping[str, Any], file: str, set_by: dict[str, str]
) -> dict[str, int]:
    """Return the sizes of `parallelism_config` above 1: a flag wins over the config file."""
    sizes = {}
    for name in _PARALLEL_SIZES:
        key = f"parallelism_config_{name}"
        flag, value = getattr(flags, name), (config.get("parallelism_config") or {}).get(key)
        size = int(value or 1) if flag is None else flag
        if size > 1:
            sizes[name] = size
            set_by[name] = f"`{key}: {size}` in {file}" if flag is None else f"`--{key} {size}`"
    return sizes


def _world_size(environ: Mapping[str, str], set_by: dict[str, str]) -> int | None:
    """Return the number of processes that `WORLD_SIZE` speaks of."""
    size = environ.get("WORLD_SIZE")
    if size is None:
        return None
    set_by["num_processes"] = f"`WORLD_SIZE={size}` in the environment"
    return int(size)
