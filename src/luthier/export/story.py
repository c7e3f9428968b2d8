"""What may be told of a run in public: plain values that a card is written from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.config.schema import DatasetConfig, RunConfig, SourceConfig
from luthier.data.sources.open import kind_of
from luthier.errors import UserError
from luthier.export import licences
from luthier.export.names import hub_name, last, public, public_values
from luthier.export.rows import grown
from luthier.model import gguf, source
from luthier.model.artifact import Artefact
from luthier.model.load import LABELS
from luthier.record.secrets import HIDDEN
from luthier.storage.atomic import read_json, write_json

FILE = "card.json"
"""In a folder of saved weights: what its card was written from."""

_DESCRIBED = (
    *("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "target_modules"),
    *("modules_to_save", "trainable_token_indices"),
)
"""Fields of an adapter's configuration that say what it is."""
_SILENT = ("output_dir", "logging_dir", "report_to", "run_name", "logging_steps", "disable_tqdm")
"""Settings of a trainer that say nothing about the model."""


@dataclass(frozen=True)
class BaseModel:
    """The model that was trained."""

    name: str
    """In words that others understand."""
    hub: str | None = None
    revision: str | None = None
    licence: str | None = None
    package: str | None = None
    """The Python package that carries it."""
    file: str | None = None
    """The name of its GGUF file."""


@dataclass(frozen=True)
class Data:
    """A source of training rows."""

    name: str
    is_hub: bool = False
    part: str = ""
    """The configuration and split of a hub dataset."""
    licence: str | None = None


@dataclass(frozen=True)
class Story:
    """What is known of a fine-tuned model and may be told."""

    title: str
    kind: str
    """`adapter` or `model`."""
    base: BaseModel
    method: str | None = None
    task: str = "CAUSAL_LM"
    problem: str | None = None
    """What a classifier's labels are, as transformers calls it (`problem_type`)."""
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of the adapter's configuration that describe it; also of one that was merged."""
    quantization: dict[str, Any] = field(default_factory=dict)
    """How the base's weights were packed in training."""
    packed: dict[str, Any] = field(default_factory=dict)
    """How the weights of this folder are packed; empty for not at all."""
    settings: dict[str, Any] = field(default_factory=dict)
    data: list[Data] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    seconds: float | None = None
    system: str | None = None
    """The system prompt that rows without one trained with."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    date: str | None = None
    """The date that the template was given."""
    rows: int | None = None
    """Rows of the embeddings, where they are more than the base's."""
    merged: dict[str, Any] = field(default_factory=dict)
    """How an adapter was merged: dtype, onto, difference."""
    licence: str | None = None
    language: list[str] = field(default_factory=list)
    has_plot: bool = False

    def save(self, folder: Path) -> None:
        """Write it beside the weights."""
        write_json(folder / FILE, asdict(self))


def read(folder: Path) -> Story | None:
    """The story that was saved beside weights; None where there is none."""
    found = read_json(folder / FILE)
    if found is None:
        return None
    try:
        plain = found | {"base": BaseModel(**found["base"])}
        return Story(**plain | {"data": [Data(**one) for one in found["data"]]})
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / FILE}: not of this version of luthier ({error}). Remove it; the card is "
            "then made from the run."
        ) from error


def told(artefact: Artefact) -> Story:
    """The story that lies beside the weights, or the one that the run's files tell."""
    saved = None if artefact.folder is None else read(artefact.folder)
    return saved or of(artefact)


def of(artefact: Artefact) -> Story:
    """The story of what `luthier.model.artifact.find` found, from the run's files.

    Of a model without a run, no more than its base and adapter are known.
    """
    folder, config = artefact.folder, artefact.config
    story = Story(
        title=_title(artefact),
        kind="model" if artefact.adapter is None else "adapter",
        base=base_of(_trained(artefact), None if config is None else config.model.revision),
        task=artefact.task,
        problem=_problem(folder),
        adapter={} if artefact.adapter is None else _adapter(artefact.adapter),
        quantization=public_values(artefact.quantization),
        variables=(artefact.chat or {}).get("variables") or {},
        date=(artefact.chat or {}).get("date"),
        rows=grown(artefact),
        has_plot=folder is not None and (folder / "loss.png").is_file(),
    )
    if config is None or artefact.run is None:
        return story
    return Story(**vars(story) | _told_by_the_run(artefact.run, config))


