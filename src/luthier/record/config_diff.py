"""What differs between two configs, and what that means for a run that is to go on."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from luthier.config.code_settings import hash_code
from luthier.config.env_references import (
    fill_references,
    find_references,
    fingerprint_variables,
)
from luthier.config.library_settings import TrainerArgs
from luthier.config.schema import RunConfig
from luthier.redaction import HIDDEN, REFERENCE, redact

_ABSENT = "(absent)"
"""What stands for the value of a setting that a config does not have."""
NEUTRAL_KEYS = ("name", "output_dir", "dry_run", "overwrite", "tracker", "recipe", "card")
"""Keys that change where, whether or under which name a run happens, not what it computes."""

# How the training is logged, stored and fed: it computes the same.
_HARMLESS_KEYS = re.compile(
    r"trainer\.(checkpoints(\.|$)|profile$)"
    r"|trainer\.args\.(logging_|log_level|disable_tqdm|save_|hub_|push_to_hub|project$|trackio_"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers)|ddp_timeout"
    r"|include_num_input_tokens_seen|skip_memory_metrics|include_for_metrics)"
    r"|dataset\.(workers|cache)$"
)
# What is measured: harmless where nothing is decided by it.
_EVALUATION_KEYS = re.compile(
    r"trainer\.evaluation(\.|$)|trainer\.args\.(eval_|per_device_eval_|batch_eval_metrics)"
)
_LENGTH_KEYS = re.compile(r"trainer\.args\.(max_steps|num_train_epochs)$")

ChangeEffect = Literal["matters", "harmless", "length"]
"""`length` is a change by which the run becomes longer or shorter."""


@dataclass(frozen=True)
class ConfigChange:
    """A dotted key in which two configs differ, with both values."""

    key: str
    old: Any
    new: Any
    effect: ChangeEffect

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def compare_configs(old: dict[str, Any], new: dict[str, Any]) -> list[ConfigChange]:
    """Return the keys in which two resolved configs differ, sorted, without the neutral ones."""
    has_deciding_metrics = any(map(_has_deciding_metrics, (old, new)))
    return [
        ConfigChange(key, old_value, new_value, _change_effect(key, has_deciding_metrics))
        for key, old_value, new_value in differing_keys(old, new)
        if key.split(".")[0] not in NEUTRAL_KEYS
    ]


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each dotted key that differs, with its old and new value or "(absent)".

    Secrets are hidden in what is written, so a hidden value equals every other one; and a value of
    the environment is written as a reference, which equals what the variable holds. A setting that
    an older version of luthier did not know equals its default.
    """
    old_values, new_values = (
        flatten_config(redact(old)),
        flatten_config(redact(new)),
    )
    for key in sorted(old_values.keys() | new_values.keys()):
        before, after = old_values.get(key, _ABSENT), new_values.get(key, _ABSENT)
        if _ABSENT in (before, after) and _is_default(key, after if before == _ABSENT else before):
            continue
        if before != after and not _may_be_equal(before, after):
            yield key, before, after


def _is_default(key: str, value: Any) -> bool:
    """Return whether a setting that is written has the value that it has where it is absent.

    Fields of the libraries' own classes, such as those of `trainer.args`, are not judged.
    """
    model: type[BaseModel] = RunConfig
    names = key.split(".")
    while names:
        field = model.model_fields.get(names.pop(0))
        if field is None:
            return False
        if not names:
            default = field.get_default(call_default_factory=True)
            # Of a group that is empty all settings are absent.
            return bool(value == ({} if isinstance(default, BaseModel) else default))
        group = field.annotation
        if get_origin(group) is dict:
            group, names = get_args(group)[1], names[1:]
        if not (isinstance(group, type) and issubclass(group, BaseModel)):
            return False
        model = group
    return False


def _may_be_equal(before: Any, after: Any) -> bool:
    """Return whether two values may be the same but for what is written in place of them."""
    texts = [str(value) for value in (before, after)]
    if not any(HIDDEN in text or REFERENCE.search(text) for text in texts):
        return False
    if all(REFERENCE.search(text) for text in texts):
        return False
    # Redacted again: a secret of the environment is hidden here where it stands for itself.
    first, second = (str(redact(fill_references(text, with_secrets=True))) for text in texts)
    return first == second or _matches(first, second) or _matches(second, first)


def _matches(pattern: str, text: str) -> bool:
    """Return whether a text has all that stands around the hidden pieces of another one."""
    pieces = [re.escape(piece) for piece in pattern.split(HIDDEN)]
    return len(pieces) > 1 and re.fullmatch(".*".join(pieces), text, re.DOTALL) is not None


