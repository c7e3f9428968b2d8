"""What a config may say: one strict, frozen model per group. Behind it nobody sees a DictConfig.

Settings that belong to a library pass through whole (`trainer.args`, `lora`, `quantization`,
`model.kwargs`); `luthier.config.library_fields` checks their names without importing the library.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, field_validator

from luthier.config.library_settings import LoraSettings, QuantizationSettings, TrainerArgs
from luthier.config.methods import base_method
from luthier.python_code import is_python_path

# The kind of model that every group of a config is.


class StrictModel(BaseModel):
    """A group that refuses keys it does not know and never changes."""

    # Built when a config is first validated: help, completion and `explain` need only the fields.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


# What a config may say about what is kept of a run: its checkpoints, and its metrics elsewhere.

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?b)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CheckpointsConfig(StrictModel):
    """How many checkpoints are kept, besides what `trainer.args.save_total_limit` says."""

    budget: str | None = None
    """The most that all of them together take, such as `20GB`; the newest and the best stay."""

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if value is not None and not _SIZE.fullmatch(str(value)):
            raise ValueError("write a size with its unit, such as 500MB, 20GB or 1.5TB")
        return value

    @property
    def bytes(self) -> int | None:
        """The budget in bytes."""
        match = _SIZE.fullmatch(self.budget or "")
        return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None


class MlflowConfig(StrictModel):
    """Where MLflow keeps a run."""

    uri: str | None = None
    """The tracking server, or a folder or database; null for `mlflow` in the run's folder."""
    experiment: str = "luthier"
    """The experiment; it is created if it does not exist."""
    name: str | None = None
    """The run's name; null for recipe/folder."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""


class TrackioConfig(StrictModel):
    """Where Trackio keeps a run."""

    project: str = "luthier"
    """The project."""
    space_id: str | None = None
    """A space of the hub to which the run is sent; null for this machine alone."""


class TrackerConfig(StrictModel):
    """Where metrics go besides `metrics.jsonl`."""

    to: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(default_factory=list)
    """The trackers; all but wandb need a package (the extra of its name)."""
    artifacts: bool = False
    """Also send the trained model to wandb and MLflow, not only the run's small files."""
    wandb: dict[str, Any] = Field(default_factory=dict)
    """Passed to `wandb.init`: project, entity, name, group, tags, mode, ..."""
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    """Settings of MLflow."""
    trackio: TrackioConfig = Field(default_factory=TrackioConfig)
    """Settings of Trackio."""


GROUPS = ("model", "quantization", "lora", "dataset", "chat", "trainer", "tracker", "debug")
"""The config groups, in the order in which `conf/config.yaml` lists them."""

SWEEP_GROUPS = ("hydra/sweeper", "hydra/launcher")
"""The groups that say how a sweep is done."""


PositiveNumber = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
# Whole numbers go to libraries that count in 32 bits.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]


class ModelConfig(StrictModel):
    """Which model, and how it is loaded."""

    path: str
    """A hub name, a local folder, or `package:NAME` for a package that carries a GGUF file."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own (hub name or folder)."""
    add_tokens: list[str] = Field(default_factory=list)
    """Texts that become tokens, each with a row of the embeddings that trains."""
    add_special_tokens: list[str] = Field(default_factory=list)
    """The same for control tokens, which replies and templates keep apart from text."""
    train: list[str] = Field(default_factory=list)
    """Full fine-tuning of the parameters whose names match one of these patterns; empty for all."""
    freeze: list[str] = Field(default_factory=list)
    """Full fine-tuning without the parameters whose names match one of these patterns."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the machine computes it well, else float32."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: the best device of this machine."""
    attention: str = "auto"
    """An attention implementation of transformers, or `varlen`: packed rows document by document.

    `auto` picks the fastest that is installed and that the model's class has.
    """
    trust_remote_code: bool = False
    """Run Python code that the model repository brings. Only for repositories you have read."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `from_pretrained`."""
    processor: dict[str, Any] = Field(default_factory=dict)
    """Settings of the model's image processor, such as `{max_pixels: 401408}`; saved with it."""
    loader: str | dict[str, dict[str, Any] | None] | None = None
    """`python:file.py:function` that loads the model from its path, for a class that none of
    transformers' `Auto` classes loads; null to use those."""


