"""What may be told of a run in public: plain values that a card is written from."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from luthier.config.code_settings import read_code_entries
from luthier.config.schema import DatasetConfig, RunConfig, SourceConfig
from luthier.data.examples import BadRows, DatasetSources, is_on_this_machine, source_key
from luthier.data.sources.open import source_type
from luthier.errors import UserError
from luthier.export.model_layout import grown_shapes
from luthier.model import gguf, source
from luthier.model.artifact import Artifact
from luthier.model.load import read_model_config
from luthier.model.model_class import TASK_CLASSES, resolve_model_class
from luthier.model.model_files import (
    MODEL_CONFIG_FILE,
    read_adapter_config,
    read_config_file,
    read_labels,
)
from luthier.model.model_images import find_model_images
from luthier.model.processor import IMAGE_PROCESSOR_FILES
from luthier.python_code import split_python_path
from luthier.record.record import read_record
from luthier.redaction import HIDDEN, redact, redact_text
from luthier.storage.atomic import write_json
from luthier.storage.typed_files import load_json

# Names for the public. A card goes to the hub, so no path of this machine and no credentials may
# stand in it: a hub name is kept, a path is cut to its last part.

_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s,'\"\]\[{}()=]+")
"""A path from the root, from home, from here, or of Windows; not the middle of a hub name."""
_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?=[/\\]|$)")
"""The folder in which the hub's client keeps a repository."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"\]]+")


def hub_name(path: str) -> str | None:
    """Return the hub name that `model.path` is, or that a folder of the hub's cache stands for."""
    cached = _CACHED.search(path)
    if cached:
        return "/".join(cached.groups())
    return path if source.needs_hub(path) else None


def public_name(text: str) -> str:
    """A text with each path of this machine cut to its last part, and addresses to the bare ones.

    An address loses its user, password and query, which is where its keys are.
    """
    cleaned = text
    for address in _URL.findall(text):
        cleaned = cleaned.replace(address, _strip_address(address))
    return "".join(
        # An address has slashes too, and would be cut as if it were a path.
        piece if _URL.fullmatch(piece) else _PATH.sub(lambda match: last_name(match.group()), piece)
        for piece in re.split(f"({_URL.pattern})", cleaned)
    )


def last_name(path: str) -> str:
    """Return the last part of a path of any system."""
    # A run may have been trained on another system, so both kinds of separators count.
    name = PureWindowsPath(PurePosixPath(path).name).name
    return name or "a folder"


