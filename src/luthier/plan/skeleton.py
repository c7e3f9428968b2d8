"""A model as shapes alone: its layers, quantized and with adapters, without a byte of weights."""

from typing import TYPE_CHECKING, Any

from luthier.config.methods import METHODS
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import gguf, quantized, source
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.trainable import freeze

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""The class of transformers that picks the model's, by what it does."""
_KEEP_THE_SAME = ("flash", "flex")
_BY_WEIGHTS = ("trainable_token_indices", "token_indices", "loftq_config")


def build(config: RunConfig, machine: Machine, full_dtype: str = "float32") -> Any:
    """Return the run's model on torch's meta device, as training would get it.

    A model that trains whole is in `full_dtype`, others in the machine's format with adapters in
    float32; layers are bitsandbytes' own where the run quantizes. Raises UserError where the
    model's config.json cannot be had, or cannot be built from.
    """
    _refuse_unknown(config)
    dtype = machine.dtype if config.lora else full_dtype
    architecture = read_config(config.model)
    packed = _packed(config, architecture)
    task = METHODS[config.trainer.method].task
    model = _empty(config.model, architecture, CLASSES[task], dtype, _attention(machine))
    if packed:
        _pack(model, packed, machine)
    if config.lora:
        return add_adapter(model, _drawn(config.lora), config.seed, task)
    if config.model.train or config.model.freeze:
        freeze(model, config.model.train, config.model.freeze)
    return model


def read_config(model: ModelConfig) -> "PretrainedConfig":
    """Return the model's configuration, from this machine where it is there.

    Raises UserError if it is not and cannot be fetched.
    """
    from transformers import AutoConfig

    file = source.gguf_file(model.path)
    try:
        found, _ = AutoConfig.from_pretrained(
            model.path if file is None else gguf.convert(file),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=source.needs_hub(model.path) and source.is_out_of_reach(),
            return_unused_kwargs=True,
            **model.kwargs,
        )
    except (OSError, ValueError) as error:
        problem = source.explain(error, model.path, "model.path")
        raise problem or UserError(
            f"model.path={model.path}: its config.json cannot be read: {error}"
        ) from error
    return found


def count_teacher(config: RunConfig, machine: Machine) -> int:
    """Return the bytes of the model that a run learns from; 0 if there is none."""
    if config.trainer.teacher is None:
        return 0
    own = {"path": config.trainer.teacher, "revision": None, "tokenizer": None}
    teacher = config.model.model_copy(update=own)
    kind = CLASSES["CAUSAL_LM"]
    model = _empty(teacher, read_config(teacher), kind, machine.dtype, _attention(machine))
    return sum(p.numel() * p.itemsize for p in model.parameters())


def named_layers(model: Any) -> dict[str, "torch.nn.Module"]:
    """The transformer layers by name: what sharding gathers, one at a time."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = set(base._no_split_modules or ())
    return {name: part for name, part in model.named_modules() if type(part).__name__ in kinds}


def _empty(model: ModelConfig, architecture: Any, kind: str, dtype: str, attention: str) -> Any:
    """The model on the meta device; UserError where transformers cannot make it."""
    import torch
    import transformers

    if architecture.get_text_config().pad_token_id is None:
        architecture.get_text_config().pad_token_id = 0
    try:
        with torch.device("meta"):
            made: Any = getattr(transformers, kind).from_config(
                architecture,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.path={model.path}: the plan cannot build this model from its config.json: "
            f"{error}"
        ) from error
    made.config.use_cache = False
    return made


def _packed(config: RunConfig, architecture: Any) -> dict[str, Any]:
    """How bitsandbytes packs the weights: as the run says, or as the model comes.

    Takes the mark of a model that comes quantized off its configuration.
    """
    comes = quantized.read(config.model)
    if comes is None:
        return config.quantization
    del architecture.quantization_config
    if config.quantization.get("dequantize"):
        return {}
    if quantized.method_in(comes) != "bitsandbytes":
        raise UserError(
            f"model.path={config.model.path}: the model comes quantized "
            f"({quantized.method_in(comes)}), and the plan counts only what bitsandbytes "
            "packs. Plan for the model that it was made from, with quantization=nf4 or int8."
        )
    return comes


def _refuse_unknown(config: RunConfig) -> None:
    if config.quantization and config.lora.get("use_dora"):
        raise UserError(
            "plan: lora.use_dora=true on quantized weights is not counted: peft needs the weights "
            "themselves for it. Plan with lora.use_dora=false; DoRA needs more than that."
        )


def _attention(machine: Machine) -> str:
    """Flash attention need not be installed here: torch's own keeps the same tensors."""
    kernels = any(name in machine.attention for name in _KEEP_THE_SAME)
    return "sdpa" if kernels else machine.attention


def _pack(model: Any, given: dict[str, Any], machine: Machine) -> None:
    """Put bitsandbytes' layers where loading would put them."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = {"bnb_4bit_compute_dtype": machine.dtype} | given
    # Columns that int8 keeps in 16 bits depend on values, and are few.
    settings["llm_int8_threshold"] = 0.0
    made = BitsAndBytesConfig.from_dict(settings)
    quantizer: Any = AutoHfQuantizer.from_config(made, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)


def _drawn(lora: dict[str, Any]) -> dict[str, Any]:
    """The same adapter with weights that are drawn: shapes have no values to start from.

    Single tokens that train are left out: a few rows.
    """
    kept = {name: value for name, value in lora.items() if name not in _BY_WEIGHTS}
    if isinstance(lora.get("init_lora_weights"), str):
        kept["init_lora_weights"] = True
    return kept
