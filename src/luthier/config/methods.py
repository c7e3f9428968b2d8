"""The training methods by name, as far as a config needs to know them: nothing is imported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.config.library_settings import SPLITTING_STARTS, LoraSettings
from luthier.errors import Mistake, UserError, format_value, suggest_options
from luthier.python_code import is_python_path, read_class_constant


@dataclass(frozen=True)
class MethodFacts:
    """What `trainer.method` stands for."""

    config: tuple[str, str, str]
    """The class whose fields `trainer.args` takes: its package, file and name."""
    method_class: str
    """The `luthier.train.methods` class that does it, as `module:class`."""
    row_types: tuple[str, ...]
    """The kinds of rows it trains on."""
    task: str = "CAUSAL_LM"
    """What its model does, as peft calls it."""
    writes_replies: bool = True
    """Whether its model writes replies, so that held-out rows can be answered."""
    uses_rewards: bool = False
    """Whether it trains on `trainer.rewards`."""
    uses_teacher: bool = False
    """Whether its model learns from `trainer.teacher`."""
    can_stream: bool = False
    """Whether it can train on rows that are read as they come (`dataset.streaming`)."""
    takes_images: bool = False
    """Whether its rows may have images."""

    trained_values: str = ""
    """What its rows train, where that is not tokens of the rows themselves."""

    @property
    def trains_on_chats(self) -> bool:
        """Whether its rows are conversations, or prompts with replies."""
        return not {"classification", "tagging", "seq2seq"} & set(self.row_types)

    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts that a setting of `trainer.args` allows where the class does not say so."""
    refused_settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of that class that luthier decides for this method -> what to do instead."""

    @property
    def config_name(self) -> str:
        """The class as people know it."""
        package, _, name = self.config
        return f"{package}.{name}"


_PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
_ROWS_OF_TOKENS = {
    "max_completion_length": "use chat.max_length",
    "padding_value": "rows are padded by their length; remove it",
    "generate_during_eval": "use trainer.evaluation",
    "is_encoder_decoder": "the model says so itself; remove it",
}
_ROUNDS = "TRL would round the weights that train to 16 bits for it; remove it"
_PROMPTS = {
    "chat_template_kwargs": "use chat.variables",
    "reward_weights": "use the weight of each of trainer.rewards",
    "use_transformers_continuous_batching": _ROUNDS,
    "use_transformers_paged": _ROUNDS,
    "max_tool_calling_iterations": "use trainer.rollouts.max_turns",
}
_TEACHER = {
    "teacher_model_name_or_path": "use trainer.teacher",
    "teacher_model_init_kwargs": "the teacher is loaded as the model is; remove it",
}
_GROUP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

METHODS = {
    "sft": MethodFacts(
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        "luthier.train.methods.sft:SFTMethod",
        ("conversation", "text"),
        can_stream=True,
        takes_images=True,
    ),
    "pretrain": MethodFacts(
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        "luthier.train.methods.sft:SFTMethod",
        ("text",),
        writes_replies=False,
        can_stream=True,
    ),
    "dpo": MethodFacts(
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
        "luthier.train.methods.dpo:DPOMethod",
        ("preference",),
        takes_images=True,
        choices={"loss_type": _PAIR_LOSSES},
    ),
    "kto": MethodFacts(
        ("trl", "trainer/kto_config.py", "KTOConfig"),
        "luthier.train.methods.kto:KTOMethod",
        ("unpaired", "preference"),
        choices={"loss_type": ("kto", "apo_zero_unpaired")},
    ),
    "orpo": MethodFacts(
        ("trl", "experimental/orpo/orpo_config.py", "ORPOConfig"),
        "luthier.train.methods.orpo_cpo:ORPOMethod",
        ("preference",),
        refused_settings=_ROWS_OF_TOKENS,
    ),
    "cpo": MethodFacts(
        ("trl", "experimental/cpo/cpo_config.py", "CPOConfig"),
        "luthier.train.methods.orpo_cpo:CPOMethod",
        ("preference",),
        choices={"loss_type": ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
        refused_settings=_ROWS_OF_TOKENS,
    ),
    "reward": MethodFacts(
        ("trl", "trainer/reward_config.py", "RewardConfig"),
        "luthier.train.methods.reward:RewardMethod",
        ("preference",),
        task="SEQ_CLS",
        writes_replies=False,
        trained_values="pairs",
    ),
    "classify": MethodFacts(
        ("transformers", "training_args.py", "TrainingArguments"),
        "luthier.train.methods.classify:ClassifyMethod",
        ("classification",),
        task="SEQ_CLS",
        writes_replies=False,
        trained_values="labels",
    ),
    "tag": MethodFacts(
        ("transformers", "training_args.py", "TrainingArguments"),
        "luthier.train.methods.tag:TagMethod",
        ("tagging",),
        task="TOKEN_CLS",
        writes_replies=False,
        trained_values="tagged words",
    ),
    "seq2seq": MethodFacts(
        ("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
        "luthier.train.methods.seq2seq:Seq2SeqMethod",
        ("seq2seq",),
        task="SEQ_2_SEQ_LM",
        trained_values="tokens of targets",
    ),
    "grpo": MethodFacts(
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
        "luthier.train.methods.grpo_rloo:GRPOMethod",
        ("conversation",),
        uses_rewards=True,
        trained_values="completions of prompts",
        choices={
            "loss_type": _GROUP_LOSSES,
            "importance_sampling_level": ("token", "sequence"),
            "scale_rewards": ("group", "batch", "none"),
        },
        refused_settings=_PROMPTS,
    ),
    "rloo": MethodFacts(
        ("trl", "trainer/rloo_config.py", "RLOOConfig"),
        "luthier.train.methods.grpo_rloo:RLOOMethod",
        ("conversation",),
        uses_rewards=True,
        trained_values="completions of prompts",
        refused_settings=_PROMPTS,
    ),
    "distill": MethodFacts(
        ("trl", "trainer/distillation_config.py", "DistillationConfig"),
        "luthier.train.methods.distill:DistillMethod",
        ("conversation",),
        uses_teacher=True,
        trained_values="completions of prompts",
        refused_settings=_PROMPTS
        | _TEACHER
        | {"max_tool_calling_iterations": "no tools are called; remove it"},
    ),
}

BASE_METHOD = "base_method"
"""The attribute of a class of `trainer.method` that names the built-in method it goes on from."""
OWN_BASES = ("sft", "pretrain")
"""The methods that a trainer of the user's own may go on from."""


