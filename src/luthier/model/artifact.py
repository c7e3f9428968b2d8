"""A run, adapter, checkpoint or model by the name that a user types, described before it loads.

Nothing here imports torch or transformers, so that a wrong name is told within a second.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from luthier.config.env_references import fill_references
from luthier.config.library_settings import QuantizationSettings
from luthier.config.methods import METHODS
from luthier.config.renamed_settings import read_recorded_config
from luthier.config.schema import ModelConfig, RunConfig, SavedChatSettings
from luthier.config.trust import NO_TRUST, Trust, check_recorded
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.model.model_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CHAT_SETTINGS_FILE,
    LOADER_FILE,
    MODEL_CONFIG_FILE,
    check_model_folder,
    list_indexed_files,
    read_adapter_config,
    read_chat_settings,
    read_config_file,
    read_loader,
    sharding_of,
)
from luthier.model.processor import find_processor_changes
from luthier.storage import cache
from luthier.storage.manifest import DamagedFolderError, read_manifest, verify_sizes
from luthier.storage.sizes import read_safetensors_header
from luthier.storage.typed_files import has_entry, load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.chat import ChatEncoder, ImageExpander

_HUB_FILES = ("*.json", "*.jinja", "tokenizer.model", "adapter_model.safetensors")
"""The files of a hub repository that tell what it is; the weights of a whole model come later."""
_RUN_PATTERNS = ("*/run.json", "*/*/run.json", "*/*/*/run.json")
"""Where runs are looked for below a folder that is none."""
_ARCHITECTURE_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""The ending of the architecture in a config.json -> the task in peft's words."""
_CONVERTED = re.compile(r"^(?P<name>.+)-(?P<hash>[0-9a-f]{16})-v\d+$")
"""The name of a folder that a GGUF file was converted into (`luthier.model.gguf`)."""
_PREFIX = "base_model.model."
_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
"""Number formats of safetensors in which a weight has its layer's shape."""


class _RunRecord(BaseModel):
    """The entries of a run's record that describe its model."""

    model_config = ConfigDict(extra="allow")

    status: str = ""
    chat: SavedChatSettings | None = None


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter goes on."""

    path: str
    """Its path or name, as in `model.path`."""
    revision: str | None = None


@dataclass(frozen=True)
class Artifact:
    """A model that can be loaded, with its adapter if it has one, and its chat settings."""

    name: str
    """The name that the user typed."""
    base: ModelConfig
    """The weights: the whole model, or the base of the adapter. Its `tokenizer` is the one that
    was saved with the adapter or model."""
    adapter: Path | None = None
    """The folder of the adapter; None for a whole model."""
    chat: dict[str, Any] | None = None
    """The settings of the chat encoder that made the training rows; None where they are unknown."""
    run: Path | None = None
    """The folder of the run that trained it; None where there is no such folder."""
    config: RunConfig | None = None
    """The resolved config of that run."""
    task: str = "CAUSAL_LM"
    """The task in peft's words: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS."""
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    """The quantization of the base during training; empty for none."""

    @property
    def folder(self) -> Path | None:
        """The folder with the saved files; None for a base model by name."""
        if self.adapter is not None:
            return self.adapter
        folder = Path(self.base.path).expanduser()
        return folder if folder.is_dir() else None

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model, which scores replies."""
        return self.config is not None and self.config.trainer.method == "reward"


def find_artifact(name: str, base: str | None = None, trust: Trust = NO_TRUST) -> Artifact:
    """Return the artifact that `name` stands for.

    `name`: the folder of a run or its name below `runs`, its `model/`, a checkpoint, the folder of
    an adapter or of a whole model, a hub name, or `package:NAME`. `base`: the model that an adapter
    goes on; None for the one that the adapter names. `trust`: what may run of the code that the
    config of its run names; where that is not enough it is a UserError. Raises UserError for
    anything else.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and has_entry(source.RUNS / name / "run.json"):
        return find_artifact(str(source.RUNS / name), base, trust)
    if folder.is_dir():
        # A folder with a config.json is a model, whatever else lies in it.
        is_model = has_entry(folder / MODEL_CONFIG_FILE)
        if has_entry(folder / "config.yaml") and not is_model:
            return _describe_folder(name, _model_folder(folder), folder, base, trust)
        if is_model or has_entry(folder / ADAPTER_CONFIG_FILE):
            return _describe_folder(name, folder, _run_of(folder), base, trust)
        raise UserError(_no_model_message(name, folder))
    if source.find_gguf_file(name, "model") is not None or source.is_local(name):
        _refuse_base(name, base)
        source.check_model_path(ModelConfig(path=name), "model")
        return Artifact(name, ModelConfig(path=name))
    return _describe_hub_repository(name, base, trust)


