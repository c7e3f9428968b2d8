"""Mappings that go to a library whole, with typed reading of the keys that luthier looks at itself.

`config.lora`, `config.quantization` and `config.trainer.args` hold whatever fields peft,
transformers and TRL have, under the libraries' own names, and reach them as they are. What luthier
decides by is read through the attributes below, so that each default stands once.
"""

from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")


class SettingKey(Generic[T]):
    """A key of the mapping as an attribute: its value, or `default` where it is absent or null."""

    def __init__(self, default: T) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, settings: dict[str, Any], owner: type) -> T:
        value: T | None = settings.get(self.name)
        return self.default if value is None else value


class LibrarySettings(dict[str, Any]):
    """A plain mapping of a library's settings; empty where the config does not use the library."""

    @property
    def is_enabled(self) -> bool:
        """Whether anything is set, which is how a config says that it uses the library."""
        return bool(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate and serialize as `dict[str, Any]`: pydantic makes a plain dict of a subclass."""
        return core_schema.no_info_after_validator_function(cls, handler(dict[str, Any]))


class LoraSettings(LibrarySettings):
    """The group `lora`: fields of an adapter's config in peft; empty for full fine-tuning."""

    plus_ratio = SettingKey[float | None](None)
    """How much faster LoRA's B matrices learn (LoRA+); None for the same rate."""
    init_lora_weights = SettingKey[bool | str](True)
    """How the adapter starts."""
    loftq_config = SettingKey[dict[str, Any]]({})
    use_dora = SettingKey[bool](False)
    target_modules = SettingKey[str | list[str]]([])
    """The layers that get an adapter: a pattern for whole names, or names; empty if not set."""
    bias = SettingKey[str]("none")
    """Which biases train: none, all or lora_only."""
    lora_dropout = SettingKey[float](0.0)
    modules_to_save = SettingKey[list[str]]([])
    """Layers that train whole beside the adapter."""
    experts = SettingKey[bool | int | None](None)
    """Whether LoRA goes on the experts of a mixture, or at which rank; see `trains_experts`."""
    vision = SettingKey[bool](False)
    """Whether the towers and projectors for images get an adapter, too."""
    target_parameters = SettingKey[list[str]]([])
    """Parameters that get an adapter by their own names, as experts do."""

    @property
    def method(self) -> str:
        """The adapter method, a key of `luthier.config.methods.ADAPTERS` in a valid config."""
        return str(self.get("method") or "lora")

    @property
    def trains_experts(self) -> bool:
        """Whether the experts of a model that has some get an adapter.

        Unless `experts` says so, they do where all linear layers do and no parameters are named.
        """
        if self.method != "lora" or self.experts is False:
            return False
        names_all = self.target_modules in ([], "all-linear") and not self.target_parameters
        return names_all or self.experts is not None

    @property
    def splits_base_weights(self) -> bool:
        """Whether the adapter starts as a part of the base's weights, which change for it."""
        return str(self.init_lora_weights).startswith(SPLITTING_STARTS)


SPLITTING_STARTS = ("pissa", "olora")
"""Beginnings of `init_lora_weights` that take the first adapter out of the base's weights."""

PACKING_SWITCHES = {"load_in_4bit": 4, "load_in_8bit": 8}
"""The settings that have bitsandbytes pack weights while they load, and their width in bits."""


class QuantizationSettings(LibrarySettings):
    """The group `quantization`: fields of `transformers.BitsAndBytesConfig`; empty for none."""

    dequantize = SettingKey[bool](False)
    """A model that comes quantized gets whole weights while it loads."""
    bnb_4bit_quant_storage = SettingKey[str]("uint8")
    """The format of the tensor that holds the packed weights."""

    @property
    def switches(self) -> list[str]:
        """The switches of PACKING_SWITCHES that are on; at most one in a valid config."""
        return [name for name in PACKING_SWITCHES if self.get(name) is True]

    @property
    def bits(self) -> int | None:
        """4 or 8 where bitsandbytes packs the weights; None where it does not."""
        return PACKING_SWITCHES[self.switches[0]] if len(self.switches) == 1 else None


class TrainerArgs(LibrarySettings):
    """`trainer.args`: fields of the trainer's config class in TRL or transformers.

    The defaults are those of TRL's classes where luthier reads a key that the config leaves out.
    """

    per_device_train_batch_size = SettingKey[int](8)
    gradient_accumulation_steps = SettingKey[int](1)
    train_sampling_strategy = SettingKey[str]("random")
    packing = SettingKey[bool](False)
    packing_strategy = SettingKey[str]("bfd")
    pad_to_multiple_of = SettingKey[int](1)
    optim = SettingKey[str]("adamw_torch_fused")
    """An `OptimizerNames` of transformers; the default is that with torch 2.8 or newer."""
    bf16 = SettingKey[bool | None](None)
    """None: the machine's number format decides."""
    fp16 = SettingKey[bool | None](None)
    activation_checkpointing = SettingKey[bool | str | None](None)
    """True, False, or `auto` for the memory plan's choice; None: the trainer's own default."""
    activation_checkpointing_kwargs = SettingKey[dict[str, Any]]({})
    activation_offloading = SettingKey[bool](False)
    torch_compile = SettingKey[bool](False)
    use_liger_kernel = SettingKey[bool](False)
    lr_scheduler_type = SettingKey[str]("linear")
    warmup_steps = SettingKey[float](0)
    """Steps, or below 1 a share of all steps."""
    eval_strategy = SettingKey[str]("no")
    eval_steps = SettingKey[float | None](None)
    """None: as often as `logging_steps`."""
    logging_steps = SettingKey[float](10)
    disable_tqdm = SettingKey[bool](False)
    save_strategy = SettingKey[str]("steps")
    save_steps = SettingKey[float](500)
    load_best_model_at_end = SettingKey[bool](False)
    metric_for_best_model = SettingKey[str | None](None)
    greater_is_better = SettingKey[bool | None](None)
    """None: the metric itself says which way is better."""
    disable_dropout = SettingKey[bool | None](None)
    """None: as the method does it."""
    beta = SettingKey[float | None](None)
    """The weight of the distance from the reference model; None: the method's own."""
    precompute_ref_log_probs = SettingKey[bool](False)
    router_aux_loss_coef = SettingKey[float](0.0)
    """The weight of a mixture's router loss; TRL's own default is that of the model's config."""
    teacher_model_revision = SettingKey[str | None](None)

    @property
    def evaluates(self) -> bool:
        """Whether held-out rows are evaluated while training; YAML reads a bare `no` as false."""
        return self.eval_strategy not in ("no", False)

    @property
    def eval_packing(self) -> bool:
        """Whether evaluation rows are packed: as the training rows, unless it is set."""
        chosen = self.get("eval_packing")
        return self.packing if chosen is None else bool(chosen)

    @property
    def packs_rows(self) -> bool:
        """Whether rows are packed, of training or of evaluation."""
        return self.packing or self.eval_packing

    @property
    def max_completion_length(self) -> int | None:
        """The longest completion of the online methods in tokens; None (null) for no bound."""
        longest: int | None = self.get("max_completion_length", 512)
        return longest
