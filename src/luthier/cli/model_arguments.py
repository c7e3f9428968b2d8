"""Commands that load a model take its name first, then settings by the names of the config."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from luthier.cli.arguments import BASE, ParsedArguments
from luthier.config.renamed_settings import new_key
from luthier.config.schema import DatasetConfig, ModelConfig
from luthier.config.trust import Trust, trust_of
from luthier.errors import UserError, format_override, nearest_option
from luthier.infer import generation_config

if TYPE_CHECKING:
    from luthier.infer.llm import LLM

_MODEL = ("device", "dtype", "attention", "device_map", "trust_remote_code")


@dataclass
class ModelArguments:
    """The words behind a command, sorted by what they set."""

    places: list[str]
    """What stands in front: a model, perhaps a file."""
    model: dict[str, Any] = field(default_factory=dict)
    """`model.device` and the other settings of `_MODEL`."""
    quantization: str = "trained"
    dataset: dict[str, Any] = field(default_factory=dict)
    """The settings `dataset.*`, as the config's group has them."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Fields of `GenerationConfig`."""

    def llm(self) -> dict[str, Any]:
        """Return the arguments of `LLM` besides the model's name."""
        return {**self.model, "quantization": self.quantization}

    def trust(self, switches: Iterable[str], replaced: Iterable[str] = ()) -> Trust:
        """Return what may run of the code that the model's run names: what was typed, or all.

        `replaced` are further keys of the run's config in whose place something was typed.
        """
        keys = [*(f"model.{name}" for name in self.model), *replaced]
        return trust_of(switches, [(key, None) for key in keys])


def parse_model_arguments(
    command: str, arguments: list[str], names: tuple[str, ...]
) -> ModelArguments:
    """Sort the words of a command, of which `names` come first, without a key.

    Raises UserError for one that is missing, one too many, and a setting that does not exist.
    """
    if len(arguments) < len(names):
        missing = " and ".join(names[len(arguments) :])
        raise UserError(f"luthier {command}: {missing} is missing. {usage_line(command, names)}")
    parsed = ModelArguments(arguments[: len(names)])
    generation = []
    for word in arguments[len(names) :]:
        key, equals, text = word.partition("=")
        group, _, name = key.partition(".")
        if not equals:
            raise UserError(f"luthier {command}: what is {word!r}? {usage_line(command, names)}")
        # `quantization` has a single value here: a preset's name, and no fields of its own.
        if group == "quantization" and not name:
            parsed.quantization = text
        elif group == "model" and name:
            parsed.model[_check_name(key, name, _MODEL)] = _value(word, text)
        elif group == "dataset" and name:
            # `dataset.columns.prompt=x` sets a key of a nested mapping, as in a config.
            nested = parsed.dataset
            *parents, last = name.split(".")
            for parent in parents:
                nested = nested.setdefault(parent, {})
                if not isinstance(nested, dict):
                    raise UserError(f"{key}: dataset.{parent} is set as a whole, too. Remove one.")
            nested[last] = _value(word, text)
        else:
            generation.append(word)
    # Whatever has no group is a field of GenerationConfig, which is checked by name there.
    parsed.generation = generation_config.parse_generation_settings(generation)
    _check_model(parsed.model)
    return parsed


def open_llm(typed: ModelArguments, parsed: ParsedArguments) -> "LLM":
    """Return the model that a command names first; its weights are not loaded yet."""
    from luthier.infer.llm import LLM

    return LLM(
        typed.places[0],
        base=parsed.texts.get(BASE.name),
        trust=typed.trust(parsed.switches),
        **typed.llm(),
    )


def usage_line(command: str, names: tuple[str, ...]) -> str:
    """Return the line that says how a command is typed."""
    return f"Write: luthier {command} {' '.join(names)} [key=value ...]"


def make_dataset_config(settings: Mapping[str, Any]) -> DatasetConfig:
    """Return a dataset with these settings; UserError for a setting that does not exist."""
    from pydantic import ValidationError

    try:
        return DatasetConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["dataset", *map(str, first["loc"])])
        keys = [f"dataset.{name}" for name in DatasetConfig.model_fields]
        near = nearest_option(key, keys) if first["type"] == "extra_forbidden" else None
        hint = f" Did you mean {near}?" if near else ""
        # A setting that was renamed is named exactly; that is better than the nearest spelling.
        if new := new_key(key):
            hint = f" It is called {new} now."
        raise UserError(f"{key}: {first['msg'].lower()}.{hint}") from error


def _value(word: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # Hydra's grammar is needed for this alone.
        from luthier.config.override_errors import quote_path

        key = word.partition("=")[0]
        if quote_path(word) != word:  # a path means itself
            return text
        raise UserError(
            f"{key}: {text!r} cannot be read. For a text write {format_override(key, text)}."
        ) from error
    # YAML takes what begins with # for a comment.
    return text if value is None and text.startswith("#") else value


def _check_name(key: str, name: str, names: tuple[str, ...]) -> str:
    if name in names:
        return name
    near = nearest_option(name, names)
    guess = f"Did you mean model.{near}? " if near else ""
    raise UserError(f"{key}: {guess}There are {', '.join(f'model.{option}' for option in names)}.")


def _check_model(settings: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    # device_map is an argument of from_pretrained and no field of the config's model group.
    model_settings = {name: value for name, value in settings.items() if name != "device_map"}
    try:
        ModelConfig(path="", **model_settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"model.{first['loc'][0]}: {first['msg'].lower()}.") from error
