"""What a word of the user names: a run, an adapter, a checkpoint, a model; known before it loads.

Nothing here imports torch or transformers, so that a wrong word is told within a second.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.config.library_settings import QuantizationSettings
from luthier.config.methods import METHODS
from luthier.config.renamed_settings import read_recorded_config
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.storage import cache
from luthier.storage.sizes import read_safetensors_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.chat import ChatEncoder


# The model that an adapter goes on: found where the adapter says, or where it is now.

_CONVERTED = re.compile(r"^(?P<name>.+)-(?P<hash>[0-9a-f]{16})-v\d+$")
"""The name of a folder that a GGUF file was converted into (`luthier.model.gguf`)."""
_PREFIX = "base_model.model."
_FLOATS = ("F16", "BF16", "F32", "F64")
"""Number formats whose weights have the layer's own shape; packed ones do not."""


@dataclass(frozen=True)
class AdapterBase:
    """Where an adapter's base is."""

    path: str
    """As in `model.path`."""
    revision: str | None = None


def find_adapter_base(
    word: str, adapter: Mapping[str, Any], config: RunConfig | None, given: str | None
) -> AdapterBase:
    """Return the base of the adapter that `word` names.

    `adapter` is its adapter_config.json, `config` its run's, `given` what the user says. Raises
    UserError where the base is not there, or is another than the one it was trained on.
    """
    named: str | None = adapter.get("base_model_name_or_path")
    if given is not None:
        source.check_model_path(ModelConfig(path=given), "--base")
        _refuse_other_file(word, named, given)
        return AdapterBase(given)
    if config is not None:
        _check(word, config.model.path)
        _refuse_other_file(word, named, config.model.path)
        return AdapterBase(config.model.path, config.model.revision)
    if not named:
        raise UserError(
            f"{word}: adapter_config.json does not say which model the adapter goes on.\n"
            "Name it: --base ORGANISATION/MODEL or --base /path/to/model."
        )
    found = _in_cache(named) or named
    _check(word, found)
    return AdapterBase(found, adapter.get("revision"))


def check_lora_shapes(
    word: str, folder: Path, adapter: Mapping[str, Any], base: AdapterBase
) -> None:
    """Raise UserError where a layer of the base has another shape than its LoRA matrices want.

    Reads the heads of the weight files and loads nothing; a base whose weights are not on this
    machine yet, or are packed, is looked at when it is loaded.
    """
    place = Path(base.path).expanduser()
    weights = folder / "adapter_model.safetensors"
    if not place.is_dir() or not weights.is_file():
        return
    layers = {
        name: entry["shape"]
        for file in sorted(place.glob("*.safetensors"))
        for name, entry in read_safetensors_header(file).tensors.items()
        if entry.get("dtype") in _FLOATS
    }
    for name, entry in read_safetensors_header(weights).tensors.items():
        layer, _, side = name.removeprefix(_PREFIX).partition(".lora_")
        shape = layers.get(f"{layer}.weight")
        if shape is None or len(shape) != 2 or side not in ("A.weight", "B.weight"):
            continue
        # The inputs of A and the outputs of B are the layer's; some keep their matrix transposed.
        if entry["shape"][1 if side == "A.weight" else 0] not in shape:
            raise UserError(
                wrong_base_message(word, adapter, base.path, f"{layer} is {shape} there")
            )


def wrong_base_message(word: str, adapter: Mapping[str, Any], given: str, why: str) -> str:
    """What to say where an adapter does not go on a model."""
    named = adapter.get("base_model_name_or_path")
    if named == given:
        return (
            f"{word}: its base {given} is no longer what it was trained on ({why}).\n"
            "If the right one is at another place, name it: --base /path/to/model."
        )
    return (
        f"{word}: this adapter is for another base than {given} ({why}): it was trained on "
        f"{named}.\nName that one, or where it is now: --base /path/to/model."
    )


def _check(word: str, path: str) -> None:
    """Raise UserError, naming the adapter, where its base is no longer at `path`."""
    try:
        source.check_model_path(ModelConfig(path=path), "its base")
    except UserError as error:
        moved = source.is_local(path) and not Path(path).expanduser().exists()
        why = "its base was moved or removed" if moved else "its base cannot be had"
        raise UserError(
            f"{word}: {why}: {path}\n{error}\nIf the base is at another place, name it: "
            "--base /path/to/model."
        ) from error


def _in_cache(named: str) -> str | None:
    """The folder that a GGUF file was converted into, where this machine has its own copy of it."""
    place = Path(named)
    if place.is_dir() or not _CONVERTED.match(place.parent.name):
        return None
    here = cache.cache_root() / "gguf" / place.parent.name / place.name
    return str(here) if here.is_dir() else None