def base_method(name: str) -> str:
    """Return the built-in method whose rows, settings and facts a method has: mostly itself.

    Of a class of the user's own (`python:my.py:Trainer`) it is what its attribute `base_method`
    says in the source; the name itself where it says nothing.
    """
    if not is_python_path(name):
        return name
    base = read_class_constant(name, BASE_METHOD)
    return base if base in OWN_BASES else name


EXAMPLE_TYPES = {
    "conversation": "conversations",
    "text": "plain texts",
    "preference": "preference pairs (a chosen and a rejected reply)",
    "unpaired": "replies labelled good or bad",
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


def check_example_type(name: str, kind: str, key: str, type_key: str) -> None:
    """Raise UserError for rows of a kind that a method does not train on.

    `key` names the source of the rows, `type_key` the group whose `type` says what they are.
    """
    trained_types = METHODS[base_method(name)].row_types
    if kind in trained_types:
        return
    others = [other for other, facts in METHODS.items() if kind in facts.row_types]
    *most, last = others
    listed = f"{', '.join(most)} or {last}" if most else last
    trained = " or ".join(EXAMPLE_TYPES[example_type] for example_type in trained_types)
    raise UserError(
        f"{key}: these rows are {EXAMPLE_TYPES[kind]}, and trainer={base_method(name)} needs "
        f"{trained}. Use trainer={listed}, or set {type_key}.type if the rows are something else."
    )


# The adapter methods of peft by name, as far as a config needs to know them: nothing is
# imported.
#
# What is said here of quantized weights is held by `tests/model/test_adapters_methods.py`,
# against the same weights dequantized.

PACKED_BITS = (4, 8)
"""The widths, in bits, of weights that bitsandbytes packs."""


@dataclass(frozen=True)
class AdapterFacts:
    """What `lora.method` stands for."""

    config: str
    """The class of peft, in `peft/tuners/NAME/config.py`, whose fields `lora` takes."""
    all_linear: bool = True
    """Whether it goes on all linear layers unless `target_modules` says otherwise."""
    packed: tuple[int, ...] = PACKED_BITS
    """The widths of packed weights on which it is right."""


ADAPTERS = {
    "lora": AdapterFacts("LoraConfig"),
    "adalora": AdapterFacts("AdaLoraConfig"),
    "beft": AdapterFacts("BeftConfig", all_linear=False),
    "boft": AdapterFacts("BOFTConfig"),
    "c3a": AdapterFacts("C3AConfig"),
    "deft": AdapterFacts("DeftConfig", packed=()),
    "delora": AdapterFacts("DeloraConfig", packed=()),
    "fourierft": AdapterFacts("FourierFTConfig"),
    "frod": AdapterFacts("FrodConfig", packed=()),
    "glora": AdapterFacts("GloraConfig", packed=()),
    "gralora": AdapterFacts("GraloraConfig"),
    "hira": AdapterFacts("HiraConfig"),
    "hra": AdapterFacts("HRAConfig", packed=()),
    "ia3": AdapterFacts("IA3Config", all_linear=False),
    "lily": AdapterFacts("LilyConfig"),
    "ln_tuning": AdapterFacts("LNTuningConfig", all_linear=False),
    "loha": AdapterFacts("LoHaConfig", packed=(8,)),
    "lokr": AdapterFacts("LoKrConfig", packed=(8,)),
    "miss": AdapterFacts("MissConfig"),
    "oft": AdapterFacts("OFTConfig"),
    "osf": AdapterFacts("OSFConfig", packed=()),
    "peanut": AdapterFacts("PeanutConfig", packed=()),
    "psoft": AdapterFacts("PsoftConfig", packed=()),
    "pvera": AdapterFacts("PveraConfig"),
    "randlora": AdapterFacts("RandLoraConfig"),
    "road": AdapterFacts("RoadConfig"),
    "shira": AdapterFacts("ShiraConfig"),
    "supertuning": AdapterFacts("SupertuningConfig", packed=()),
    "tinylora": AdapterFacts("TinyLoraConfig", packed=()),
    "trainable_tokens": AdapterFacts("TrainableTokensConfig", all_linear=False),
    "unilora": AdapterFacts("UniLoraConfig", packed=()),
    "vblora": AdapterFacts("VBLoRAConfig"),
    "vera": AdapterFacts("VeraConfig"),
    "waveft": AdapterFacts("WaveFTConfig"),
}

_VIRTUAL = (
    "puts tokens of its own before each row, and luthier's labels, packed rows and losses count "
    "the tokens of the row alone"
)
REFUSED_ADAPTERS = {
    "adamss": "is not tried: it clusters the weights with scikit-learn when it starts",
    "adaption_prompt": "changes the attention of Llama alone, and does not compute in 16 bits",
    "cartridge": _VIRTUAL,
    "cpt": _VIRTUAL,
    "multitask_prompt_tuning": _VIRTUAL,
    "p_tuning": _VIRTUAL,
    "poly": "asks for the number of a task with each row",
    "prefix_tuning": _VIRTUAL,
    "prompt_tuning": _VIRTUAL,
    "shadow": "does not run with this release of transformers",
    "xlora": "mixes adapters that are trained already",
}
"""Methods of peft that luthier does not train, and why."""

_WHOLE = (*SPLITTING_STARTS, "orthogonal", "mica")
"""Beginnings of those that need weights which are not packed."""
_FROM_DATA = ("eva", "corda", "lora_ga")


_EXPERT_STARTS = (True, False, "gaussian", "loftq")
"""Beginnings of LoRA on experts; LoftQ corrects each expert."""
_NOT_ON_PARAMETERS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of LoRA's B",
    "fan_in_fan_out": "fan_in_fan_out",
    "velora_config": "VeLoRA",
}
"""Settings that peft's adapter for parameters refuses -> what they are."""