def build_chat_encoder(artifact: Artifact, tokenizer: "PreTrainedTokenizerBase") -> "ChatEncoder":
    """Return the chat encoder that the training rows were made with.

    For a model that luthier did not train it is the tokenizer's own template. Raises UserError
    where there is no template.
    """
    from luthier.chat import ChatEncoder, ChatError
    from luthier.model.tokenizer import end_token_ids

    try:
        if artifact.chat is not None:
            # find_artifact has refused secrets that nobody has allowed.
            settings = fill_references(artifact.chat, with_secrets=True)
            return ChatEncoder.from_settings(tokenizer, settings, _find_images(artifact))
        if tokenizer.chat_template is not None:
            ends = end_token_ids(artifact.base)
            return ChatEncoder(tokenizer, eos_token_ids=ends, images=_find_images(artifact))
    except ChatError as error:
        raise UserError(f"{artifact.name}: {error}") from error
    raise UserError(
        f"{artifact.name}: there is no chat template, so it cannot be talked to: neither a "
        "chat.json of luthier nor a template in its tokenizer.\nPut the model's template beside "
        "the tokenizer, as chat_template.jinja."
    )


def _find_images(artifact: Artifact) -> "ImageExpander | None":
    """Return what a model makes of images; None where it, or the method of its run, takes none.

    So prompts are those of the training: a processor may put a BOS token in front of texts, too.
    """
    from luthier.model.model_images import find_model_images

    method = training_method_of(artifact)
    takes_images = method is None or METHODS[method].takes_images
    return find_model_images(artifact.base) if takes_images else None


def training_method_of(artifact: Artifact) -> str | None:
    """Return the method that trained it (`trainer.method`); None where that is unknown."""
    method = None if artifact.config is None else artifact.config.trainer.base_method
    return method if method in METHODS else None


def read_run_config(run: Path, trust: Trust = NO_TRUST) -> RunConfig:
    """Return the config of a run's folder; raises UserError where it cannot be read.

    What it takes from the environment comes from this one. `trust` is what may run of the code
    that it names; UserError where it names more.
    """
    from pydantic import ValidationError

    file = run / "config.yaml"
    try:
        recorded = read_recorded_config(file)
        # Before anything reads it: a run's folder may come from anybody.
        check_recorded(recorded, str(file), trust, ("model",))
        filled = fill_references(recorded, with_secrets=trust.everything)
        return RunConfig.model_validate(filled)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, mistake["loc"])) for mistake in error.errors())
        raise UserError(
            f"{file}: not a config of this version of luthier; it stumbles over {keys}.\n"
            "Name the model/ folder of the run, copied to another place, or use the version that "
            "made it (run.json has its number)."
        ) from error


def find_adapter_base(
    name: str, adapter: Mapping[str, Any], config: RunConfig | None, base: str | None
) -> AdapterBase:
    """Return the base of the adapter that `name` stands for.

    `adapter` is its adapter_config.json, `config` its run's, and `base` the one that the user
    names; both may be None. Raises UserError where the base is not there, or is another than the
    one that the adapter was trained on.
    """
    recorded: str | None = adapter.get("base_model_name_or_path")
    if base is not None:
        source.check_model_path(ModelConfig(path=base), "--base")
        _refuse_other_gguf(name, recorded, base)
        return AdapterBase(base)
    if config is not None:
        _check_base_path(name, config.model.path)
        _refuse_other_gguf(name, recorded, config.model.path)
        return AdapterBase(config.model.path, config.model.revision)
    if not recorded:
        raise UserError(
            f"{name}: adapter_config.json does not say which model the adapter goes on.\n"
            "Name it: --base ORGANISATION/MODEL or --base /path/to/model."
        )
    # A GGUF file is converted into the cache, and this machine may have its own copy there.
    path, folder = recorded, Path(recorded)
    if not folder.is_dir() and _CONVERTED.match(folder.parent.name):
        copy = cache.cache_root() / "gguf" / folder.parent.name / folder.name
        path = str(copy) if copy.is_dir() else recorded
    _check_base_path(name, path)
    return AdapterBase(path, adapter.get("revision"))