def public_values(value: Any) -> Any:
    """Return a copy of plain values in which every text is public."""
    if isinstance(value, dict):
        return {public_name(str(key)): public_values(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(element) for element in value]
    return public_name(value) if isinstance(value, str) else value


def _strip_address(address: str) -> str:
    url = urlsplit(address)
    if url.scheme == "file":
        return last_name(url.path)
    # Before the @ stand the user and the password.
    host = url.netloc.rpartition("@")[2]
    return f"{url.scheme}://{host}{url.path}"


# Licences of models and datasets. They come from the cards on the hub and are never guessed: a
# wrong licence is worse than none.


def stated_licence(name: str, repo_type: str = "model") -> str | None:
    """Return the licence that a hub repository's card states; None if none is stated or seen.

    `repo_type`: model or dataset. A card in the local cache needs no network; another one costs one
    request, and none where the hub is out of reach.
    """
    metadata = _read_cached_card(name, repo_type)
    if metadata is None:
        metadata = None if source.is_hub_unreachable() else _fetch_card(name, repo_type)
    licence = (metadata or {}).get("license")
    # The hub lets a card name one licence, several, or `other` with a name beside it.
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    if licence == "other":
        return str((metadata or {}).get("license_name") or "other")
    return str(licence) if licence else None


def _read_cached_card(name: str, repo_type: str) -> dict[str, Any] | None:
    from huggingface_hub import metadata_load, try_to_load_from_cache

    # It returns a path, None, or an object that says the file is known not to exist.
    file = try_to_load_from_cache(name, "README.md", repo_type=repo_type)
    return (metadata_load(Path(file)) or {}) if isinstance(file, str) else None


def _fetch_card(name: str, repo_type: str) -> dict[str, Any] | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        repository = HfApi().repo_info(name, repo_type=repo_type, timeout=source.HUB_TIMEOUT)
    # A licence is a line of the card: no failure to look it up may cost the card.
    except (HfHubHTTPError, OSError):
        return None
    return repository.card_data.to_dict() if repository.card_data else {}


# The facts themselves, and how they are collected from a run's files.

FILE = "card.json"
"""In a folder of saved weights: what its card was written from."""

_DESCRIBED = (
    *("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "target_modules"),
    *("target_parameters", "modules_to_save", "trainable_token_indices"),
)
"""Fields of an adapter's configuration that say what it is."""
_WRAPPER_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Classes of transformers that load models which read more than text."""
_SILENT = ("output_dir", "logging_dir", "report_to", "run_name", "logging_steps", "disable_tqdm")
"""Settings of a trainer that say nothing about the model."""


@dataclass(frozen=True)
class BaseModelFacts:
    """The model that was trained."""

    name: str
    """A hub name, a file's stem or the last part of a path: what others understand."""
    hub: str | None = None
    revision: str | None = None
    licence: str | None = None
    package: str | None = None
    """The Python package that carries it."""
    file: str | None = None
    """The name of its GGUF file."""


@dataclass(frozen=True)
class DataFacts:
    """A source of training rows."""

    name: str
    is_hub: bool = False
    part: str = ""
    """The configuration and split of a hub dataset."""
    licence: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a fine-tuned model and may be told."""

    title: str
    kind: str
    """`adapter` or `model`."""
    base: BaseModelFacts
    method: str | None = None
    task: str = "CAUSAL_LM"
    model_class: str | None = None
    """The class of transformers that loads it; None for the usual one of its task."""
    reads_images: bool = False
    """Whether its processor lies beside the weights, so that messages may have images."""
    loader: str | None = None
    """The function of the user's own that loads it (`model.loader`), such as `my.py:load`."""
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
    data: list[DataFacts] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    seconds: float | None = None
    system: str | None = None
    """The system prompt that the rows were trained with, where it is one."""
    prompt: str | None = None
    """A held-out prompt, as an example."""
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
        """Write the facts into the folder of the weights."""
        write_json(folder / FILE, redact(asdict(self)))


def read_facts(folder: Path) -> ModelFacts | None:
    """Return the facts that were saved beside weights; None where there are none."""
    stored: dict[str, Any] | None = load_json(
        folder / FILE, ModelFacts, "Remove it; the card is then made from the run."
    )
    if stored is None:
        return None
    try:
        plain = stored | {"base": BaseModelFacts(**stored["base"])}
        return ModelFacts(**plain | {"data": [DataFacts(**source) for source in stored["data"]]})
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / FILE}: not of this version of luthier ({error}). Remove it; the card is "
            "then made from the run."
        ) from error


def load_or_collect_facts(artifact: Artifact) -> ModelFacts:
    """Return the facts that lie beside the weights, or else those that the run's files tell."""
    # A merged or packed model has no run of its own: what lies beside it is all there is.
    saved = None if artifact.folder is None else read_facts(artifact.folder)
    return saved or collect_facts(artifact)


def collect_facts(artifact: Artifact) -> ModelFacts:
    """Collect the facts of an artifact (of `luthier.model.artifact`) from its run's files.

    Of a model without a run, no more than its base and adapter are known.
    """
    folder, config = artifact.folder, artifact.config
    facts = ModelFacts(
        title=_make_title(artifact),
        kind="model" if artifact.adapter is None else "adapter",
        base=base_of(
            _find_trained_path(artifact), None if config is None else config.model.revision
        ),
        task=artifact.task,
        model_class=_find_model_class(artifact),
        reads_images=_reads_images(artifact),
        loader=_name_loader(artifact),
        problem=_read_problem_type(folder),
        adapter={} if artifact.adapter is None else _describe_adapter(artifact.adapter),
        quantization=public_values(artifact.quantization),
        variables=(artifact.chat or {}).get("variables") or {},
        date=(artifact.chat or {}).get("date"),
        rows=grown_shapes(artifact),
        has_plot=folder is not None and (folder / "loss.png").is_file(),
    )
    if config is None or artifact.run is None:
        return facts
    return ModelFacts(**vars(facts) | _collect_run_facts(artifact.run, config))


