"""From another trainer's config to a recipe: which trainer it is, and what composes here."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.config.compose import compose_config, resolve_config
from luthier.config.cross_checks import check_combinations
from luthier.config.methods import METHODS
from luthier.config.passthrough import check_pass_through
from luthier.config.validate import validate_config
from luthier.errors import Mistake, UserError, ask_nearest
from luthier.recipe_files.axolotl import convert_axolotl
from luthier.recipe_files.conversion import Conversion
from luthier.recipe_files.draft import recipe_name, wrap
from luthier.recipe_files.llama_factory import convert_llama_factory
from luthier.recipe_files.trl_config import TRL_METHODS, convert_trl
from luthier.storage.typed_files import check_yaml_size

_LLAMA_FACTORY_KEYS = {
    "stage", "finetuning_type", "template", "cutoff_len", "dataset_dir", "do_train", "lora_target",
    "lora_rank", "export_dir", "infer_backend", "model_class", "train_dataset",
}  # fmt: skip
_TRL_KEYS = {"dataset_name", "dataset_config", "use_peft", "dataset_train_split", "datasets"}


@dataclass(frozen=True)
class ForeignConfig:
    """A config of another trainer as it was read."""

    project: str
    """`axolotl`, `LLaMA-Factory` or `TRL`."""
    settings: Mapping[str, Any]
    method: str | None = None
    """The script of TRL's command line that reads it, where the file says so."""


@dataclass(frozen=True)
class ConvertedRecipe:
    """The recipe of another trainer's config, and what is to be said about it."""

    conversion: Conversion
    mistakes: list[Mistake]
    """What keeps the recipe from running on this machine as it is."""


def convert_file(file: Path, dataset_info: Path | None, method: str | None) -> ConvertedRecipe:
    """Convert a config; UserError for one that is none, or that trains in no way luthier has.

    `dataset_info` says where LLaMA-Factory's `dataset_info.json` is, `method` which script of TRL
    reads the file. A setting that luthier would refuse is taken out of the recipe and counts as
    not carried over, with the reason.
    """
    config = read_foreign_config(file)
    conversion = Conversion(config.project, file, config.settings)
    if config.project == "axolotl":
        convert_axolotl(conversion)
    elif config.project == "LLaMA-Factory":
        convert_llama_factory(conversion, dataset_info)
    else:
        convert_trl(conversion, method or config.method)
    mistakes = _drop_refused(conversion)
    _describe(conversion)
    return ConvertedRecipe(conversion, mistakes)


def read_foreign_config(file: Path) -> ForeignConfig:
    """Read a config (YAML, JSON, or a shell script with a command) and tell whose it is."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: this is not text in UTF-8, as a config is.") from None
    except OSError as error:
        raise UserError(f"{file}: {_describe_unread(file, error)}") from None
    if file.suffix == ".sh":
        return _read_script(file, text)
    settings = _parse(file, text)
    keys = set(settings)
    if "base_model" in keys:
        return ForeignConfig("axolotl", settings)
    if keys & _LLAMA_FACTORY_KEYS and keys & {"model_name_or_path", "stage", "model"}:
        return ForeignConfig("LLaMA-Factory", settings)
    if "model_name_or_path" in keys and keys & (_TRL_KEYS | {"learning_rate"}):
        return ForeignConfig("TRL", settings)
    raise UserError(_unknown(file, keys))


def _describe_unread(file: Path, error: OSError) -> str:
    """Return why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        beside = sorted(file.parent.glob("*")) if file.parent.is_dir() else []
        near = ask_nearest(file.name, [path.name for path in beside])
        return f"there is no such file. {near}".rstrip()
    if isinstance(error, IsADirectoryError):
        return "this is a folder. Name the file of the config."
    return f"it cannot be read: {error.strerror or error}."


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        if file.suffix == ".json":
            content = json.loads(text)
        else:
            check_yaml_size(text, str(file))
            content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        language = "JSON" if file.suffix == ".json" else "YAML"
        raise UserError(f"{file}: it cannot be read as {language}: {words}.") from None
    if not isinstance(content, dict) or not content:
        what = "this is not a mapping" if content else "it is empty, and no mapping"
        raise UserError(f"{file}: {what} of keys to values, as a trainer's config is.")
    return {str(key): value for key, value in content.items()}


def _unknown(file: Path, keys: set[str]) -> str:
    if {"defaults", "trainer", "chat", "lora"} & keys:
        return f"{file}: this is a recipe of luthier already: luthier train recipe={file.stem}"
    if {"distributed_type", "compute_environment"} & keys:
        return (
            f"{file}: this is a config of accelerate, which says how a run is launched: accelerate "
            f"launch --config_file {file} ... (`luthier docs launch`)."
        )
    shown = ", ".join(sorted(keys)[:8])
    return (
        f"{file}: luthier converts configs of axolotl (base_model, datasets, ...), LLaMA-Factory "
        "(model_name_or_path, stage, dataset, ...) and TRL's command line (model_name_or_path, "
        f"dataset_name, ...), and this is none of them. Its keys: {shown}."
    )


