"""Settings that go to a library as they are: their names and simple types are checked here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.config import library_fields
from luthier.config.foreign_settings import explain_foreign_key
from luthier.config.library_fields import FieldType, FieldTypes
from luthier.config.library_settings import LoraSettings
from luthier.config.methods import ADAPTERS, METHODS, base_method
from luthier.config.number_ranges import number_complaint
from luthier.errors import Mistake, ask_nearest, format_value, suggest_options

_DESCRIBED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "none": "null",
}


@dataclass(frozen=True)
class PassThroughKey:
    """Whose settings a key holds, where their names are written, and which luthier keeps."""

    key: str
    name: str
    source: tuple[str, str, str] | None
    is_function: bool = False
    refused_settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that luthier decides -> what to do instead."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts that a setting allows where the source does not say so."""
    luthier_settings: Mapping[str, FieldType] = field(default_factory=dict)
    """Settings of luthier's beside the library's."""
    second_source: tuple[str, str, str] | None = None
    """A further class whose settings are allowed."""

    def fields(self) -> FieldTypes | None:
        """Return the settings that may be named here; None if they cannot be known."""
        read = (
            library_fields.read_parameters if self.is_function else library_fields.read_class_fields
        )
        fields = read(*self.source) if self.source else None
        if fields is None:
            return None
        further: FieldTypes = (read(*self.second_source) or {}) if self.second_source else {}
        fields = {**fields, **further, **self.luthier_settings}
        for key, texts in self.choices.items():
            # A setting that takes one text may take several in a list.
            each = fields.get(key, FieldType(frozenset()))
            fields = fields | {key: replace(each, types=each.types & {"list"}, choices=texts)}
        return {
            key: field_type
            for key, field_type in fields.items()
            if key not in self.refused_settings
        }


_ROWS = "luthier lays out the rows itself"
_LOGIN = "a secret would end up in the run's record; log in with `hf auth login`"
_PUSH = "a finished run is uploaded by `luthier push RUN`, which shows what it sends; remove it"
_HUB_SETTINGS = (
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push",
    "hub_revision",
)  # fmt: skip
_SPLIT = (
    "luthier's batches and loss are for processes with rows of their own, so layers and experts "
    "are not split; a model too big for one GPU: luthier launch --config fsdp2 recipe=NAME"
)
_LAUNCH = "it belongs to the launch: luthier launch --config {} recipe=NAME"
_IGNORED = "the trainer does not read it; remove it"
_DTYPES = ("float32", "bfloat16", "float16")
_LOSS = "it adds a loss of its own, which luthier's losses leave out; remove it"
_LORA = ("peft", "tuners/lora/config.py", "LoraConfig")


