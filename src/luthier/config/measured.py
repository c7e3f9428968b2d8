"""What a config measures, rewards and learns from: mistakes known before anything is loaded."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.config.methods import METHODS
from luthier.config.passthrough import settings
from luthier.errors import Mistake, UserError, choice

if TYPE_CHECKING:
    from luthier.metrics import Metric

_KEY = "trainer.evaluation.metrics"
_REWARDS = "trainer.rewards"


def check_measurements(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What is wrong with metrics, rewards and what is done with them; imports nothing heavy."""
    evaluation = settings(resolved, "trainer.evaluation")
    args = settings(resolved, "trainer.args")
    sets = settings(resolved, "dataset.eval.sets")
    wrong = list(_metrics(evaluation, sets))
    yield from wrong
    yield from _rewards(resolved)
    yield from _teacher(resolved)
    yield from _evaluations(evaluation, args)
    if not wrong and isinstance(args.get("metric_for_best_model"), str):
        yield from _best(evaluation, args, sets)


def best_metric(
    name: str, evaluation: Mapping[str, Any], sets: Mapping[str, Any]
) -> tuple[str, "list[Metric]"] | None:
    """The metric of replies that `metric_for_best_model` names, and those of its evaluation set.

    None where it names something else, such as a loss. `evaluation` is the config's
    `trainer.evaluation`, `sets` its `dataset.eval.sets`.
    """
    from luthier.metrics import parse_metrics

    own = evaluation.get("sets") or {}
    for label in ("", *sets):
        metrics = parse_metrics(own.get(label, evaluation.get("metrics") or []))
        bare = name.removeprefix("eval_").removeprefix(f"{label}_" if label else "")
        if any(bare == metric.name or bare.startswith(f"{metric.name}/") for metric in metrics):
            return bare, metrics
    return None


def _metrics(evaluation: dict[str, Any], sets: dict[str, Any]) -> Iterator[Mistake]:
    from luthier.metrics import check_metrics

    own = evaluation.get("sets")
    named = own if isinstance(own, dict) else {}
    for name in named:
        if name not in sets:
            yield Mistake(
                f"trainer.evaluation.sets.{name}",
                f"there is no evaluation set of this name. {choice(str(name), map(str, sets))} "
                "They are named under dataset.eval.sets.",
            )
    lists = {_KEY: evaluation.get("metrics")}
    lists |= {f"trainer.evaluation.sets.{name}": given for name, given in named.items()}
    for key, given in lists.items():
        if isinstance(given, list):
            yield from _joined(check_metrics(given, key))


def _rewards(resolved: dict[str, Any]) -> Iterator[Mistake]:
    from luthier.metrics.rewards import check_rewards

    trainer = settings(resolved, "trainer")
    method, given = str(trainer.get("method", "sft")), trainer.get("rewards") or []
    facts = METHODS.get(method)
    if facts is None or not isinstance(given, list):
        return
    if facts.rewards and not given:
        yield Mistake(
            _REWARDS,
            f"trainer.method={method} needs at least one, such as 'trainer.rewards=[exact_match]' "
            "or [{length: {max: 300}}] (docs/metrics.md).",
        )
    elif given and not facts.rewards:
        takers = " or ".join(f"trainer={name}" for name, one in METHODS.items() if one.rewards)
        yield Mistake(
            _REWARDS,
            f"trainer.method={method} trains without rewards. Remove them, or take {takers}.",
        )
    else:
        yield from _joined(check_rewards(given))


def _teacher(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trainer = settings(resolved, "trainer")
    method, given = str(trainer.get("method", "sft")), trainer.get("teacher")
    facts = METHODS.get(method)
    if facts is None or facts.teacher == (given is not None):
        return
    if facts.teacher:
        text = f"trainer.method={method} needs a model to learn from. Add trainer.teacher=PATH."
    else:
        text = f"trainer.method={method} has no teacher. Remove it, or take trainer=distill."
    yield Mistake("trainer.teacher", text)


def _joined(mistakes: list[Mistake]) -> Iterator[Mistake]:
    """All that is wrong with one list, as one mistake: of each key only the first is shown."""
    if mistakes:
        yield Mistake(mistakes[0].key, "\n    ".join(mistake.text for mistake in mistakes))


def _evaluations(evaluation: dict[str, Any], args: dict[str, Any]) -> Iterator[Mistake]:
    if args.get("eval_strategy", "no") not in ("no", False, None):
        return
    advice = "and there are none while training. Add trainer.args.eval_strategy=steps (or epoch)."
    if evaluation.get("when") == "evaluations":
        yield Mistake("trainer.evaluation.when", f"rows are answered at evaluations, {advice}")
    if evaluation.get("patience") is not None:
        yield Mistake("trainer.evaluation.patience", f"it counts evaluations, {advice}")


def _best(
    evaluation: dict[str, Any], args: dict[str, Any], sets: dict[str, Any]
) -> Iterator[Mistake]:
    from luthier.metrics import greater_is_better

    name = args["metric_for_best_model"]
    found = best_metric(name, evaluation, sets)
    if found is None:
        return
    if evaluation.get("when") != "evaluations":
        yield Mistake(
            "trainer.args.metric_for_best_model",
            f"{name} is measured before and after training only. "
            "Set trainer.evaluation.when=evaluations.",
        )
    if args.get("greater_is_better") is None:
        try:
            greater_is_better(found[1], found[0])
        except UserError as error:
            yield Mistake(
                "trainer.args.metric_for_best_model", str(error).removeprefix(f"{_KEY}: ")
            )
