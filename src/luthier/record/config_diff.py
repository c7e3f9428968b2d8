"""What differs between two configs, and what that means for a run that is to go on."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from luthier.config.library_settings import TrainerArgs
from luthier.record.secrets import HIDDEN, redact_secrets

NEUTRAL_KEYS = ("output_dir", "dry_run", "overwrite", "tracker", "recipe", "card")
"""Keys that change where, whether or under which name a run happens, not what it computes."""

_HARMLESS_KEYS = re.compile(
    r"trainer\.checkpoints(\.|$)"
    r"|trainer\.args\.(logging_|log_level|disable_tqdm|save_|hub_|push_to_hub|project$|trackio_"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers)|ddp_timeout"
    r"|include_num_input_tokens_seen|skip_memory_metrics|include_for_metrics)"
    r"|dataset\.(workers|cache)$"
)
"""What is said of the training, and how it is stored and fed: it computes the same."""
_EVALUATION_KEYS = re.compile(
    r"trainer\.evaluation(\.|$)|trainer\.args\.(eval_|per_device_eval_|batch_eval_metrics)"
)
"""What is measured: harmless where nothing is decided by it."""
_LENGTH_KEYS = re.compile(r"trainer\.args\.(max_steps|num_train_epochs)$")

ChangeEffect = str
"""`matters`, `harmless`, or `length`: the run is to become longer or shorter."""


@dataclass(frozen=True)
class ConfigChange:
    """A key in which two configs differ."""

    key: str
    old: Any
    new: Any
    kind: ChangeEffect

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def compare_configs(old: dict[str, Any], new: dict[str, Any]) -> list[ConfigChange]:
    """The keys in which two resolved configs differ, neutral ones left out, sorted."""
    decides = _has_deciding_metrics(old) or _has_deciding_metrics(new)
    return [
        ConfigChange(key, a, b, _change_effect(key, decides))
        for key, a, b in differing_keys(old, new)
        if key.split(".")[0] not in NEUTRAL_KEYS
    ]


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each key that differs with both values; a value that is hidden is like any other."""
    a, b = flatten_config(redact_secrets(old)), flatten_config(redact_secrets(new))
    for key in sorted(a.keys() | b.keys()):
        one, other = a.get(key, "(absent)"), b.get(key, "(absent)")
        if one != other and HIDDEN not in f"{one} {other}":
            yield key, one, other


def schedule_depends_on_length(config: dict[str, Any]) -> bool:
    """Whether the learning rate at a step depends on how many steps there will be."""
    args = TrainerArgs(config["trainer"]["args"])
    kind, warmup = args.lr_scheduler_type, args.warmup_steps
    return kind != "constant" and not (kind == "constant_with_warmup" and not 0 < warmup < 1)


def flatten_config(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in flatten_config(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _change_effect(key: str, decides: bool) -> ChangeEffect:
    if _LENGTH_KEYS.match(key):
        return "length"
    if decides and (_EVALUATION_KEYS.match(key) or key.startswith("trainer.args.save_")):
        return "matters"
    return "harmless" if _HARMLESS_KEYS.match(key) or _EVALUATION_KEYS.match(key) else "matters"


def _has_deciding_metrics(config: dict[str, Any]) -> bool:
    """Whether measures choose the final weights or end the training."""
    trainer = config.get("trainer") or {}
    args, evaluation = TrainerArgs(trainer.get("args") or {}), trainer.get("evaluation") or {}
    saves_best = args.save_strategy == "best" or args.load_best_model_at_end
    names_best = args.metric_for_best_model or args.greater_is_better
    return saves_best or bool(evaluation.get("patience") or names_best)