class SourceConfig(StrictModel):
    """Where rows come from and how they are read."""

    path: str | list[str] | None = None
    """A file, a glob, a folder, several of them, a URL, a hub name, a folder of `save_to_disk`, or
    `python:module.function`."""
    format: Literal[
        "auto", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "text", "saved", "hub", "python"
    ] = "auto"
    """What the path names; `auto` finds it from the path."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the reader of that format takes, such as `{delimiter: ";"}` for CSV."""
    name: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    """The split of a hub dataset or of a saved folder."""
    revision: str | None = None
    """A branch, tag or commit of the hub dataset."""
    type: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "prompt",
        "text",
        "preference",
        "unpaired",
        "classification",
        "tagging",
        "seq2seq",
    ] = "auto"
    """The format of a row; `auto` finds it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name -> the dataset's name of a column, such as `{prompt: question}`."""
    remove_columns: list[str] = Field(default_factory=list)
    """Columns that are left out on purpose, where a row with them would be refused."""
    json_replies: bool = False
    """Train replies that are objects, lists, or true and false as JSON text."""
    system: str | None = None
    """A system prompt for rows that have none."""
    image_placeholder: Annotated[str, Field(min_length=1)] | None = None
    """The text that marks an image's place, such as `<image>`; null: such text is plain text."""
    train_on: Literal["all", "last"] | list[str] | None = None
    """Which turns of these rows train; overrides `chat.train_on`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    map: str | dict[str, dict[str, Any] | None] | None = None
    """`python:file.py:function` of a row that returns the row, a list of rows, or null to leave it
    out; with arguments: `{python:file.py:function: {limit: 3}}`."""
    filter: str | None = None
    """Use only rows for which this expression over their own columns holds."""
    weight: PositiveNumber | None = None
    """The share of the mixture, with `mix: interleave`."""
    repeats: PositiveNumber = 1
    """How many times an epoch sees the rows, with `mix: concatenate`."""


MAIN_SOURCE = "dataset"
"""The name of the only source of a dataset that names no sources."""


class EvalConfig(StrictModel):
    """Which rows are held out from training: at most one of path, split, share and count."""

    path: str | None = None
    """A separate file of held-out rows."""
    split: str | None = None
    """Another split of the same hub dataset."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """The share of the rows to hold out."""
    count: PositiveInt | None = None
    """The number of rows to hold out."""
    by: Literal["draw", "hash"] = "draw"
    """`draw`: exactly that many rows; `hash`: row by row, so added rows move no others."""
    sets: dict[str, SourceConfig] = Field(default_factory=dict)
    """Further evaluation sets by name, each with its own metrics."""


class DatasetConfig(SourceConfig):
    """The rows to train on, from one source or several, and those held out."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Several sources by name, in place of `path`."""
    mix: Literal["concatenate", "interleave"] = "concatenate"
    """`concatenate`: all rows of all sources; `interleave`: a share of each by its `weight`."""
    deduplicate: Literal["none", "exact", "normalised"] = "none"
    """Leave out equal rows; `normalised`: also those that differ only in case and white space."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be read: stop, or leave it out and list it in `dropped.jsonl`."""
    workers: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Processes that encode; null for one."""
    cache: str | None = None
    """The folder of the encoded rows; null for `$LUTHIER_CACHE` or `~/.cache/luthier`."""
    streaming: bool = False
    """Encode rows while training, for sets larger than the disk; needs `trainer.args.max_steps`."""
    shuffle_buffer: PositiveInt = 10_000
    """Rows among which a stream is shuffled."""
    stride: NonNegativeInt = 0
    """Tokens by which the windows of a long plain text overlap."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """The held-out rows."""

    def sources_by_name(self) -> dict[str, SourceConfig]:
        """Return the sources to train on by name; the only one of a dataset is its own source."""
        return dict(self.sources) or {MAIN_SOURCE: self}

    def changed_source_settings(self) -> list[str]:
        """Return the settings of a single source that are not what they are by default."""
        default = SourceConfig()
        return [
            name
            for name in SourceConfig.model_fields
            if getattr(self, name) != getattr(default, name)
        ]


class ChatSettings(StrictModel):
    """How conversations become tokens and labels: the settings of `luthier.chat.ChatEncoder`."""

    template: str | None = None
    """A Jinja template (text or file) that replaces the tokenizer's own."""
    train_on: Literal["all", "last"] | list[str] = "all"
    """Which turns train: all assistant turns, the last one, or the turns of these roles."""
    boundaries: Literal["served", "segments"] = "served"
    """Where tokens may merge: as a server encodes the prompt, or never across segments."""
    on_lost: Literal["error", "drop", "keep"] = "error"
    """What to do with a row of which the template does not show everything."""
    max_length: PositiveInt | None = None
    """The longest sequence, in tokens; null for the model's own limit."""
    on_long: Literal["turns", "drop", "error"] = "turns"
    """A longer row: remove whole turns from the front, drop the row, or stop."""
    date: str | None = None
    """The date (YYYY-MM-DD) that templates which ask for today's date get."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the template, such as `enable_thinking`."""
    empty_replies: Literal["error", "drop", "train"] = "error"
    """A row with an empty or blank reply (or text): stop, drop the row, or train it as it is."""
    roles: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Further roles of messages, for a template that writes any role."""


class SavedChatSettings(ChatSettings):
    """The content of `chat.json`: what `luthier.chat.ChatEncoder.settings` returns."""

    # A config names one template; mypy allows no wider type in a subclass.
    template: str | dict[str, str] | None = None  # type: ignore[assignment]
    """The text of the template; of several, each by its name."""
    eos_token_ids: list[NonNegativeInt] = Field(default_factory=list)
    """The end tokens of the base's generation config."""


