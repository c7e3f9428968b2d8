"""A config of another trainer on its way to a recipe: what became of each of its keys.

A converter takes every key that it knows and says what became of it. Keys that no converter took
are not carried over, with that as the reason, so none is lost in silence.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.config.foreign_settings import FOREIGN_SETTINGS
from luthier.errors import UserError
from luthier.recipe_files.draft import RecipeDraft

MESSAGE_FORMS = {
    ("role", "content"): ("messages", "messages"),
    ("from", "value"): ("sharegpt", "conversations"),
}
"""The keys of a message -> luthier's row format, and the column that it reads them from."""
_STRATEGIES = ("save_strategy", "eval_strategy", "evaluation_strategy")
NO_NEED = "speed, memory or logging only; luthier has no such switch and trains the same without it"


@dataclass
class Conversion:
    """The recipe of another trainer's config, and what is to be said about its keys."""

    project: str
    """The other trainer, such as `axolotl`."""
    file: Path
    """The config, for what it names beside itself."""
    source: Mapping[str, Any]
    """The config as it stands there."""
    draft: RecipeDraft = field(default_factory=RecipeDraft)
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys that are not carried over -> why, or what to do instead."""
    different: dict[str, str] = field(default_factory=dict)
    """Keys that are carried over and do not mean quite the same -> the difference."""
    needless: dict[str, str] = field(default_factory=dict)
    """Keys that change nothing in what is trained -> why luthier needs none."""
    launch: str = ""
    """The launch file that fits, such as `zero2`; empty for one process."""

    def __post_init__(self) -> None:
        # YAML reads an unquoted `no` as false.
        off = {key: "no" for key in _STRATEGIES if self.source.get(key) is False}
        self.source = {**self.source, **off}
        self._left = {key: value for key, value in self.source.items() if value is not None}
        self._origins: dict[str, str] = {}
        self._carried: set[str] = set()

    @property
    def empty(self) -> list[str]:
        """Return the keys that have no value."""
        return [key for key, value in self.source.items() if value is None]

    @property
    def carried(self) -> list[str]:
        """Return the keys that became settings of the recipe."""
        carried = {*self._carried, *self.different} - {*self.dropped}
        return [key for key in self.source if key in carried]

    def has(self, key: str) -> bool:
        """Return whether a key has a value that is not false."""
        return bool(self.source.get(key))

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, which counts as dealt with from then on."""
        return self._left.pop(key, default)

    def check_values(self, form: str, keys: str) -> None:
        """Raise UserError for a key whose value is not of a form of `FORMS`."""
        for key in keys.split():
            if self.source.get(key) is not None:
                self.check_value(form, key, self.source[key])

    def check_value(self, form: str, key: str, value: Any) -> None:
        """Raise UserError if the value of a key is not of a form of `FORMS`."""
        if not FORMS[form](value):
            raise UserError(f"{self.file}: {key}: {value!r} is not {form}.")

    def carry(self, key: str, ours: str, default: Any, about: str = "") -> Any:
        """Set `ours` to the value of a key, or to the other trainer's default; return the value.

        A default that is a number says what the value has to be; UserError for another one.
        """
        is_set, value = self.source.get(key) is not None, self.take(key, default)
        if is_set and not isinstance(default, bool) and isinstance(default, int | float):
            whole = isinstance(default, int)
            self.check_value("a whole number" if whole else "a number", key, value)
            value = (
                int(float(value)) if whole else float(value) if isinstance(value, str) else value
            )
        self.set_key(ours, value, key if is_set else "", about)
        return value

    def set_key(self, ours: str, value: Any, key: str = "", about: str = "") -> None:
        """Set a key of the recipe; `key` is the other trainer's, `about` what it is."""
        about = about or ABOUT.get(ours, "")
        origin = f"{self.project}: {key}" if key else f"{self.project}'s default"
        if key == ours.rpartition(".")[2]:
            origin = "" if about else f"as in {self.project}"
        comment = f"{about} ({origin})" if about and origin else about or origin
        self.draft.set_key(ours, value, comment)
        if key:
            self._origins[ours] = key
            self._carried.add(key)

    def choose(self, group: str, option: str, *keys: str) -> None:
        """Choose the option of a group; `keys` are those of the other trainer that say so."""
        self.draft.options[group] = option
        self._carried |= {key for key in keys if self.source.get(key) is not None}

    def count_as_carried(self, *keys: str) -> None:
        """Note keys that are a part of what other keys say."""
        self._carried |= {key for key in keys if self.source.get(key) is not None}

    def origin(self, ours: str) -> str | None:
        """Return the key of the other trainer that a setting of the recipe comes from."""
        return next((self._origins[k] for k in self._origins if _covers(ours, k)), None)

    def origins(self) -> set[str]:
        """Return the keys of the other trainer that settings of the recipe come from."""
        return {key for ours, key in self._origins.items() if ours in self.draft.settings}

    def drop(self, key: str, why: str) -> None:
        """Note that a key is not carried over."""
        self._left.pop(key, None)
        self.dropped[key] = why

    def differ(self, key: str, how: str) -> None:
        """Note a difference in meaning, once."""
        if how not in self.different.get(key, ""):
            self.different[key] = f"{self.different.get(key, '')} {how}".strip()

    def leave_out(self, keys: str, why: str) -> None:
        """Note for each of these keys that has a value that luthier needs no such setting."""
        for key in keys.split():
            if key in self._left:
                self._left.pop(key)
                self.needless[key] = why

    def leave_out_taken(self, key: str, why: str) -> None:
        """Note that luthier needs no setting for a key that was taken already."""
        self.needless[key] = why

    def refuse(self, keys: Mapping[str, str]) -> None:
        """Drop those of these keys that are switched on, each with its reason."""
        for key, why in keys.items():
            if key not in self._left:
                continue
            if self._left[key] in (False, "", 0, [], {}):
                self._left.pop(key)
                self.needless[key] = "off in the file"
            else:
                self.drop(key, why)

    def rename(self, keys: str) -> None:
        """Carry keys over whose value stays as it is, to the names that luthier has for them."""
        for key in keys.split():
            if key not in self._left:
                continue
            setting = FOREIGN_SETTINGS.get(key)
            ours = SAME_NAMES.get(key) or (setting.key if setting else "")
            ours = ours or f"trainer.args.{key}"
            self.set_key(ours, self.take(key), key)

    def finish(self) -> None:
        """Drop what nothing took, and what was taken and did not come to anything."""
        for key in list(self._left):
            near = difflib.get_close_matches(key, FOREIGN_SETTINGS, n=1, cutoff=0.88)
            hint = f"; is {near[0]} meant?" if near else ""
            self.drop(key, f"luthier's converter does not know this key of {self.project}{hint}")
        outcome = {*self._carried, *self.dropped, *self.different, *self.needless, *self.empty}
        for key in [key for key in self.source if key not in outcome]:
            if self.source[key] in (False, "", 0, [], {}):
                self.needless[key] = "off in the file"
            else:
                self.dropped[key] = "it has no effect beside the other keys of this file"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