def _refuse_other_file(word: str, named: str | None, path: str) -> None:
    """Raise UserError where the GGUF file behind `path` is not the one that was trained on."""
    before = _CONVERTED.match(Path(named or "").parent.name)
    file = source.find_gguf_file(path, "its base")
    if before is None or file is None:
        return
    now = _CONVERTED.match(gguf.converted_folder(file).parent.name)
    if now is not None and now["hash"] != before["hash"]:
        raise UserError(
            f"{word}: {path} is another file than the one that the adapter was trained on: "
            f"{before['name']} with the hash {before['hash']}, and here is {now['name']} with "
            f"{now['hash']}.\nInstall the version that it was trained on, or name its folder with "
            "--base."
        )


ADAPTER_CONFIG_FILE, MODEL_CONFIG_FILE, CHAT_SETTINGS_FILE = (
    "adapter_config.json",
    "config.json",
    "chat.json",
)
"""The files that tell what a folder holds."""

_FILES = ("*.json", "*.jinja", "tokenizer.model", "adapter_model.safetensors")
"""What is fetched of a hub repository to know what it is; a model's weights come later."""

_BELOW = ("*", "*/*", "*/*/*")
"""Where runs are looked for below a folder that is none."""

_HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


@dataclass(frozen=True)
class Artifact:
    """A model that can be loaded, with its adapter if it has one, and how it is talked to."""

    name: str
    """What the user typed."""
    base: ModelConfig
    """The weights: the whole model, or what the adapter goes on. Its `tokenizer` is the one that
    was saved with the adapter or model."""
    adapter: Path | None = None
    """The folder of the adapter; None for a whole model."""
    chat: dict[str, Any] | None = None
    """The settings of the chat encoder that made the training rows; None where none are known."""
    run: Path | None = None
    """The folder of the run that made it."""
    config: RunConfig | None = None
    """The run's config, as it was resolved."""
    task: str = "CAUSAL_LM"
    """What the model does, as peft calls it: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS."""
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    """How the run had the base's weights packed; empty for not at all."""

    @property
    def folder(self) -> Path | None:
        """Where the saved files are; None for a base model by name."""
        if self.adapter is not None:
            return self.adapter
        place = Path(self.base.path).expanduser()
        return place if place.is_dir() else None

    @property
    def is_reward(self) -> bool:
        """Whether it scores replies."""
        return self.config is not None and self.config.trainer.method == "reward"


def find_artifact(word: str, base: str | None = None) -> Artifact:
    """Return what `word` names.

    `word`: the folder of a run, its `model/`, a checkpoint, the folder of an adapter or of a whole
    model, a hub name, or `package:NAME`. `base`: the model that an adapter goes on, where it is no
    longer at the place that the adapter names. Raises UserError for anything else.
    """
    place = Path(word).expanduser()
    if place.is_dir():
        return _in_folder(word, place, base)
    if source.find_gguf_file(word, "model") is not None or source.is_local(word):
        _refuse_base(word, base)
        source.check_model_path(ModelConfig(path=word), "model")
        return Artifact(word, ModelConfig(path=word))
    return _on_hub(word, base)


def build_chat_encoder(artifact: Artifact, tokenizer: "PreTrainedTokenizerBase") -> "ChatEncoder":
    """Return the chat encoder that the training rows were made with.

    For a model that luthier did not train it is the tokenizer's own template. Raises UserError
    where there is no template.
    """
    from luthier.chat import ChatEncoder, ChatError
    from luthier.model.tokenizer import end_token_ids

    try:
        if artifact.chat is not None:
            return ChatEncoder.from_settings(tokenizer, artifact.chat)
        if tokenizer.chat_template is not None:
            return ChatEncoder(tokenizer, eos_token_ids=end_token_ids(artifact.base))
    except ChatError as error:
        raise UserError(f"{artifact.name}: {error}") from error
    raise UserError(
        f"{artifact.name}: there is no chat template, so it cannot be talked to: neither a "
        "chat.json of luthier nor a template in its tokenizer.\nPut the model's template beside "
        "the tokenizer, as chat_template.jinja."
    )


def _in_folder(word: str, place: Path, base: str | None) -> Artifact:
    if (place / "config.yaml").is_file() and not (place / MODEL_CONFIG_FILE).is_file():
        return _saved(word, _model_of(place), place, base)
    if (place / ADAPTER_CONFIG_FILE).is_file() or (place / MODEL_CONFIG_FILE).is_file():
        return _saved(word, place, _run_of(place), base)
    raise UserError(_nothing(word, place))