def _reads_images(artifact: Artifact) -> bool:
    """Return whether a model is asked with images, too: it has an image processor's files."""
    folder = artifact.folder
    if artifact.task != "CAUSAL_LM" or folder is None:
        return False
    has_processor = any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)
    return has_processor and find_model_images(artifact.base) is not None


def base_of(path: str, revision: str | None = None) -> BaseModelFacts:
    """Return what a base model is called, and its licence where it is stated."""
    name = hub_name(path)
    if name is not None:
        # Only a hub name can be linked, and only there is a licence looked up.
        return BaseModelFacts(name, name, revision, stated_licence(name))
    if not path.startswith(source.PACKAGE_PREFIX) and not path.endswith(".gguf"):
        return BaseModelFacts(last_name(path))
    package = (
        path.removeprefix(source.PACKAGE_PREFIX) if path.startswith(source.PACKAGE_PREFIX) else None
    )
    file = source.find_gguf_file(path)
    if file is None or not file.is_file():
        return BaseModelFacts(
            last_name(path), package=package, file=None if package else last_name(path)
        )
    licence = gguf.read_metadata(file).get("general.license")
    return BaseModelFacts(file.stem, licence=licence, package=package, file=file.name)


def data_of(dataset: DatasetConfig, stated: Mapping[str, str]) -> list[DataFacts]:
    """Describe the sources of training rows; `stated` are licences by source name or path."""
    sources: dict[str, SourceConfig] = dataset.sources or {"": dataset}
    facts = []
    for name, source_config in sources.items():
        paths = (
            source_config.path
            if isinstance(source_config.path, list)
            else [source_config.path or ""]
        )
        for path in paths:
            # The user's statement is asked first: by source, by path, then the one for all sources.
            licence = stated.get(name) or stated.get(path) or stated.get("")
            facts.append(_describe_source(name, path, source_config, licence))
    return facts


def _describe_source(
    name: str, path: str, source_config: SourceConfig, licence: str | None
) -> DataFacts:
    if source_type(source_config.model_copy(update={"path": path})) != "hub":
        public_path = public_name(path) if "://" in path else last_name(path)
        return DataFacts(f"{name}: {public_path}" if name else public_path, licence=licence)
    subset = ", ".join(filter(None, (source_config.name, source_config.split)))
    return DataFacts(path, True, subset, licence or stated_licence(path, "dataset"))


def _collect_run_facts(run: Path, config: RunConfig) -> dict[str, Any]:
    record = read_record(run)
    return {
        "method": config.trainer.base_method,
        "recipe": config.recipe,
        "overrides": [public_name(override) for override in record.get("overrides", [])],
        "settings": _collect_settings(config),
        "data": data_of(config.dataset, config.card.data_licenses),
        "counts": public_values(record.get("data", {})),
        "results": record.get("results", {}),
        "versions": record.get("versions", {}),
        "hardware": _describe_hardware(record),
        "seconds": record.get("training_seconds"),
        "system": find_system_prompt(config.dataset),
        "prompt": find_example(record) if config.card.example else None,
        "licence": config.card.license,
        "language": list(config.card.language),
        "has_plot": (run / "loss.png").is_file(),
    }


def find_system_prompt(config: DatasetConfig) -> str | None:
    """Return the system prompt with which the rows trained; None where they have several, or none.

    It is `dataset.system`, or that of the first rows of all sources, where these are files of this
    machine without code of the user's own.
    """
    if config.system is not None:
        return config.system
    prompts: set[str | None] = set()
    sources = DatasetSources(config)
    try:
        for name in sources.train:
            key = source_key(name, sources.train)
            if sources.by_key[key].map is not None or not is_on_this_machine(sources.source(key)):
                return None
            opened = sources.open(key)
            rows = opened.source.peek(_PEEKED_ROWS)
            for row in opened.examples(BadRows(), rows, fetch=False):
                prompts.add(_leading_system(row.example))
    except (UserError, OSError):
        return None
    prompt = prompts.pop() if len(prompts) == 1 else None
    return None if prompt is None or len(prompt) > _LONGEST_SYSTEM else str(redact(prompt))


_PEEKED_ROWS = 50
_LONGEST_SYSTEM = 2000
"""Characters of a system prompt that a card shows."""


