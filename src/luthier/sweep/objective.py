"""What trials are compared by: a result, a logged metric or a number of the record, by name."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.library_settings import TrainerArgs
from luthier.config.passthrough import mapping_at
from luthier.config.renamed_settings import new_result_name
from luthier.errors import Mistake, UserError, suggest_options
from luthier.sweep.settings import Direction, OptunaSettings, SweeperSettings

KEY = "hydra.sweeper.objective"
DEFAULT = "eval_loss"
_RESULTS = {
    "dpo": ("rewards/accuracies", "rewards/margins"),
    "kto": ("rewards/margins",),
    "orpo": ("rewards/accuracies", "rewards/margins"),
    "cpo": ("rewards/accuracies", "rewards/margins"),
    "reward": ("accuracy", "margin"),
    "grpo": ("reward",),
    "rloo": ("reward",),
    "classify": ("accuracy", "macro_f1", "micro_f1", "mae", "rmse", "pearson"),
    "tag": ("accuracy", "entity_precision", "entity_recall", "entity_f1"),
}
"""What each method measures of held-out rows besides the loss."""
_WITHOUT_LOSS = ("grpo", "rloo")
_CLOSED = ("sft", "pretrain", "seq2seq", "classify", "tag")
"""Methods that log nothing else than what is listed here."""
_A_TYPO = 0.9
"""How alike an unknown name must be to a known one to be taken for it, where more is logged."""
_LOGGED = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "aux_loss")
_RECORD = ("seconds", "training_seconds", "peak_memory_gib.host", "peak_memory_gib.gpu")
_LESS = (*_RECORD, "mae", "rmse", "grad_norm", "entropy")
_MORE = ("mean_token_accuracy", *(name for names in _RESULTS.values() for name in names))


@dataclass(frozen=True)
class Objective:
    """One thing to compare by, and which way is better."""

    name: str
    maximize: bool

    @property
    def direction(self) -> Direction:
        """Return the direction as Optuna calls it."""
        return "maximize" if self.maximize else "minimize"

    def key(self, measure: float | None) -> float:
        """Return what to sort by, the best first; what is missing or no number comes last."""
        if measure is None or not math.isfinite(measure):
            return math.inf
        return -measure if self.maximize else measure


def read_objectives(
    sweeper: SweeperSettings, resolved: dict[str, Any]
) -> tuple[tuple[Objective, ...], list[Mistake]]:
    """Return the objectives of a sweep over this configuration, or what is wrong with them."""
    setting = sweeper.objective
    directions: dict[str, Direction | None]
    if isinstance(setting, dict):
        directions = setting
    elif setting is None:
        directions = {DEFAULT: None}
    else:
        directions = dict.fromkeys([setting] if isinstance(setting, str) else setting)
    objectives, mistakes = [], []
    if not directions:
        mistakes.append(Mistake(KEY, "is empty. Write a name, or null for eval_loss."))
    for name, direction in directions.items():
        wrong = _find_mistake(name, resolved)
        try:
            maximize = (
                _is_maximized(name, resolved) if direction is None else direction == "maximize"
            )
        except UserError as error:
            wrong = wrong or str(error)
            maximize = False
        mistakes += [Mistake(KEY, wrong)] if wrong else []
        objectives.append(Objective(name, maximize))
    return tuple(objectives), mistakes


def known_objectives(resolved: dict[str, Any]) -> list[str]:
    """Return the names that a run of this configuration is sure to know."""
    method = str(mapping_at(resolved, "trainer").get("method", "sft"))
    names = [*_LOGGED, *_RECORD]
    if _holds_out(resolved):
        for prefix in _list_prefixes(resolved):
            method_names = [
                *_RESULTS.get(method, ()),
                *(metric.name for metric in _parse_set_metrics(resolved, prefix)),
            ]
            has_loss = method not in _WITHOUT_LOSS
            names += [f"{prefix}{name}" for name in [*method_names, *[DEFAULT] * has_loss]]
            losses = ["loss"] if has_loss else []
            logged = [*losses, "mean_token_accuracy", "entropy", *method_names]
            # The trainer logs `eval_SET_metric`, the record has `SET/metric`.
            names += [f"eval_{prefix.replace('/', '_')}{name}" for name in logged]
    return list(dict.fromkeys(names))


def _find_mistake(name: str, resolved: dict[str, Any]) -> str | None:
    """Return what is wrong with a name, as far as it can be known before anything runs."""
    if new_result_name(name) != name:
        return f"{name} is called {new_result_name(name)} now."
    method = str(mapping_at(resolved, "trainer").get("method", "sft"))
    if name.rpartition("/")[2] == DEFAULT and method in _WITHOUT_LOSS:
        return f"{method} has no loss of held-out rows. Name another objective ({KEY}=reward)."
    names = known_objectives(resolved)
    bare = name.removeprefix("eval_")
    metric_names = [
        metric.name
        for prefix in _list_prefixes(resolved)
        for metric in _parse_set_metrics(resolved, prefix)
    ]
    # A metric logs further numbers under its name (a value for each label), so containing it is
    # enough.
    if name in names or any(metric_name in bare for metric_name in metric_names):
        return None
    if name == DEFAULT and not _holds_out(resolved):
        return (
            "eval_loss needs held-out rows, and there are none. Hold rows out "
            f"(dataset.eval.share=0.05), or name another objective ({KEY}=loss)."
        )
    # Methods of TRL log more than is listed here: only what looks like a typing error is refused.
    if method in _CLOSED or difflib.get_close_matches(name, names, 1, _A_TYPO):
        return f"a run of this configuration does not log {name!r}. {suggest_options(name, names)}"
    return None


def _is_maximized(name: str, resolved: dict[str, Any]) -> bool:
    """Return whether more is better; raises UserError where that is not known."""
    from luthier.metrics import greater_is_better

    bare = name.removeprefix("eval_")
    for prefix in _list_prefixes(resolved):
        inner = bare.removeprefix(prefix).removeprefix(prefix.replace("/", "_"))
        metrics = _parse_set_metrics(resolved, prefix)
        if any(inner == metric.name or inner.startswith(f"{metric.name}/") for metric in metrics):
            return greater_is_better(metrics, inner, "trainer.evaluation.metrics")
        bare = inner
    # What no metric of the run claims is decided by its name.
    if bare.endswith("loss") or bare in _LESS:
        return False
    if bare in _MORE:
        return True
    raise UserError(f"which way is {name} better? Write '{KEY}={{{name}: maximize}}', or minimize.")


def _holds_out(resolved: dict[str, Any]) -> bool:
    held = mapping_at(resolved, "dataset.eval")
    return any(held.get(way) for way in ("path", "split", "share", "count", "sets"))


def _list_prefixes(resolved: dict[str, Any]) -> list[str]:
    """Return what stands before the names of each evaluation set; the main one has nothing."""
    return ["", *(f"{name}/" for name in mapping_at(resolved, "dataset.eval.sets"))]


def _parse_set_metrics(resolved: dict[str, Any], prefix: str) -> list[Any]:
    from luthier.metrics import parse_metrics

    evaluation = mapping_at(resolved, "trainer.evaluation")
    entries = mapping_at(evaluation, "sets").get(prefix.rstrip("/"), evaluation.get("metrics"))
    return list(parse_metrics(entries or []))


@dataclass(frozen=True)
class PruningSignal:
    """The metric logged while training by which bad trials are ended early."""

    name: str
    opposite: bool
    """Whether the better way of it is the other one than the objective's."""