def _setting(types: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> FieldType:
    """Return a setting of luthier's own; `types` has a space between two."""
    return FieldType(frozenset(types.split()), choices, default, text, "luthier")


_CHECKPOINTING = _setting(
    "bool none",
    None,
    "Gradient checkpointing: the backward pass computes activations again, which saves memory and "
    "takes a third more time. `auto` does this only if they would not fit.",
    ("auto",),
)
_LORA_SETTINGS = {
    "method": _setting("str none", "lora", "The adapter method: a folder of peft/tuners."),
    "plus_ratio": _setting(
        "float none", None, "LoRA+: the learning rate of the matrices B, divided by that of A."
    ),
    "experts": _setting(
        "bool int none",
        None,
        "Whether LoRA also trains the experts of a mixture, or its rank there; null: only if it "
        "trains all linear layers.",
    ),
    "vision": _setting(
        "bool", False, "Whether the vision tower and the projector get an adapter as well."
    ),
}
_DEQUANTIZE = _setting(
    "bool", False, "Unpack the weights of a model that comes quantized, while it loads."
)

PASS_THROUGH_KEYS = (
    PassThroughKey(
        key="trainer.args",
        name=METHODS["sft"].config_name,
        source=METHODS["sft"].config,
        luthier_settings={"activation_checkpointing": _CHECKPOINTING},
        refused_settings={
            "output_dir": "use output_dir",
            "max_length": "use chat.max_length",
            "truncation_mode": "use chat.on_long",
            "assistant_only_loss": "use chat.train_on",
            "completion_only_loss": "use chat.train_on",
            "chat_template_path": "use chat.template",
            "eos_token": "the chat template decides it; see chat.template",
            "pad_token": "luthier pads itself; remove it",
            "padding_free": f"{_ROWS}; remove it",
            "dataset_kwargs": f"{_ROWS}; use the keys of dataset",
            "dataset_text_field": f"{_ROWS}; use dataset.columns",
            "dataset_num_proc": f"{_ROWS}; remove it",
            "shuffle_dataset": "the order of training is drawn with seed; remove it",
            "remove_unused_columns": f"{_ROWS}; remove it",
            "label_names": f"{_ROWS}; remove it",
            "length_column_name": f"{_ROWS}; remove it",
            "predict_with_generate": "use trainer.evaluation.metrics",
            "generation_max_length": "use trainer.evaluation.max_new_tokens",
            "generation_num_beams": "held-out rows are answered greedily; remove it",
            "generation_config": "held-out rows are answered greedily; remove it",
            "sortish_sampler": "use trainer.args.train_sampling_strategy=group_by_length",
            "model_init_kwargs": "use model.kwargs",
            "trust_remote_code": "use model.trust_remote_code",
            "gradient_checkpointing": "its name is now activation_checkpointing",
            "gradient_checkpointing_kwargs": "its name is now activation_checkpointing_kwargs",
            "use_cpu": "use model.device=cpu",
            "seed": "use seed",
            "data_seed": "use seed",
            "full_determinism": "use deterministic",
            "report_to": "use tracker=wandb, tensorboard, mlflow or trackio",
            "project": "use tracker.trackio.project or tracker.wandb.project",
            "trackio_space_id": "use tracker.trackio.space_id",
            "restore_callback_states_from_checkpoint": "they always are; remove it",
            "enable_jit_checkpoint": "a signal always makes a checkpoint; remove it",
            "run_name": "use tracker.wandb.name",
            "hub_token": _LOGIN,
            **dict.fromkeys(_HUB_SETTINGS, _PUSH),
            "deepspeed": _LAUNCH.format("zero2"),
            "fsdp": _LAUNCH.format("fsdp2"),
            "fsdp_config": _LAUNCH.format("fsdp2"),
            "parallelism_config": _LAUNCH.format("fsdp2"),
            "local_rank": "the launcher sets it",
            "do_train": _IGNORED,
            "do_eval": _IGNORED,
            "do_predict": _IGNORED,
            "resume_from_checkpoint": "the same command resumes by itself; remove it",
        },
    ),
    PassThroughKey(
        key="lora",
        name="peft.LoraConfig",
        source=_LORA,
        luthier_settings=_LORA_SETTINGS,
        refused_settings={
            "task_type": "the trainer decides it; remove it",
            "peft_type": "use lora.method",
            "peft_version": "peft writes it; remove it",
            "auto_mapping": "peft writes it; remove it",
            "base_model_name_or_path": "use model.path",
            "revision": "use model.revision",
            "inference_mode": "a training run decides it; remove it",
            "arrow_config": "it routes between trained adapters; remove it",
            "alora_invocation_tokens": "packed rows have no place for it; remove it",
            "kasa_config": _LOSS,
            "monteclora_config": _LOSS,
        },
    ),
    PassThroughKey(
        key="quantization",
        name="transformers.BitsAndBytesConfig",
        source=("transformers", "utils/quantization_config.py", "BitsAndBytesConfig"),
        is_function=True,
        luthier_settings={"dequantize": _DEQUANTIZE},
        choices={
            "bnb_4bit_quant_type": ("nf4", "fp4"),
            "bnb_4bit_compute_dtype": _DTYPES,
            "bnb_4bit_quant_storage": (*_DTYPES, "float64", "int8", "uint8"),
        },
    ),
    PassThroughKey(
        key="model.kwargs",
        name="from_pretrained",
        source=None,
        refused_settings={
            "dtype": "use model.dtype",
            "torch_dtype": "use model.dtype",
            "device_map": "use model.device",
            **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _SPLIT),
            "attn_implementation": "use model.attention",
            "quantization_config": "use quantization",
            "load_in_4bit": "use quantization=nf4",
            "load_in_8bit": "use quantization=int8",
            "revision": "use model.revision",
            "trust_remote_code": "use model.trust_remote_code",
            "token": _LOGIN,
            "use_auth_token": _LOGIN,
        },
    ),
    PassThroughKey(
        key="tracker.wandb",
        name="wandb.init",
        source=("wandb", "sdk/wandb_init.py", "init"),
        is_function=True,
        refused_settings={
            "config": "luthier passes the whole configuration; remove it",
            "dir": "the run's folder is used; remove it",
        },
    ),
)


def check_pass_through(resolved: dict[str, Any]) -> list[Mistake]:
    """Check every pass-through mapping of a resolved config, and mend texts that are numbers.

    A number that YAML read as text (`'1e-4'`) becomes a number in place; so does `no` where it
    is an option and YAML read false.
    """
    libraries = libraries_of(resolved)
    return [m for library in libraries for m in _check(library, mapping_at(resolved, library.key))]