def check_adapter(
    lora: LoraSettings, bits: int | None, has_experts: bool = False
) -> Iterator[Mistake]:
    """What does not go together in the settings of an adapter, on weights of so many bits.

    `bits` is 4 or 8 for weights that bitsandbytes packs, None for all others; `has_experts` says
    that the model is a mixture of experts.
    """
    method = lora.method
    if method not in ADAPTERS:
        yield Mistake("lora.method", _no_method(method))
        return
    if bits is not None and bits not in ADAPTERS[method].packed:
        yield Mistake("lora.method", _not_packed(method, bits))
    if method != "lora" and lora.plus_ratio is not None:
        text = f"is for lora.method=lora, and the method is {method}. Remove it."
        yield Mistake("lora.plus_ratio", text)
    if lora.use_dora is True and bits == PACKED_BITS[1]:
        text = "DoRA needs the lengths of the weights, which peft cannot take from 8-bit ones. "
        yield Mistake("lora.use_dora", f"{text}Use quantization=nf4 or none.")
    yield from _start(lora, bits)
    yield from _experts(lora, has_experts)


def _experts(lora: LoraSettings, has_experts: bool) -> Iterator[Mistake]:
    """What does not go with adapters on experts, or on other parameters by their names."""
    if lora.method != "lora":
        for key in ("experts", "target_parameters"):
            if lora.get(key):
                text = f"{lora.method} reaches linear layers only. Remove it, or use lora=default."
                yield Mistake(f"lora.{key}", text)
        return
    trains_experts = has_experts and lora.trains_experts
    if not trains_experts and not lora.target_parameters:
        return
    what = "the experts of this model" if trains_experts else "lora.target_parameters"
    way_out = (
        "Add lora.experts=false to leave the experts as they are"
        if trains_experts
        else "Remove one of the two"
    )
    for key, name in _NOT_ON_PARAMETERS.items():
        if lora.get(key):
            yield Mistake(f"lora.{key}", f"{name} does not go on {what}. {way_out}.")
    if lora.init_lora_weights not in _EXPERT_STARTS:
        start = lora.init_lora_weights
        text = f"{start} does not go on {what}. {way_out}, or use true or gaussian."
        yield Mistake("lora.init_lora_weights", text)


