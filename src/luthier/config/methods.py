"""The training methods by name, as far as a config needs to know them: nothing is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    ),
    "rloo": MethodFacts(
        ("trl", "trainer/rloo_config.py", "RLOOConfig"),
        "luthier.train.methods.reinforce:LeaveOneOut",
        ("conversation",),
        rewards=True,
    ),
}