class RolloutsConfig(StrictModel):
    """How a model that calls tools answers a prompt over several turns."""

    max_turns: PositiveInt | None = None
    """A completion calls tools in at most this many of its turns; null for as many as fit."""
    tool_timeout: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds after which a call ends with an error that the model reads."""
    record: NonNegativeInt = 0
    """Completions of each step that are written to `rollouts.jsonl`."""


class EvaluationConfig(StrictModel):
    """What is generated and scored on held-out rows."""

    metrics: list[str | dict[str, Any]] = Field(default_factory=list)
    """Metrics of generated replies, such as `[exact_match, {regex: {pattern: "..."}}]`; empty for
    the loss alone."""
    sets: dict[str, list[str | dict[str, Any]]] = Field(default_factory=dict)
    """Other metrics than these for an evaluation set, by its name in `dataset.eval.sets`."""
    when: Literal["start_and_end", "evaluations"] = "start_and_end"
    """Rows are answered before and after training, or also at every evaluation in between."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations without a better `trainer.args.metric_for_best_model`."""
    rows: PositiveInt = 100
    """How many held-out rows are answered."""
    max_new_tokens: PositiveInt = 128
    """The longest reply, in tokens."""
    batch_size: PositiveInt = 16
    """Replies generated side by side."""
    samples: NonNegativeInt = 3
    """How many replies are shown side by side, before and after."""


