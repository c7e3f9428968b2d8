"""What a config may say: one strict, frozen model per group. Behind it nobody sees a DictConfig.

Settings that belong to a library pass through whole (`trainer.args`, `lora`, `quantization`,
`model.kwargs`); `luthier.config.fields` checks their names without importing the library.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

GROUPS = ("model", "quantization", "lora", "dataset", "chat", "trainer", "tracker", "debug")
"""The config groups, in the order in which `conf/config.yaml` lists them."""


class Strict(BaseModel):
    """A group that refuses keys it does not know and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Strict):
    """Which model, and how it is put on this machine."""

    path: str
    """A hub name, a local folder, or `package:NAME` for a package that carries a GGUF file."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own (hub name or folder)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the machine computes it well, else float32."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: the best device of this machine."""
    attention: str = "auto"
    """An attention implementation of transformers; `auto` picks the fastest installed one."""
    trust_remote_code: bool = False
    """Run Python code that the model repository brings. Only for repositories you have read."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `from_pretrained`."""


class EvalSplitConfig(Strict):
    """Which rows are held out from training; at most one of path, split, share and count."""

    path: str | None = None
    """A file of its own for the held-out rows."""
    split: str | None = None
    """A split of the same hub dataset."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """This share of the rows, drawn with the run's seed."""
    count: PositiveInt | None = None
    """This many rows, drawn with the run's seed."""


class DatasetConfig(Strict):
    """Where the rows come from and how they are read."""

    path: str
    """A local JSON or JSONL file, or the name of a hub dataset."""
    name: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    """The hub dataset's split."""
    revision: str | None = None
    """A branch, tag or commit of the hub dataset."""
    shape: Literal["auto", "messages", "prompt_completion"] = "auto"
    """What a row looks like; `auto` finds it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name -> the dataset's name of a column, such as `{prompt: question}`."""
    system: str | None = None
    """A system prompt for rows that have none."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    eval: EvalSplitConfig = Field(default_factory=EvalSplitConfig)
    """The held-out rows."""


class ChatSettings(Strict):
    """How conversations become tokens and labels: the settings of `luthier.chat.ChatEncoder`."""

    template: str | None = None
    """A Jinja template (text or file) in place of the tokenizer's own."""
    train_on: Literal["all", "last"] | list[str] = "all"
    """Which turns train: all assistant turns, the last one, or the turns of these roles."""
    boundaries: Literal["served", "segments"] = "served"
    """Where tokens may merge: as a server encodes the prompt, or never across segments."""
    on_lost: Literal["error", "drop", "keep"] = "error"
    """What to do with a row whose text the template does not show whole."""
    max_length: PositiveInt | None = None
    """The longest sequence, in tokens; null for no bound."""
    on_long: Literal["turns", "drop", "error"] = "turns"
    """A longer row: remove whole turns from the front, drop the row, or stop."""
    date: str | None = None
    """The date (YYYY-MM-DD) that templates which ask for today's date get."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the template, such as `enable_thinking`."""


class EvaluationConfig(Strict):
    """What is generated and scored on held-out rows."""

    metrics: list[Literal["exact_match"]] = Field(default_factory=list)
    """Metrics of generated replies; empty for the loss alone."""
    rows: PositiveInt = 100
    """How many held-out rows are answered."""
    max_new_tokens: PositiveInt = 128
    """The longest reply, in tokens."""
    batch_size: PositiveInt = 16
    """Replies generated side by side."""
    samples: NonNegativeInt = 3
    """How many replies are shown side by side, before and after."""


class TrainerConfig(Strict):
    """How the model is trained."""

    method: Literal["sft"] = "sft"
    """The trainer: `sft` is TRL's SFTTrainer."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Any field of the trainer's config class (`trl.SFTConfig`)."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What is generated and scored on held-out rows."""


class TrackerConfig(Strict):
    """Where metrics go besides `metrics.jsonl`."""

    to: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    """The trackers; each needs its package (extras `wandb`, `tensorboard`)."""
    wandb: dict[str, Any] = Field(default_factory=dict)
    """Passed to `wandb.init`: project, entity, name, group, tags, mode, ..."""


class RunConfig(Strict):
    """A whole run."""

    model: ModelConfig
    quantization: dict[str, Any] = Field(default_factory=dict)
    """Fields of `transformers.BitsAndBytesConfig`; empty for none."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Fields of `peft.LoraConfig`; empty for full fine-tuning."""
    dataset: DatasetConfig
    chat: ChatSettings = Field(default_factory=ChatSettings)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    recipe: str | None = None
    """The recipe's name, for the record."""
    output_dir: str
    """Where everything the run leaves is written."""
    seed: int = 42
    """Seeds the split, the adapter's weights, the order of the data and dropout."""
    deterministic: bool = False
    """Only deterministic kernels: slower, equal to the last bit on the same machine."""
    dry_run: bool = False
    """Do everything up to the first step, then stop."""
    overwrite: bool = False
    """Replace a finished run that is in `output_dir`."""