FORMS: Mapping[str, Callable[[Any], bool]] = {
    "a number": _is_number,
    "a whole number": lambda value: _is_number(value) and float(value).is_integer(),
    "a single value": lambda value: not isinstance(value, list | dict),
    "a list": lambda value: isinstance(value, list | str),
    "a mapping": lambda value: isinstance(value, dict),
}
"""What a value can have to be -> whether one is."""


def _covers(key: str, setting: str) -> bool:
    return key == setting or key.startswith((f"{setting}.", f"{setting}["))


def split_names(value: Any) -> list[str]:
    """Return the names of a list, or of a text with commas between them."""
    if isinstance(value, list):
        return [str(each) for each in value]
    return [name.strip() for name in str(value).split(",") if name.strip()]


def take_trackers(conversion: Conversion) -> None:
    """Take `report_to` and `run_name`, which transformers' arguments have."""
    names = split_names(conversion.take("report_to") or [])
    trackers = [name for name in names if name in ("wandb", "tensorboard", "mlflow", "trackio")]
    if trackers:
        conversion.choose("tracker", trackers[0], "report_to")
        if len(trackers) > 1:
            conversion.draft.set_key("tracker.to", trackers, "all trackers")
    elif names and names != ["none"]:
        conversion.drop("report_to", "luthier logs to wandb, TensorBoard, MLflow and Trackio")
    elif names:
        conversion.leave_out_taken("report_to", "nothing is sent anywhere")
    name = conversion.take("run_name")
    if name and "wandb" in trackers:
        conversion.set_key("tracker.wandb.name", name, "run_name", "the run's name there")
    elif name:
        conversion.leave_out_taken("run_name", "a run is named by its folder")


SAME_NAMES = {
    "trust_remote_code": "model.trust_remote_code",
    "tokens": "model.add_tokens",
    "lora_alpha": "lora.lora_alpha",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "oft_block_size": "lora.oft_block_size",
    "module_dropout": "lora.module_dropout",
    "wandb_mode": "tracker.wandb.mode",
}
"""Keys that are no mistake of anybody's in a recipe, because a group has the same name, or that
name another thing elsewhere -> our key; the others are in `luthier.config.foreign_settings`."""