def find_environment_changes(
    recorded: dict[str, Any], before: dict[str, str]
) -> list[ConfigChange]:
    """Return the keys whose variable of the environment holds something else than before.

    `recorded` is the new config with its references, and `before` are the fingerprints of its
    variables when the run began. Secrets have none: a renewed one gives the same run.
    """
    now = fingerprint_variables(recorded)
    has_deciding_metrics = _has_deciding_metrics(recorded)
    return [
        ConfigChange(
            key,
            f"${{oc.env:{name}}}",
            "another value of this variable",
            _change_effect(key, has_deciding_metrics),
        )
        for key, name in find_references(recorded)
        if key.split(".")[0] not in NEUTRAL_KEYS
        and before.get(name, now.get(name)) != now.get(name)
    ]


def find_code_changes(record: dict[str, Any], config: dict[str, Any]) -> list[ConfigChange]:
    """Return the functions and classes of a config whose source is not that of a run's record.

    The key is that of the setting, and the values are the path with the begin of each hash. What a
    source's code makes is compared by its rows, where those are known before they train: then such
    a change is harmless.
    """
    now = hash_code(config)
    before: dict[str, dict[str, Any]] = record.get("code") or {}
    is_stream = bool((config.get("dataset") or {}).get("streaming"))
    has_deciding_metrics = _has_deciding_metrics(config)
    changes = []
    named = [(key, path) for path, entry in now.items() for key in entry["settings"]]
    for key, path in named:
        old, new = before.get(path, {}).get("sha256"), now[path]["sha256"]
        if old and new and old != new:
            has_known_rows = key.startswith("dataset.") and not is_stream
            effect = "harmless" if has_known_rows else _change_effect(key, has_deciding_metrics)
            before_text, now_text = (f"{path} (SHA-256 {sha[:12]}...)" for sha in (old, new))
            changes.append(ConfigChange(key, before_text, now_text, effect))
    return changes


def describe_config_changes(
    changes: list[ConfigChange], resolved: dict[str, Any], extended_from: int | None
) -> list[str]:
    """Return a sentence for each change of the config with which a run goes on.

    `resolved` is the new config; `extended_from` is the step from which a run of another length
    goes on, or None for one that has nothing to go on from, whose new length needs no sentence.
    """
    sentences = [
        f"{change}, which changes nothing of the training"
        for change in changes
        if change.effect == "harmless"
    ]
    if extended_from is None:
        return sentences
    if schedule_depends_on_length(resolved):
        meaning = (
            f"from step {extended_from} on, the learning rate is that of a run of the new length; "
            "the steps before were taken at the rates of the old one. For the numbers of a run "
            "that has this length from its first step, choose another output_dir"
        )
    else:
        meaning = f"the run resumes at step {extended_from} and trains to its new end"
    return sentences + [f"{change}: {meaning}" for change in changes if change.effect == "length"]


def schedule_depends_on_length(config: dict[str, Any]) -> bool:
    """Return whether the learning rate at a step depends on how many steps there will be."""
    args = TrainerArgs(config["trainer"]["args"])
    scheduler, warmup = args.lr_scheduler_type, args.warmup_steps
    # A warmup between 0 and 1 is a share of all steps.
    is_constant_behind_warmup = scheduler == "constant_with_warmup" and not 0 < warmup < 1
    return scheduler != "constant" and not is_constant_behind_warmup


def flatten_config(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, under dotted keys; an empty mapping is a value itself."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, child in value.items():
        flat |= flatten_config(child, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _change_effect(key: str, has_deciding_metrics: bool) -> ChangeEffect:
    # Asked first: what follows would call the length a change that matters.
    if _LENGTH_KEYS.match(key):
        return "length"
    is_evaluation = bool(_EVALUATION_KEYS.match(key))
    # The best checkpoint is one of those that are saved, so how often that happens decides too.
    if has_deciding_metrics and (is_evaluation or key.startswith("trainer.args.save_")):
        return "matters"
    return "harmless" if is_evaluation or _HARMLESS_KEYS.match(key) else "matters"


def _has_deciding_metrics(config: dict[str, Any]) -> bool:
    """Return whether measures choose the final weights or end the training."""
    trainer = config.get("trainer") or {}
    args, evaluation = TrainerArgs(trainer.get("args") or {}), trainer.get("evaluation") or {}
    saves_best = args.save_strategy == "best" or args.load_best_model_at_end
    names_best = args.metric_for_best_model or args.greater_is_better
    return bool(saves_best or names_best or evaluation.get("patience"))