def _read_script(file: Path, text: str) -> ForeignConfig:
    """Return the flags of the first training command of a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        start = next((n for n, word in enumerate(words) if _is_trainer(word)), None)
        if start is None:
            continue
        configs = [w for w in words[start:] if w.endswith((".yaml", ".yml", ".json"))]
        flags = _read_flags(words[start + 1 :], text)
        if "config" in flags or (configs and len(flags) < 3):
            named = flags.get("config") or configs[0]
            raise UserError(f"{file}: it trains by {named}. Convert that: luthier convert {named}")
        if "model_name_or_path" not in flags:
            continue
        if "stage" in flags or "finetuning_type" in flags:
            return ForeignConfig("LLaMA-Factory", flags)
        script = next((word for word in words[start:] if word in TRL_METHODS), None)
        return ForeignConfig("TRL", flags, script)
    raise UserError(
        f"{file}: luthier finds no command of a trainer in it, such as llamafactory-cli train "
        "--model_name_or_path ... or trl sft --model_name_or_path ..."
    )


def _is_trainer(word: str) -> bool:
    name = word.rpartition("/")[2]
    return name in ("llamafactory-cli", "trl", "axolotl", "train.py", "train_bash.py", "run_exp.py",
                    *(f"{method}.py" for method in TRL_METHODS))  # fmt: skip


def _read_flags(words: list[str], text: str) -> dict[str, Any]:
    """Return `--key value` words as settings; a flag without a value is true."""
    flags: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            flags[key] = _read_value(value, text) if equals else True
        elif key is not None:
            value = _read_value(word, text)
            flags[key] = value if flags[key] is True else f"{flags[key]} {value}"
    return flags


def _read_value(word: str, text: str) -> Any:
    """Return a flag's value, with the variables that the script itself sets (`NAME=value`)."""
    for line in text.splitlines():
        name, equals, assigned = line.strip().removeprefix("export ").partition("=")
        if equals and name.isidentifier():
            assigned = assigned.strip("\"'")
            word = re.sub(rf"\${name}\b|\${{{name}}}", assigned.replace("\\", r"\\"), word)
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def find_mistakes(overrides: list[str]) -> list[Mistake]:
    """Return what is wrong with the config that these overrides make, once for each key."""
    composed = compose_config(overrides)
    resolved = resolve_config(composed)
    passed = check_pass_through(resolved)
    _, wrong = validate_config(resolved)
    together = [] if composed.unsure else check_combinations(resolved)
    found = [*composed.mistakes, *wrong, *passed, *together]
    return list({mistake.key: mistake for mistake in reversed(found)}.values())[::-1]


def _drop_refused(conversion: Conversion) -> list[Mistake]:
    """Take out what luthier refuses, with the reason; return what cannot be taken out."""
    left: list[Mistake] = []
    for _ in range(len(conversion.draft.settings)):
        left = find_mistakes(conversion.draft.overrides())
        refused = [m for m in left if _take_out(conversion, m)]
        if not refused:
            break
    return left


def _take_out(conversion: Conversion, mistake: Mistake) -> bool:
    """Take the setting that a mistake is about out of the recipe; return whether there was one."""
    settings = conversion.draft.settings
    if "is not installed" in mistake.text or mistake.key in ("trainer.rewards", "model.path"):
        return False
    keys = [k for k in settings if mistake.key == k or mistake.key.startswith((f"{k}.", f"{k}["))]
    if not keys:
        return False
    origin = conversion.origin(keys[0])
    del settings[keys[0]]
    reason = f"luthier refuses {keys[0]}: {' '.join(mistake.text.split())}"
    if origin is not None and origin in conversion.origins():
        conversion.differ(origin, f"{reason}.")
    elif origin is not None:
        conversion.drop(origin, reason)
        conversion.different.pop(origin, None)
    return True


_WHAT = {
    "sft": "Fine-tuning", "pretrain": "Continued pre-training", "dpo": "DPO",
    "kto": "KTO", "orpo": "ORPO", "cpo": "SimPO or CPO", "reward": "A reward model",
    "grpo": "GRPO", "rloo": "RLOO",
}  # fmt: skip


def _describe(conversion: Conversion) -> None:
    """Write the header of the recipe, and what is not in it below."""
    draft = conversion.draft
    method = draft.options["trainer"]
    assert method in METHODS
    packed = draft.options.get("quantization")
    trained = "all weights" if "lora" not in draft.options else "QLoRA" if packed else "LoRA"
    model = str(draft.value("model.path")).rpartition("/")[2]
    needs = ["the model and the data that it names"]
    if packed:
        needs.append("bitsandbytes")
    if draft.value("trainer.args.use_liger_kernel"):
        needs.append("liger-kernel")
    draft.header = [
        f"{_WHAT[method]} of {model}, {trained}: {conversion.file.name} of {conversion.project}.",
        f"Needs: {', '.join(needs)}.",
    ]
    lines = [f"{key}: {why}" for key, why in conversion.dropped.items()]
    lines += [f"{key} means something else: {how}" for key, how in conversion.different.items()]
    if lines:
        draft.footer = [f"Of {conversion.file.name}, not as it was there:"]
        draft.footer += [piece for line in lines for piece in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    first, *more = wrap(line, 94)
    return [f"- {first}", *(f"  {each}" for each in more)]


def default_name(file: Path) -> str:
    """Return the name of the recipe that a config becomes."""
    return recipe_name(file.name)