class OptimizerConfig(StrictModel):
    """What changes the weights, besides what `trainer.args` says of it."""

    name: str | dict[str, dict[str, Any] | None] | None = None
    """A value of `trainer.args.optim`, `muon`, or `python:file.py:function` of the model and the
    trainer's arguments, which returns an optimizer or parameter groups; null for
    `trainer.args.optim`."""
    groups: list[dict[str, Any]] = Field(default_factory=list)
    """Weights with a learning rate or weight decay of their own, by a regular expression for their
    names: `[{match: embed_tokens, learning_rate: 1e-5, weight_decay: 0.0}]`; the first match
    counts."""

    @field_validator("groups")
    @classmethod
    def _with_numbers(cls, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups with the numbers that YAML read as texts, such as `1e-5`."""
        return [{name: _as_number(name, value) for name, value in g.items()} for g in groups]


def _as_number(name: str, value: Any) -> Any:
    if name == "match" or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _allow_code(value: Any, check: Callable[[Any], Any]) -> Any:
    """Return a `python:` path as it is, and check everything else."""
    return value if is_python_path(value) else check(value)


class TrainerConfig(StrictModel):
    """How the model is trained."""

    method: Annotated[
        Literal[
            "sft",
            "pretrain",
            "dpo",
            "kto",
            "orpo",
            "cpo",
            "reward",
            "classify",
            "tag",
            "seq2seq",
            "grpo",
            "rloo",
            "distill",
        ],
        WrapValidator(_allow_code),
    ] = "sft"
    """The trainer: `sft` is TRL's SFTTrainer, and `python:file.py:Class` one of your own."""
    args: TrainerArgs = Field(default_factory=TrainerArgs)
    """Any field of the trainer's config class (`trl.SFTConfig`)."""
    loss: str | dict[str, dict[str, Any] | None] | None = None
    """`python:file.py:function` of log-probabilities, labels and columns of rows that returns the
    loss of each trained token, with `sft` and `pretrain`; null for the negative log-likelihood."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer, and weights with rates of their own."""
    padding: Literal["longest", "max_length"] = "longest"
    """Rows of a batch are padded to the longest of them, or all to `chat.max_length`."""
    rewards: list[str | dict[str, Any]] = Field(default_factory=list)
    """What GRPO and RLOO reward, such as `[exact_match, {length: {max: 300, weight: 0.2}}]`.

    `{model: PATH}` is a reward model, and `{judge: ADDRESS, model: NAME, prompt: TEXT}` a judge.
    """
    callbacks: list[str | dict[str, dict[str, Any] | None]] = Field(default_factory=list)
    """Classes of `transformers.TrainerCallback`: `[python:file.py:Stop, {python:file.py:Log:
    {steps: 5}}]`."""
    tools: list[str] = Field(default_factory=list)
    """Functions that the model of GRPO or RLOO may call, such as `[python:my.tools.search]`."""
    environment: str | None = None
    """A class whose methods the model may call, such as `python:my.games.Maze`; each completion
    has an object of its own."""
    rollouts: RolloutsConfig = Field(default_factory=RolloutsConfig)
    """The turns of a completion that calls tools, and what is recorded of completions."""
    teacher: str | None = None
    """The model that `distill` learns from, named as in `model.path`, with the same vocabulary."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What is generated and scored on held-out rows."""
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig)
    """How many checkpoints are kept."""
    profile: bool = False
    """Profile steps 3 to 6, and write a trace and the ten most expensive operations."""

    @property
    def base_method(self) -> str:
        """The built-in method that a class of the user's own goes on from; else the method."""
        return base_method(self.method)

    @property
    def optimizer_name(self) -> str:
        """The optimizer as it is called: a name, or the path of a function."""
        name = self.optimizer.name
        return next(iter(name)) if isinstance(name, dict) else name or self.args.optim


class CardConfig(StrictModel):
    """What the model card says and no run can know."""

    license: str | None = None
    """The licence of the trained model, such as `apache-2.0`."""
    language: list[str] = Field(default_factory=list)
    """The languages of the model, such as `[en, de]`."""
    data_licenses: dict[str, str] = Field(default_factory=dict)
    """The licence of the rows, by a source's path or its name in `dataset.sources`."""
    example: bool = True
    """Whether the card shows a held-out prompt as an example."""


class RunConfig(StrictModel):
    """A whole run."""

    model: ModelConfig
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)
    """Fields of `transformers.BitsAndBytesConfig`; empty for none."""
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """Fields of `peft.LoraConfig`; empty for full fine-tuning."""
    dataset: DatasetConfig
    chat: ChatSettings = Field(default_factory=ChatSettings)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    card: CardConfig = Field(default_factory=CardConfig)
    recipe: str | None = None
    """The recipe's name, for the record."""
    name: str | None = None
    """The name of the run's folder below `runs/<recipe>/`; null for one made of the overrides."""
    output_dir: str
    """The folder for everything that the run writes."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds the split, the adapter's weights, the order of the data and dropout."""
    deterministic: bool = False
    """Only deterministic kernels: slower, equal to the last bit on the same machine."""
    dry_run: bool = False
    """Do everything up to the first step, then stop."""
    overwrite: bool = False
    """Replace a finished run that is in `output_dir`."""

    @field_validator("name", mode="before")
    @classmethod
    def _is_folder_name(cls, value: Any) -> Any:
        if value is not None and not _RUN_NAME.fullmatch(str(value)):
            raise ValueError(
                "write up to 100 letters, digits, - . or _, the first one a letter or digit; "
                "output_dir=FOLDER takes any path"
            )
        if value == "sweeps":
            raise ValueError("this folder is that of the recipe's sweeps; write another name")
        return value

    def with_trainer_args(self, **args: Any) -> "RunConfig":
        """Return the same run with these keys of `trainer.args` set."""
        trainer_args = TrainerArgs(self.trainer.args | args)
        trainer = self.trainer.model_copy(update={"args": trainer_args})
        return self.model_copy(update={"trainer": trainer})