def _leading_system(example: Mapping[str, Any]) -> str | None:
    messages = example.get("messages") or [{}]
    content = messages[0].get("content") if messages[0].get("role") == "system" else None
    return content if isinstance(content, str) else None


def find_example(record: Mapping[str, Any]) -> str | None:
    """Return the prompt that a card shows as an example; None where it is not for the public."""
    prompt: str = record.get("example") or ""
    return prompt if prompt and public_name(redact_text(prompt)) == prompt else None


def _make_title(artifact: Artifact) -> str:
    if artifact.config is not None and artifact.run is not None:
        return artifact.config.recipe or artifact.run.name
    return last_name(artifact.name)


def _find_trained_path(artifact: Artifact) -> str:
    """Return the path of the model that the training began with."""
    # Of a full fine-tuning `base` is the trained model itself; the config says where it began.
    if artifact.adapter is None and artifact.config is not None:
        return artifact.config.model.path
    return artifact.base.path


def _find_model_class(artifact: Artifact) -> str | None:
    """Return the class by which plain transformers loads the model; None for its task's own.

    Of models that read images, too, the task's own class loads the text part alone, or none.
    """
    import transformers

    usual = TASK_CLASSES[artifact.task]
    if artifact.base.loader is not None:
        return None
    try:
        architecture = read_model_config(artifact.base)
    except UserError:  # a card is also written where the base is no longer at its place
        return None
    resolved = resolve_model_class(architecture, artifact.task, artifact.base.trust_remote_code)
    for name in (usual, *_WRAPPER_CLASSES):
        auto: Any = getattr(transformers, name)
        classes = auto._model_mapping.get(type(architecture), ())
        if resolved in (auto, *(classes if isinstance(classes, tuple) else (classes,))):
            return None if name == usual else name
    return str(resolved.__name__)


def _name_loader(artifact: Artifact) -> str | None:
    """Return the function of `model.loader` without the folder of its file, which is nobody's."""
    for entry in read_code_entries(artifact.base.loader):
        parsed = split_python_path(entry.path)
        if parsed.file is None:
            return f"{parsed.module}.{parsed.name}"
        return f"{parsed.file.name}:{parsed.name}"
    return None


def _read_problem_type(folder: Path | None) -> str | None:
    if folder is None:
        return None
    labels = read_labels(folder) or read_config_file(folder / MODEL_CONFIG_FILE) or {}
    problem: str | None = labels.get("problem_type")
    return problem


def _describe_adapter(folder: Path) -> dict[str, Any]:
    config = read_adapter_config(folder) or {}
    return {name: config[name] for name in _DESCRIBED if config.get(name)}


def _collect_settings(config: RunConfig) -> dict[str, Any]:
    """Return what was set, by its key in the config."""
    groups = {
        "lora": config.lora,
        "quantization": config.quantization,
        "trainer.args": config.trainer.args,
        "trainer.evaluation": _evaluation_settings(config),
        "chat": {"max_length": config.chat.max_length, "train_on": config.chat.train_on},
        "": {"seed": config.seed, "deterministic": config.deterministic or None},
    }
    flat = {
        f"{group}.{name}" if group else name: public_values(value)
        for group, values in groups.items()
        for name, value in values.items()
        if value is not None and name not in _SILENT and not name.startswith("hub_")
    }
    # A secret stands in a run's config as HIDDEN; that there was one is no business of the public.
    return {key: value for key, value in redact(flat).items() if HIDDEN not in str(value)}


def _evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """Return how replies were measured, where they were."""
    evaluation = config.trainer.evaluation
    return (
        {"rows": evaluation.rows, "max_new_tokens": evaluation.max_new_tokens}
        if evaluation.metrics
        else {}
    )


def _describe_hardware(record: Mapping[str, Any]) -> str:
    facts = record.get("hardware", {})
    gpus = [gpu["name"] for gpu in facts.get("gpus", [])]
    # Processes of one run are on GPUs of one kind, so the first one's name stands for all.
    where = f"{len(gpus)} x {gpus[0]}" if gpus else str(facts.get("cpu", ""))
    processes = record.get("launch", {}).get("processes", 1)
    return f"{where}, {processes} processes" if processes > 1 else where
