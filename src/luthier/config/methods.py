"""The training methods by name, as far as a config needs to know them: nothing is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier.errors import UserError


@dataclass(frozen=True)
class MethodFacts:
    """What `trainer.method` stands for."""

    config: tuple[str, str, str]
    """The class whose fields `trainer.args` takes: its package, file and name."""
    place: str
    """The `luthier.train.methods` class that does it, as `module:class`."""
    rows: tuple[str, ...]
    """The kinds of rows it trains on."""
    task: str = "CAUSAL_LM"
    """What its model does, as peft calls it."""
    replies: bool = True
    """Whether its model writes replies, so that held-out rows can be answered."""
    rewards: bool = False
    """Whether it trains on `trainer.rewards`."""
    teacher: bool = False
    """Whether its model learns from `trainer.teacher`."""
    streams: bool = False
    """Whether it can train on rows that are read as they come (`dataset.streaming`)."""

    answers: str = ""
    """What its rows train, where that is not tokens of the rows themselves."""

    @property
    def chats(self) -> bool:
        """Whether its rows are conversations, or prompts with replies."""
        return not {"classification", "tagging", "seq2seq"} & set(self.rows)

    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts that a setting of `trainer.args` allows where the class does not say so."""
    kept: Mapping[str, str] = field(default_factory=dict)
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
    "max_tool_calling_iterations": "no tools are called; remove it",
}
_TEACHER = {
    "teacher_model_name_or_path": "use trainer.teacher",
    "teacher_model_init_kwargs": "the teacher is loaded as the model is; remove it",
}
_GROUP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

METHODS = {
    "sft": MethodFacts(
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        "luthier.train.methods.supervised:Supervised",
        ("conversation", "text"),
        streams=True,
    ),
    "pretrain": MethodFacts(
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        "luthier.train.methods.supervised:Supervised",
        ("text",),
        replies=False,
        streams=True,
    ),
    "dpo": MethodFacts(
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
        "luthier.train.methods.dpo:DPO",
        ("preference",),
        choices={"loss_type": _PAIR_LOSSES},
    ),
    "kto": MethodFacts(
        ("trl", "trainer/kto_config.py", "KTOConfig"),
        "luthier.train.methods.kto:KTO",
        ("unpaired", "preference"),
        choices={"loss_type": ("kto", "apo_zero_unpaired")},
    ),
    "orpo": MethodFacts(
        ("trl", "experimental/orpo/orpo_config.py", "ORPOConfig"),
        "luthier.train.methods.odds:ORPO",
        ("preference",),
        kept=_ROWS_OF_TOKENS,
    ),
    "cpo": MethodFacts(
        ("trl", "experimental/cpo/cpo_config.py", "CPOConfig"),
        "luthier.train.methods.odds:CPO",
        ("preference",),
        choices={"loss_type": ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
        kept=_ROWS_OF_TOKENS,
    ),
    "reward": MethodFacts(
        ("trl", "trainer/reward_config.py", "RewardConfig"),
        "luthier.train.methods.reward:Reward",
        ("preference",),
        task="SEQ_CLS",
        replies=False,
    ),
    "classify": MethodFacts(
        ("transformers", "training_args.py", "TrainingArguments"),
        "luthier.train.methods.classify:Classify",
        ("classification",),
        task="SEQ_CLS",
        replies=False,
        answers="labels",
    ),
    "tag": MethodFacts(
        ("transformers", "training_args.py", "TrainingArguments"),
        "luthier.train.methods.tag:Tag",
        ("tagging",),
        task="TOKEN_CLS",
        replies=False,
        answers="tagged words",
    ),
    "seq2seq": MethodFacts(
        ("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
        "luthier.train.methods.seq2seq:Seq2Seq",
        ("seq2seq",),
        task="SEQ_2_SEQ_LM",
        answers="tokens of targets",
    ),
    "grpo": MethodFacts(
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
        "luthier.train.methods.reinforce:GroupRelative",
        ("conversation",),
        rewards=True,
        answers="completions of prompts",
        choices={
            "loss_type": _GROUP_LOSSES,
            "importance_sampling_level": ("token", "sequence"),
            "scale_rewards": ("group", "batch", "none"),
        },
        kept=_PROMPTS,
    ),
    "rloo": MethodFacts(
        ("trl", "trainer/rloo_config.py", "RLOOConfig"),
        "luthier.train.methods.reinforce:LeaveOneOut",
        ("conversation",),
        rewards=True,
        answers="completions of prompts",
        kept=_PROMPTS,
    ),
    "distill": MethodFacts(
        ("trl", "trainer/distillation_config.py", "DistillationConfig"),
        "luthier.train.methods.distill:Distill",
        ("conversation",),
        teacher=True,
        answers="completions of prompts",
        kept=_PROMPTS | _TEACHER,
    ),
}

ROW_KINDS = {
    "conversation": "conversations",
    "text": "plain texts",
    "preference": "pairs of a chosen and a rejected reply",
    "unpaired": "replies with a verdict",
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


def check_rows(name: str, kind: str, key: str, shape_key: str) -> None:
    """Raise UserError for rows of a kind that a method does not train on.

    `key` names the source of the rows, `shape_key` the group whose `shape` says what they are.
    """
    wanted = METHODS[name].rows
    if kind in wanted:
        return
    others = [other for other, facts in METHODS.items() if kind in facts.rows]
    fitting = f"trainer={' or trainer='.join(others)} does. " if others else ""
    raise UserError(
        f"{key}: its rows are {ROW_KINDS[kind]}, and trainer.method={name} trains on "
        f"{' and '.join(ROW_KINDS[one] for one in wanted)}. {fitting}If they are something else, "
        f"say so with {shape_key}.shape."
    )