def _saved(word: str, folder: Path, run: Path | None, base: str | None) -> Artifact:
    """What a folder with an adapter or a whole model holds."""
    config = None if run is None else read_run_config(run)
    chat = _json(folder / CHAT_SETTINGS_FILE)
    if chat is None and run is not None:
        chat = (_json(run / "run.json") or {}).get("chat")
    told: dict[str, Any] = {"chat": chat, "run": run, "config": config}
    given = _plain(config)
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    adapter = _json(folder / ADAPTER_CONFIG_FILE)
    if adapter is None:
        _refuse_base(word, base)
        model = given | {"path": str(folder), "revision": None, "tokenizer": tokenizer}
        task = _task(_json(folder / MODEL_CONFIG_FILE) or {})
        return Artifact(word, ModelConfig(**model), task=task, **told)
    found = find_adapter_base(word, adapter, config, base)
    model = given | {"path": found.path, "revision": found.revision}
    model |= {"tokenizer": tokenizer or given["tokenizer"]}
    check_lora_shapes(word, folder, adapter, found)
    return Artifact(
        word,
        ModelConfig(**model),
        folder,
        task=adapter.get("task_type") or "CAUSAL_LM",
        quantization=QuantizationSettings() if config is None else config.quantization,
        **told,
    )


def _on_hub(word: str, base: str | None) -> Artifact:
    """What a hub repository holds; of a model only its small files are fetched."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                word, allow_patterns=list(_FILES), local_files_only=source.is_hub_unreachable()
            )
        )
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(source.hub_error_message(error, word, "model")) from error
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return _saved(word, folder, None, base)
    _refuse_base(word, base)
    task = _task(_json(folder / MODEL_CONFIG_FILE) or {})
    return Artifact(
        word, ModelConfig(path=word), chat=_json(folder / CHAT_SETTINGS_FILE), task=task
    )


def read_run_config(run: Path) -> RunConfig:
    """The config of a run; raises UserError where it cannot be read."""
    from pydantic import ValidationError

    file = run / "config.yaml"
    try:
        return RunConfig.model_validate(read_recorded_config(file))
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise UserError(
            f"{file}: not a config of this version of luthier; it stumbles over {wrong}.\n"
            "Name the model/ folder of the run, copied to another place, or use the version that "
            "made it (run.json has its number)."
        ) from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _plain(config: RunConfig | None) -> dict[str, Any]:
    """How the run put its model on the machine, less what concerns training."""
    if config is None:
        return ModelConfig(path="").model_dump()
    return config.model.model_dump() | {
        "add_tokens": [],
        "add_special_tokens": [],
        "train": [],
        "freeze": [],
    }


def _model_of(run: Path) -> Path:
    """The model/ folder of a run; UserError where it has none yet."""
    if (run / "model").is_dir():
        return run / "model"
    status = (_json(run / "run.json") or {}).get("status", "not started")
    checkpoints = sorted(
        (run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    if checkpoints:
        way = f"Name a checkpoint, such as {checkpoints[-1]}"
    else:
        way = "It has no checkpoints either; train it to its end first"
    raise UserError(f"{run}: this run has no model/ (its status: {status}). {way}.")


def _run_of(folder: Path) -> Path | None:
    """The run that a model/ or checkpoint folder belongs to."""
    folder = folder.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    is_inside = folder.name == "model" or folder.parent.name == "checkpoints"
    return run if is_inside and (run / "config.yaml").is_file() else None


def _nothing(word: str, place: Path) -> str:
    """What to say of a folder that holds no model: the runs below it, if there are any."""
    below = (path for depth in _BELOW for path in place.glob(f"{depth}/run.json"))
    runs = sorted(path.parent for path in below)
    has = "it has no config.yaml, adapter_config.json or config.json"
    if not runs:
        return f"{word}: this folder holds no run and no model: {has}."
    shown = "\n".join(f"  {run}" for run in runs[:10])
    return f"{word}: this folder is no run ({has}). Runs below it:\n{shown}"


def _refuse_base(word: str, base: str | None) -> None:
    if base is not None:
        raise UserError(f"{word} is a whole model and no adapter: leave out --base {base}.")


def _task(config: Mapping[str, Any]) -> str:
    """What a model does, by the architecture that its config.json names."""
    if config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    names = config.get("architectures") or [""]
    return next((task for end, task in _HEADS.items() if names[0].endswith(end)), "CAUSAL_LM")


def training_method_of(artifact: Artifact) -> str | None:
    """The method that trained it (`trainer.method`), where that is known."""
    if artifact.config is None:
        return None
    method = artifact.config.trainer.method
    return method if method in METHODS else None


def _json(file: Path) -> Any:
    """The value of a JSON file, None where there is none; UserError where it is damaged."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
