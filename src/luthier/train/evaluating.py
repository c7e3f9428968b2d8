"""Held-out rows answered at every evaluation: metrics that choose a checkpoint or end a run."""

import json
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from luthier.config.cross_checks import best_metric
from luthier.config.schema import RunConfig
from luthier.metrics import greater_is_better
from luthier.train import trackers
from luthier.train.replies import Answered, Answers, Asked, rows_of

FILE = "evaluations.jsonl"
"""Where the replies of every evaluation are written, a reply a line."""


def choose_best(args: Any, config: RunConfig) -> None:
    """Say in the trainer's arguments which way the best checkpoint lies, if the user did not.

    transformers takes every name that does not end with `loss` for better the greater it is. With
    `patience` and no metric, the loss on held-out rows counts. Raises UserError for a metric that
    is neither good nor bad.
    """
    evaluation = config.trainer.evaluation
    if args.metric_for_best_model is None and evaluation.patience is not None:
        args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.metric_for_best_model is None or "greater_is_better" in config.trainer.args:
        return
    found = best_metric(
        args.metric_for_best_model, evaluation.model_dump(), config.dataset.eval.sets
    )
    if found is not None:
        name, metrics = found
        args.greater_is_better = greater_is_better(metrics, name, "trainer.evaluation.metrics")


def added(
    trainer: Trainer, answers: Answers, config: RunConfig, folder: Path
) -> "RepliesAtEvaluations | None":
    """Give the trainer what `trainer.evaluation` has it do at its evaluations."""
    evaluation, during = config.trainer.evaluation, None
    if evaluation.when == "evaluations":
        during = RepliesAtEvaluations(trainer, answers, config, folder)
        trainer.add_callback(during)
    if evaluation.patience is not None:
        # Behind the one that adds what it looks at.
        trainer.add_callback(Patience(evaluation.patience))
    return during


class RepliesAtEvaluations(TrainerCallback):
    """Answers the rows of the set that was evaluated, and adds the metrics to its measures."""

    def __init__(self, trainer: Trainer, answers: Answers, config: RunConfig, folder: Path) -> None:
        self._trainer, self._answers, self._config = trainer, answers, config
        self._file = folder / FILE
        self._last: dict[str, tuple[int, Answered]] = {}

    def at(self, name: str, step: int) -> Answered | None:
        """The replies of this step to the questions of a set, if they were the last ones."""
        found = self._last.get(name)
        return found[1] if found is not None and found[0] == step else None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the metrics, in place: the trainer chooses the best checkpoint by what is there."""
        for asked in self._answers.asked:
            # One evaluation of several sets comes here once for each of them.
            if f"{asked.prefix}_runtime" in metrics:
                metrics |= self._answer(asked, state)

    def _answer(self, asked: Asked, state: Any) -> dict[str, float]:
        answered = self._answers.to(asked, f"at step {state.global_step}")
        self._last[asked.name] = state.global_step, answered
        results = {f"{asked.prefix}_{name}": value for name, value in answered.results.items()}
        # Past the trainer's own way of logging, which adds the means of what it has computed.
        Trainer.log(self._trainer, dict(results))
        if state.is_world_process_zero:
            self._write(asked, rows_of(asked, answered), state.global_step)
        return results

    def _write(self, asked: Asked, rows: list[dict[str, Any]], step: int) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        trackers.log_replies(self._config, asked.name, rows, step)


class Patience(EarlyStoppingCallback):
    """Stops after evaluations without a better metric, and passes over the other sets' measures."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Count an evaluation that measured the metric."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