def base_of(path: str, revision: str | None = None) -> BaseModel:
    """What a base model is called, and its licence where it is stated."""
    name = hub_name(path)
    if name is not None:
        return BaseModel(name, name, revision, licences.stated(name))
    if not path.startswith(source.PACKAGE) and not path.endswith(".gguf"):
        return BaseModel(last(path))
    package = path.removeprefix(source.PACKAGE) if path.startswith(source.PACKAGE) else None
    file = source.gguf_file(path)
    if file is None or not file.is_file():
        return BaseModel(last(path), package=package, file=None if package else last(path))
    licence = gguf.read_metadata(file).get("general.license")
    return BaseModel(file.stem, licence=licence, package=package, file=file.name)


def data_of(dataset: DatasetConfig, stated: Mapping[str, str]) -> list[Data]:
    """The sources of the training rows; `stated` are licences by the source's name or path."""
    parts: dict[str, SourceConfig] = dataset.sources or {"": dataset}
    found = []
    for name, part in parts.items():
        paths = part.path if isinstance(part.path, list) else [part.path or ""]
        for path in paths:
            given = stated.get(name) or stated.get(path) or stated.get("")
            found.append(_source(name, path, part, given))
    return found


def _source(name: str, path: str, part: SourceConfig, given: str | None) -> Data:
    if kind_of(part.model_copy(update={"path": path})) != "hub":
        shown = public(path) if "://" in path else last(path)
        return Data(f"{name}: {shown}" if name else shown, licence=given)
    words = ", ".join(filter(None, (part.name, part.split)))
    return Data(path, True, words, given or licences.stated(path, "dataset"))


def _told_by_the_run(run: Path, config: RunConfig) -> dict[str, Any]:
    record = read_json(run / "run.json") or {}
    return {
        "method": config.trainer.method,
        "recipe": config.recipe,
        "overrides": [public(one) for one in record.get("overrides", [])],
        "settings": _settings(config),
        "data": data_of(config.dataset, config.card.data_licenses),
        "counts": public_values(record.get("data", {})),
        "results": record.get("results", {}),
        "versions": record.get("versions", {}),
        "hardware": _hardware(record),
        "seconds": record.get("training_seconds"),
        "system": config.dataset.system,
        "licence": config.card.license,
        "language": list(config.card.language),
        "has_plot": (run / "loss.png").is_file(),
    }


def _title(artefact: Artefact) -> str:
    if artefact.config is not None and artefact.run is not None:
        return artefact.config.recipe or artefact.run.name
    return last(artefact.word)


def _trained(artefact: Artefact) -> str:
    """The path of the model that the training began with."""
    if artefact.adapter is None and artefact.config is not None:
        return artefact.config.model.path
    return artefact.base.path


def _problem(folder: Path | None) -> str | None:
    files = [] if folder is None else [folder / LABELS, folder / "config.json"]
    found: dict[str, Any] = next(
        (read for file in files if (read := read_json(file)) is not None), {}
    )
    problem: str | None = found.get("problem_type")
    return problem


def _adapter(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in _DESCRIBED if config.get(name)}


def _settings(config: RunConfig) -> dict[str, Any]:
    """What was set, by its key in the config."""
    groups = {
        "lora": config.lora,
        "quantization": config.quantization,
        "trainer.args": config.trainer.args,
        "trainer.evaluation": _evaluation(config),
        "chat": {"max_length": config.chat.max_length, "train_on": config.chat.train_on},
        "": {"seed": config.seed, "deterministic": config.deterministic or None},
    }
    flat = {
        f"{group}.{name}" if group else name: public_values(value)
        for group, values in groups.items()
        for name, value in values.items()
        if value is not None and name not in _SILENT and not name.startswith("hub_")
    }
    return {key: value for key, value in flat.items() if value != HIDDEN}


def _evaluation(config: RunConfig) -> dict[str, Any]:
    """How replies were measured, where they were."""
    given = config.trainer.evaluation
    return {"rows": given.rows, "max_new_tokens": given.max_new_tokens} if given.metrics else {}


def _hardware(record: Mapping[str, Any]) -> str:
    facts = record.get("hardware", {})
    gpus = [gpu["name"] for gpu in facts.get("gpus", [])]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else str(facts.get("cpu", ""))
    processes = record.get("launch", {}).get("processes", 1)
    return f"{where}, {processes} processes" if processes > 1 else where
