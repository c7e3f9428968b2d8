"""Settings that go to a library as they are: their names and simple types are checked here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.config import fields
from luthier.config.fields import Fields, Kind
from luthier.config.words import Mistake, choice, nearest, value

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
class Library:
    """Whose settings a key holds, where their names are written, and which luthier keeps."""

    key: str
    name: str
    source: tuple[str, str, str] | None
    is_function: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)
    """Settings that luthier decides -> what to do instead."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts that a setting allows where the source does not say so."""

    def fields(self) -> Fields | None:
        """Return the settings that may be named here; None if they cannot be known."""
        read = fields.of_function if self.is_function else fields.of_class
        known = read(*self.source) if self.source else None
        if known is None:
            return None
        known = known | {key: Kind(frozenset(), texts) for key, texts in self.choices.items()}
        return {key: kind for key, kind in known.items() if key not in self.kept}


_ROWS = "luthier lays out the rows itself"
_LOGIN = "a secret would end up in the run's record; log in with `hf auth login`"
_IGNORED = "the trainer does not read it; remove it"
_DTYPES = ("float32", "bfloat16", "float16")

LIBRARIES = (
    Library(
        key="trainer.args",
        name="trl.SFTConfig",
        source=("trl", "trainer/sft_config.py", "SFTConfig"),
        kept={
            "output_dir": "use output_dir",
            "max_length": "use chat.max_length",
            "truncation_mode": "use chat.on_long",
            "assistant_only_loss": "use chat.train_on",
            "completion_only_loss": "use chat.train_on",
            "chat_template_path": "use chat.template",
            "eos_token": "the chat template decides it; see chat.template",
            "pad_token": "luthier pads itself; remove it",
            "packing": f"{_ROWS}, without packing; remove it",
            "packing_strategy": f"{_ROWS}, without packing; remove it",
            "eval_packing": f"{_ROWS}, without packing; remove it",
            "padding_free": f"{_ROWS}; remove it",
            "dataset_kwargs": f"{_ROWS}; use the keys of dataset",
            "dataset_text_field": f"{_ROWS}; use dataset.columns",
            "dataset_num_proc": f"{_ROWS}; remove it",
            "shuffle_dataset": "the order of training is drawn with seed; remove it",
            "remove_unused_columns": f"{_ROWS}; remove it",
            "label_names": f"{_ROWS}; remove it",
            "length_column_name": f"{_ROWS}; remove it",
            "model_init_kwargs": "use model.kwargs",
            "trust_remote_code": "use model.trust_remote_code",
            "gradient_checkpointing": "its name is now activation_checkpointing",
            "gradient_checkpointing_kwargs": "its name is now activation_checkpointing_kwargs",
            "use_cpu": "use model.device=cpu",
            "seed": "use seed",
            "data_seed": "use seed",
            "full_determinism": "use deterministic",
            "report_to": "use tracker=wandb or tracker=tensorboard",
            "run_name": "use tracker.wandb.name",
            "hub_token": _LOGIN,
            "local_rank": "`accelerate launch` sets it",
            "do_train": _IGNORED,
            "do_eval": _IGNORED,
            "do_predict": _IGNORED,
            "resume_from_checkpoint": _IGNORED,
        },
    ),
    Library(
        key="lora",
        name="peft.LoraConfig",
        source=("peft", "tuners/lora/config.py", "LoraConfig"),
        kept={
            "task_type": "it is always CAUSAL_LM; remove it",
            "peft_type": "it is always LORA; remove it",
            "peft_version": "peft writes it; remove it",
            "auto_mapping": "peft writes it; remove it",
            "base_model_name_or_path": "use model.path",
            "revision": "use model.revision",
            "inference_mode": "a training run decides it; remove it",
        },
    ),
    Library(
        key="quantization",
        name="transformers.BitsAndBytesConfig",
        source=("transformers", "utils/quantization_config.py", "BitsAndBytesConfig"),
        is_function=True,
        choices={
            "bnb_4bit_quant_type": ("nf4", "fp4"),
            "bnb_4bit_compute_dtype": _DTYPES,
            "bnb_4bit_quant_storage": (*_DTYPES, "float64", "int8", "uint8"),
        },
    ),
    Library(
        key="model.kwargs",
        name="from_pretrained",
        source=None,
        kept={
            "dtype": "use model.dtype",
            "torch_dtype": "use model.dtype",
            "device_map": "use model.device",
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
    Library(
        key="tracker.wandb",
        name="wandb.init",
        source=("wandb", "sdk/wandb_init.py", "init"),
        is_function=True,
        kept={
            "config": "luthier passes the whole configuration; remove it",
            "dir": "the run's folder is used; remove it",
        },
    ),
)


def check(resolved: dict[str, Any]) -> list[Mistake]:
    """Check every pass-through mapping of a resolved config, and mend texts that are numbers.

    A number that YAML read as text (`'1e-4'`) becomes a number in place; so does `no` where it
    is an option and YAML read false.
    """
    return [m for library in LIBRARIES for m in _check(library, settings(resolved, library.key))]


def settings(resolved: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping at a dotted key; an empty one if there is none."""
    node: Any = resolved
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _check(library: Library, given: dict[str, Any]) -> Iterator[Mistake]:
    known = library.fields() if set(given) - set(library.kept) else None
    for name in list(given):
        key = f"{library.key}.{name}"
        if name in library.kept:
            yield Mistake(key, f"is not set here: {library.kept[name]}.")
        elif known is not None and name not in known:
            yield Mistake(key, _unknown(library, name, known))
        elif known is not None and given[name] != "???":
            given[name], complaint = fit(given[name], known[name])
            if complaint:
                yield Mistake(key, complaint)


def _unknown(library: Library, name: str, known: Fields) -> str:
    close = nearest(str(name), known)
    hint = f"Did you mean {library.key}.{close}?" if close else "Look its name up there."
    return f"is not a setting of {library.name}. {hint}"


def fit(given: Any, kind: Kind) -> tuple[Any, str | None]:
    """Return the value as the setting takes it, and a complaint if it does not."""
    if "any" in kind.types:
        return given, None
    if given is False and "no" in kind.choices and "bool" not in kind.types:
        return "no", None  # YAML reads a bare `no` as false
    if isinstance(given, str):
        return _fit_text(given, kind)
    if isinstance(given, float) and given.is_integer() and _only_int(kind):
        return int(given), None
    name = "none" if given is None else type(given).__name__
    fits = name in kind.types or (name == "int" and "float" in kind.types)
    return given, None if fits else f"{value(given)} is not {_describe(kind)}."


def _only_int(kind: Kind) -> bool:
    return "int" in kind.types and "float" not in kind.types


def _fit_text(given: str, kind: Kind) -> tuple[Any, str | None]:
    if given in kind.choices or ("str" in kind.types and not kind.choices):
        return given, None
    if kind.types & {"int", "float"}:
        try:
            return fit(float(given), kind)
        except ValueError:
            pass
    if kind.choices:
        return given, f"{value(given)} is not an option. {choice(given, kind.choices)}"
    return given, f"{value(given)} is not {_describe(kind)}."


def _describe(kind: Kind) -> str:
    names = [name for name in _DESCRIBED if name in kind.types]
    if "float" in names and "int" in names:
        names.remove("int")
    texts = [f"one of {', '.join(kind.choices)}"] if kind.choices else []
    return " or ".join([_DESCRIBED[name] for name in names] + texts)