def _no_method(method: str) -> str:
    if method in REFUSED_ADAPTERS:
        reason = REFUSED_ADAPTERS[method]
        return f"{method} is not trained by luthier: it {reason}. Use another method."
    return f"{format_value(method)} is not an option. {suggest_options(method, ADAPTERS)}"


def _not_packed(method: str, bits: int) -> str:
    fitting = ", ".join(name for name, facts in ADAPTERS.items() if bits in facts.packed)
    return (
        f"{method} works on the weights themselves, and {bits}-bit weights are packed. Use "
        f"quantization=none, or a method that goes on {bits}-bit weights: {fitting}."
    )


def _start(lora: LoraSettings, bits: int | None) -> Iterator[Mistake]:
    key, start = "lora.init_lora_weights", lora.init_lora_weights
    if start == "loftq":
        yield from _loftq(lora.loftq_config, bits)
        if lora.use_dora is True:
            yield Mistake(key, "loftq and DoRA undo each other's start. Use one of them.")
    elif start in _FROM_DATA:
        yield Mistake(key, f"{start} needs a pass over the data, which luthier does not make.")
    elif bits is not None and str(start).startswith(_WHOLE):
        text = (
            f"{start} starts from the weights themselves, and {bits}-bit weights are packed. Use "
            "true or gaussian, loftq on 4-bit weights, or quantization=none."
        )
        yield Mistake(key, text)


def _loftq(settings: Mapping[str, Any], bits: int | None) -> Iterator[Mistake]:
    if bits != PACKED_BITS[0]:
        text = (
            "loftq makes up for the error of 4-bit weights. Use it with quantization=nf4 or fp4, "
            "or init_lora_weights=true."
        )
        yield Mistake("lora.init_lora_weights", text)
    if settings.get("loftq_iter", 1) != 1:
        text = (
            "more than one round quantizes the base anew, and a saved adapter would not fit the "
            "base that others quantize. Set it to 1."
        )
        yield Mistake("lora.loftq_config.loftq_iter", text)
    if settings.get("loftq_bits", 4) != PACKED_BITS[0]:
        yield Mistake("lora.loftq_config.loftq_bits", "4 is the only width. Remove it.")