def pruning_signal(
    sweeper: OptunaSettings, objectives: tuple[Objective, ...], resolved: dict[str, Any]
) -> PruningSignal | Mistake:
    """Return what a pruner looks at, or why there is nothing for it to see."""
    objective = objectives[0]
    name = sweeper.prune_by or _find_logged_name(objective.name, resolved)
    key = "hydra.sweeper.pruner"
    if len(objectives) > 1:
        return Mistake(
            key, "Optuna prunes by one objective, and there are several. Set it to none."
        )
    if name is None:
        return Mistake(
            key,
            f"{objective.name} is known only at the end. Name a metric that is logged on the way, "
            "such as hydra.sweeper.prune_by=eval_loss, or set the pruner to none.",
        )
    args = TrainerArgs(mapping_at(resolved, "trainer.args"))
    if name.startswith("eval_") and not args.evaluates:
        return Mistake(
            key,
            f"needs {name} while training, and nothing is evaluated on the way. "
            "Add trainer.args.eval_strategy=steps, or set the pruner to none.",
        )
    wrong = _find_mistake(name, resolved)
    if wrong:
        return Mistake("hydra.sweeper.prune_by", wrong)
    if name in (objective.name, _find_logged_name(objective.name, resolved)):
        return PruningSignal(name, opposite=False)
    try:
        is_maximized = _is_maximized(name, resolved)
    except UserError:
        return Mistake(
            "hydra.sweeper.prune_by",
            f"luthier does not know which way {name} is better. Name a loss, a metric of "
            "trainer.evaluation.metrics, or the metric of the objective.",
        )
    return PruningSignal(name, is_maximized != objective.maximize)


def _find_logged_name(name: str, resolved: dict[str, Any]) -> str | None:
    """Return the name under which an objective is logged at evaluations; None if it is not."""
    if name in _RECORD:
        return None
    if name.startswith("eval_") or name in _LOGGED:
        return name
    prefix, _, bare = (
        name.rpartition("/")
        if f"{name.rpartition('/')[0]}/" in _list_prefixes(resolved)
        else ("", "", name)
    )
    label = f"{prefix}_" if prefix else ""
    if bare == DEFAULT:
        return f"eval_{label}loss"
    # Replies are generated at evaluations only where the run is told to; otherwise at its ends.
    replies = any(bare.split("/")[0] == metric.name for metric in _parse_set_metrics(resolved, ""))
    if replies and mapping_at(resolved, "trainer.evaluation").get("when") != "evaluations":
        return None
    return f"eval_{label}{bare}"


def measure_objectives(
    record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Collect all numbers that a run left: results, record, and the last of each logged metric."""
    measures: dict[str, float] = {}
    # Later rows overwrite earlier ones: the last number of each metric stays.
    for row in rows:
        measures |= {name: float(number) for name, number in row.items() if _is_number(number)}
    for name in ("seconds", "training_seconds"):
        measures |= {name: float(record[name])} if _is_number(record.get(name)) else {}
    for where, gib in (record.get("peak_memory_gib") or {}).items():
        measures[f"peak_memory_gib.{where}"] = float(gib)
    for name, pair in (record.get("results") or {}).items():
        if _is_number(pair.get("after")):
            measures[name] = float(pair["after"])
    return measures


def _is_number(candidate: Any) -> bool:
    # True is an int in Python, and no measure.
    return isinstance(candidate, int | float) and not isinstance(candidate, bool)