def check_lora_shapes(
    name: str, folder: Path, adapter: Mapping[str, Any], base: AdapterBase
) -> None:
    """Raise UserError where LoRA matrices do not fit the shape of their layer in the base.

    Reads the heads of the weight files and loads nothing; a base whose weights are not on this
    machine yet, or are quantized, is looked at when it is loaded.
    """
    base_folder = Path(base.path).expanduser()
    weights = folder / ADAPTER_WEIGHTS_FILE
    if has_entry(weights) and not weights.is_file():
        raise UserError(f"{name}: {weights}: it is not a file. Copy or fetch the file again.")
    if not base_folder.is_dir() or not weights.is_file():
        return
    shapes = {
        weight: header["shape"]
        for file in sorted(base_folder.glob("*.safetensors"))
        for weight, header in read_safetensors_header(file).tensors.items()
        if header.get("dtype") in _FLOAT_DTYPES
    }
    for weight, header in read_safetensors_header(weights).tensors.items():
        layer, _, matrix = weight.removeprefix(_PREFIX).partition(".lora_")
        shape = shapes.get(f"{layer}.weight")
        if shape is None or len(shape) != 2 or matrix not in ("A.weight", "B.weight"):
            continue
        # The inputs of A and the outputs of B are the layer's; some keep their matrix transposed.
        if header["shape"][1 if matrix == "A.weight" else 0] not in shape:
            reason = f"{layer} is {shape} there"
            raise UserError(wrong_base_message(name, adapter, base.path, reason))


def wrong_base_message(name: str, adapter: Mapping[str, Any], base: str, reason: str) -> str:
    """Return the error's text for an adapter that does not go on `base`, for this reason."""
    recorded = adapter.get("base_model_name_or_path")
    if recorded == base:
        return (
            f"{name}: its base {base} is no longer what it was trained on ({reason}).\n"
            "If the right one is at another place, name it: --base /path/to/model."
        )
    return (
        f"{name}: this adapter is for another base than {base} ({reason}): it was trained on "
        f"{recorded}.\nName that one, or where it is now: --base /path/to/model."
    )


def _describe_folder(
    name: str, folder: Path, run: Path | None, base: str | None, trust: Trust
) -> Artifact:
    """Return the artifact of a folder with an adapter or a whole model; `run` is None outside one.

    `base` is the model that the user names for an adapter, or None.
    """
    _refuse_damaged_weights(folder)
    # A saved folder has the chat settings beside it; a checkpoint has them in its run alone.
    config = None if run is None else read_run_config(run, trust)
    chat = read_chat_settings(folder)
    if chat is None and run is not None:
        chat = read_run_chat(run)
    check_recorded({"chat": chat}, str(folder / CHAT_SETTINGS_FILE), trust, ("chat",))
    loader = read_loader(folder)
    check_recorded({"model": {"loader": loader}}, str(folder / LOADER_FILE), trust)
    # The model as the run had it on the machine, but for the settings that concern training.
    settings = (ModelConfig(path="") if config is None else config.model).model_dump()
    settings["loader"] = loader if config is None else config.model.loader
    settings |= {"add_tokens": [], "add_special_tokens": [], "train": [], "freeze": []}
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    adapter = read_adapter_config(folder)
    if adapter is None:
        _refuse_base(name, base)
        _refuse_shards(folder)
        check_model_folder(folder)
        settings |= {"path": str(folder), "revision": None, "tokenizer": tokenizer}
        task = _read_task(folder)
        return Artifact(name, ModelConfig(**settings), None, chat, run, config, task)
    # peft writes auto_mapping itself, and reads it for AutoPeftModel alone.
    named = {key: value for key, value in adapter.items() if key != "auto_mapping"}
    check_recorded(named, str(folder / ADAPTER_CONFIG_FILE), trust)
    adapter_base = find_adapter_base(name, adapter, config, base)
    settings |= {"path": adapter_base.path, "revision": adapter_base.revision}
    settings["tokenizer"] = tokenizer or settings["tokenizer"]
    if config is None:
        began = ModelConfig(path=adapter_base.path, revision=adapter_base.revision)
        settings["processor"] = find_processor_changes(began, folder)
    check_lora_shapes(name, folder, adapter, adapter_base)
    task = adapter.get("task_type") or "CAUSAL_LM"
    quantization = QuantizationSettings() if config is None else config.quantization
    return Artifact(name, ModelConfig(**settings), folder, chat, run, config, task, quantization)