ABOUT = {
    "model.path": "a hub name or a local folder",
    "model.revision": "a branch, tag or commit",
    "lora.r": "the rank",
    "lora.lora_alpha": "the output is scaled by lora_alpha / r",
    "lora.lora_dropout": "dropout on the adapter's input",
    "lora.target_modules": "the layers with an adapter",
    "chat.max_length": "the longest sequence, in tokens",
    "trainer.args.per_device_train_batch_size": "rows in one step on one device",
    "trainer.args.per_device_eval_batch_size": "rows in one step of an evaluation",
    "trainer.args.gradient_accumulation_steps": "steps before the weights change",
    "trainer.args.num_train_epochs": "how often every row is seen",
    "trainer.args.max_steps": "optimizer steps",
    "trainer.args.learning_rate": "the highest learning rate",
    "trainer.args.lr_scheduler_type": "how the rate falls",
    "trainer.args.warmup_steps": "steps of warm-up; below 1 a share of all steps",
    "trainer.args.weight_decay": "pull of the weights towards zero",
    "trainer.args.optim": "the optimizer",
    "trainer.args.packing": "several rows share a sequence, kept apart",
    "trainer.args.logging_steps": "optimizer steps between two lines of metrics",
    "trainer.args.save_steps": "optimizer steps between two checkpoints",
    "trainer.args.save_strategy": "when checkpoints are written",
    "trainer.args.save_total_limit": "older checkpoints are removed",
    "trainer.args.save_only_model": "checkpoints without the optimizer: no run resumes from them",
    "trainer.args.dataloader_num_workers": "processes that load batches",
    "trainer.args.max_grad_norm": "longer gradients are cut to this length",
    "trainer.args.adam_epsilon": "keeps AdamW's division from zero",
    "trainer.args.neftune_noise_alpha": "noise on the embeddings",
    "trainer.args.load_best_model_at_end": "the best checkpoint is what is saved",
    "trainer.args.metric_for_best_model": "what says which checkpoint is the best",
    "trainer.args.beta": "how near the model stays to the reference",
    "trainer.args.torch_compile": "the model is compiled",
    "model.trust_remote_code": "runs Python code of the model's repository",
    "lora.modules_to_save": "layers that train whole",
    "lora.use_dora": "a length of its own for each weight (DoRA)",
    "lora.use_rslora": "scaled by lora_alpha / sqrt(r)",
    "lora.plus_ratio": "how much faster B learns (LoRA+)",
    "seed": "draws the order of rows, the held-out rows and the adapter's first values",
}
"""What the commonest settings are, for the comment beside them."""


@dataclass(frozen=True)
class SourceDraft:
    """The settings of one source of rows, and the name it gets among several."""

    name: str
    settings: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)


def set_sources(conversion: Conversion, sources: Sequence[SourceDraft], key: str) -> None:
    """Write the sources into the recipe: one as `dataset` itself, several under `sources`."""
    draft, several = conversion.draft, len(sources) > 1
    draft.options["dataset"] = "mixture" if several else "files"
    for name, source in unique_names(sources).items():
        prefix = f"dataset.sources.{name}" if several else "dataset"
        _set_source(conversion, prefix, source, key)


def set_eval_sources(conversion: Conversion, sources: Sequence[SourceDraft], key: str) -> None:
    """Write evaluation sets of their own into the recipe."""
    conversion.draft.set_key("dataset.eval.share", None, "in place of a share")
    for name, source in unique_names(sources).items():
        _set_source(conversion, f"dataset.eval.sets.{name}", source, key)


def _set_source(conversion: Conversion, prefix: str, source: SourceDraft, key: str) -> None:
    for name, value in source.settings.items():
        conversion.set_key(f"{prefix}.{name}", value, key, source.comments.get(name, ""))


def unique_names(sources: Sequence[SourceDraft]) -> dict[str, SourceDraft]:
    """Return the sources by names that differ."""
    named: dict[str, SourceDraft] = {}
    for source in sources:
        name, number = source.name, 2
        while name in named:
            name, number = f"{source.name}_{number}", number + 1
        named[name] = source
    return named


def apply(conversion: Conversion, handlers: Sequence[Callable[[Conversion], None]]) -> None:
    """Let each handler take its keys, in order, and drop what is left."""
    for handler in handlers:
        handler(conversion)
    conversion.finish()