def libraries_of(resolved: dict[str, Any]) -> list[PassThroughKey]:
    """Return whose settings each key takes: those of a trainer and an adapter follow the method."""
    adapter = LoraSettings(mapping_at(resolved, "lora")).method
    method = base_method(str(mapping_at(resolved, "trainer").get("method", "sft")))
    chosen = {"lora": (of_adapter, adapter), "trainer.args": (of_trainer, method)}
    return [
        chosen[each.key][0](each, chosen[each.key][1]) if each.key in chosen else each
        for each in PASS_THROUGH_KEYS
    ]


def of_trainer(library: PassThroughKey, name: str) -> PassThroughKey:
    """Return `trainer.args` as a training method takes it; an unknown one has those of `sft`."""
    method = METHODS.get(name, METHODS["sft"])
    return replace(
        library,
        name=method.config_name,
        source=method.config,
        refused_settings={**library.refused_settings, **method.refused_settings},
        choices=method.choices,
    )


def of_adapter(library: PassThroughKey, method: str) -> PassThroughKey:
    """Return `lora` as an adapter method takes it; an unknown one has no settings.

    peft keeps each method's config in a file of its own.
    """
    if method not in ADAPTERS:
        return replace(library, source=None)
    name = ADAPTERS[method].config
    of = replace(library, name=f"peft.{name}", source=("peft", f"tuners/{method}/config.py", name))
    if method != "adalora":
        return of
    decided = {
        **library.refused_settings,
        "total_step": "the training's own steps are taken; remove it",
    }
    return replace(
        of, second_source=_LORA, refused_settings=decided
    )  # it takes LoRA's settings, too


def mapping_at(resolved: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping at a dotted key; an empty one if there is none."""
    node: Any = resolved
    for component in key.split("."):
        node = node.get(component) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _check(library: PassThroughKey, settings: dict[str, Any]) -> Iterator[Mistake]:
    fields = library.fields() if set(settings) - set(library.refused_settings) else None
    for name in list(settings):
        key = f"{library.key}.{name}"
        if name in library.refused_settings:
            yield Mistake(key, f"is not set here: {library.refused_settings[name]}.")
        elif fields is not None and name not in fields:
            yield Mistake(key, _unknown(library, name, fields, settings[name]))
        elif fields is not None and settings[name] != "???":
            settings[name], complaint = fit_value(settings[name], fields[name])
            if not complaint:
                trainer_name = name if library.key == "trainer.args" else ""
                complaint = number_complaint(trainer_name, settings[name])
            if complaint:
                yield Mistake(key, complaint)


def _unknown(library: PassThroughKey, name: str, field_types: FieldTypes, value: object) -> str:
    if answer := explain_foreign_key(name, value):
        return f"is not a setting of {library.name}. {answer}"
    hint = ask_nearest(str(name), field_types, f"{library.key}.") or "Look its name up there."
    return f"is not a setting of {library.name}. {hint}"


def fit_value(value: Any, field_type: FieldType) -> tuple[Any, str | None]:
    """Return the value as the setting takes it, and a complaint if it does not."""
    if "any" in field_type.types:
        return value, None
    if value is False and "no" in field_type.choices and "bool" not in field_type.types:
        return "no", None  # YAML reads a bare `no` as false
    if isinstance(value, str):
        return _fit_text(value, field_type)
    if isinstance(value, float) and value.is_integer() and _only_int(field_type):
        return int(value), None
    name = "none" if value is None else type(value).__name__
    fits = name in field_type.types or (name == "int" and "float" in field_type.types)
    return value, None if fits else f"{format_value(value)} is not {_describe(field_type)}."


def _only_int(field_type: FieldType) -> bool:
    return "int" in field_type.types and "float" not in field_type.types


def _fit_text(text: str, field_type: FieldType) -> tuple[Any, str | None]:
    if text in field_type.choices or ("str" in field_type.types and not field_type.choices):
        return text, None
    if field_type.types & {"int", "float"}:
        try:
            return fit_value(float(text), field_type)
        except ValueError:
            pass
    if field_type.choices:
        return (
            text,
            f"{format_value(text)} is not an option. {suggest_options(text, field_type.choices)}",
        )
    return text, f"{format_value(text)} is not {_describe(field_type)}."


def _describe(field_type: FieldType) -> str:
    names = [name for name in _DESCRIBED if name in field_type.types]
    if "float" in names and "int" in names:
        names.remove("int")
    texts = [f"one of {', '.join(field_type.choices)}"] if field_type.choices else []
    return " or ".join([_DESCRIBED[name] for name in names] + texts)