def _describe_hub_repository(name: str, base: str | None, trust: Trust) -> Artifact:
    """Return the artifact of a hub repository, of which only the small files are fetched."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name, allow_patterns=list(_HUB_FILES), local_files_only=source.is_hub_unreachable()
            )
        )
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(source.hub_error_message(error, name, "model")) from error
    # The weights of an adapter are among the fetched files, those of a model are not.
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return _describe_folder(name, folder, None, base, trust)
    _refuse_base(name, base)
    chat = read_chat_settings(folder)
    check_recorded({"chat": chat}, f"{name} ({CHAT_SETTINGS_FILE})", trust, ("chat",))
    loader = read_loader(folder)
    check_recorded({"model": {"loader": loader}}, f"{name} ({LOADER_FILE})", trust)
    whole = ModelConfig(path=name, loader=loader)
    return Artifact(name, whole, chat=chat, task=_read_task(folder))


def _model_folder(run: Path) -> Path:
    """Return the model/ folder of a run; raises UserError where it has none yet."""
    if (run / "model").is_dir():
        return run / "model"
    status = _read_run_record(run).get("status", "not started")
    checkpoints = {
        int(match[1]): path
        for path in (run / "checkpoints").glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if checkpoints:
        advice = f"Name a checkpoint, such as {checkpoints[max(checkpoints)]}"
    else:
        advice = "It has no checkpoints either; train it to its end first"
    raise UserError(f"{run}: this run has no model/ (its status: {status}). {advice}.")


def _run_of(folder: Path) -> Path | None:
    """Return the run that a model/ or checkpoint folder belongs to; None for other folders."""
    folder = folder.resolve()
    is_checkpoint = folder.parent.name == "checkpoints"
    run = folder.parent.parent if is_checkpoint else folder.parent
    is_inside = is_checkpoint or folder.name == "model"
    return run if is_inside and (run / "config.yaml").is_file() else None


def _no_model_message(name: str, folder: Path) -> str:
    """Return the error's text for a folder without a model: it lists the runs below it."""
    runs = sorted(path.parent for pattern in _RUN_PATTERNS for path in folder.glob(pattern))
    missing = "it has no config.yaml, adapter_config.json or config.json"
    if not runs:
        return f"{name}: this folder holds no run and no model: {missing}."
    lines = "\n".join(f"  {run}" for run in runs[:10])
    return f"{name}: this folder is no run ({missing}). Runs below it:\n{lines}"


def _refuse_damaged_weights(folder: Path) -> None:
    """Raise UserError where weights that luthier listed are missing, or have another size."""
    # A manifest that cannot be read may be another program's.
    with suppress(DamagedFolderError):
        read_manifest(folder)
        try:
            verify_sizes(folder, "*.safetensors")
        except DamagedFolderError as damage:
            raise UserError(
                f"{folder} is damaged: {damage}.\nPut the file back, name a checkpoint of the run, "
                "or train it again with overwrite=true."
            ) from damage


def _read_task(folder: Path) -> str:
    """Return the task of a whole model by the architecture in its config.json."""
    config = read_config_file(folder / MODEL_CONFIG_FILE) or {}
    if config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    architecture = (config.get("architectures") or [""])[0]
    tasks = _ARCHITECTURE_TASKS.items()
    return next((task for ending, task in tasks if architecture.endswith(ending)), "CAUSAL_LM")


def _refuse_shards(folder: Path) -> None:
    """Raise UserError where a checkpoint has the weights of a whole model in shards alone."""
    if sharding_of(folder) is None or (folder / "model.safetensors").is_file():
        return
    if list_indexed_files(folder) is None:
        raise UserError(
            f"{folder}: its weights are in shards, as the processes of the run held them.\n"
            f"Put them together first: luthier merge {folder}"
        )


def read_run_chat(run: Path) -> dict[str, Any] | None:
    """Return the chat settings in the record of a run; None where there are none."""
    chat: dict[str, Any] | None = _read_run_record(run).get("chat")
    return chat


def _read_run_record(run: Path) -> dict[str, Any]:
    """Return what `run.json` says of a run's status and chat; `luthier.record` reads all of it."""
    return load_json(run / "run.json", _RunRecord) or {}


def _refuse_base(name: str, base: str | None) -> None:
    """Raise UserError where a base is named for a model that needs none."""
    if base is not None:
        raise UserError(f"{name} is a whole model and no adapter: leave out --base {base}.")


def _check_base_path(name: str, path: str) -> None:
    """Raise UserError, naming the adapter, where its base is no longer at `path`."""
    try:
        source.check_model_path(ModelConfig(path=path), "its base")
    except UserError as error:
        is_moved = source.is_local(path) and not Path(path).expanduser().exists()
        reason = "its base was moved or removed" if is_moved else "its base cannot be had"
        raise UserError(
            f"{name}: {reason}: {path}\n{error}\nIf the base is at another place, name it: "
            "--base /path/to/model."
        ) from error


def _refuse_other_gguf(name: str, recorded: str | None, path: str) -> None:
    """Raise UserError where the GGUF file behind `path` is not the one that was trained on.

    `recorded` is the folder that the adapter names: the one that its GGUF file was converted into.
    """
    before = _CONVERTED.match(Path(recorded or "").parent.name)
    file = source.find_gguf_file(path, "its base")
    if before is None or file is None:
        return
    now = _CONVERTED.match(gguf.converted_folder(file).parent.name)
    if now is not None and now["hash"] != before["hash"]:
        raise UserError(
            f"{name}: {path} is another file than the one that the adapter was trained on: "
            f"{before['name']} with the hash {before['hash']}, and here is {now['name']} with "
            f"{now['hash']}.\nInstall the version that it was trained on, or name its folder with "
            "--base."
        )
