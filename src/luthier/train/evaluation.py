"""Held-out rows answered by the model under training, and their score."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from luthier.config.cross_checks import best_metric
from luthier.config.schema import EvaluationConfig, RunConfig
from luthier.errors import UserError
from luthier.infer.generate import generate
from luthier.infer.questions import Question, Row, questions
from luthier.metrics import (
    Metric,
    Reply,
    greater_is_better,
    parse_metrics,
    prepare_metrics,
    score_replies,
)
from luthier.train import trackers

# Weights that are split over ranks, whole on each of them while replies are generated.


@contextmanager
def gathered_weights(trainer: Any) -> Iterator[Any]:
    """The trainer's model with all its weights on every rank within the block.

    Under ZeRO-3 and FSDP2 they are gathered once, at its start, and not once a token. All ranks
    enter it together; within it each may generate as much as it likes. A rank needs memory for the
    whole weights. Elsewhere the model is as it was.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3:
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model:
            yield model
        return
    model = accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        with unsharded_weights(model, accelerator.state.fsdp_plugin.reshard_after_forward):
            yield model
        return
    yield model


@contextmanager
def unsharded_weights(model: Any, reshards: bool) -> Iterator[None]:
    """Keep what the first forward of an FSDP2 model gathers until the end of the block.

    `reshards`: what its `fully_shard` was told as `reshard_after_forward`.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    was_training = model.training
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            # One token: a rank without a question takes part in the gathering, too.
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            decoder = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
            model.eval()(input_ids=token, **decoder)
        yield
    finally:
        model.train(was_training)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshards, recurse=False)


METRICS_KEY = "trainer.evaluation.metrics"


@dataclass(frozen=True)
class EvalPrompts:
    """The rows of one evaluation set that are answered, and what measures the replies."""

    name: str
    """The set's; the main one has none."""
    questions: list[Question]
    metrics: list[Metric]

    @property
    def prefix(self) -> str:
        """What the names of its measures begin with in logs."""
        return f"eval_{self.name}" if self.name else "eval"

    @property
    def label(self) -> str:
        """What the names of its measures begin with in results."""
        return f"{self.name}/" if self.name else ""


@dataclass(frozen=True)
class EvalReplies:
    """The replies to the questions of one evaluation set."""

    texts: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    """Each metric over all replies."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Each metric of each reply, where it has such."""


def select_eval_prompts(
    config: EvaluationConfig, heldout: Mapping[str, Iterable[Row]], sharding: str
) -> list[EvalPrompts]:
    """What a run answers of each evaluation set: all that is scored, or only what is shown.

    The only set has no name, as in the trainer's logs. A set without metrics is asked nothing, but
    for the first, whose samples are shown. Imports what
    the metrics need. Raises UserError for metrics that cannot compare with the set's replies, for a
    set that has none, and for a sharding under which nothing is generated.
    """
    found = []
    for number, (name, rows) in enumerate(heldout.items()):
        metrics = parse_metrics(config.sets.get(name, config.metrics), _metrics_key(config, name))
        limit = config.rows if metrics else config.samples if number == 0 else 0
        if not limit or _is_generation_refused(sharding, metrics):
            continue
        these = questions(rows, limit)
        if metrics and not these:
            label = f" {name}" if name else ""
            raise UserError(
                f"{_metrics_key(config, name)}: no row of the evaluation set{label} ends with a "
                "reply in words that could be compared with.\nUse an empty list for the loss alone."
            )
        prepare_metrics(metrics, [question.expected for question in these])
        found.append(EvalPrompts(name if len(heldout) > 1 else "", these, metrics))
    return found


def _metrics_key(config: EvaluationConfig, name: str) -> str:
    return f"trainer.evaluation.sets.{name}" if name in config.sets else METRICS_KEY


def _is_generation_refused(sharding: str, metrics: list[Metric]) -> bool:
    """Whether nothing is generated under a sharding; UserError where it has to be."""
    if sharding != "fsdp1":
        return False
    if metrics:
        raise UserError(
            "trainer.evaluation.metrics: replies are not generated under fsdp1, whose weights "
            "cannot be gathered once for all tokens.\nUse launch/fsdp2.yaml, or "
            "trainer.evaluation.metrics=[] for the loss alone."
        )
    return True


class ReplyGenerator:
    """Answers the held-out rows of a run with its model as it stands."""

    def __init__(
        self, trainer: Any, encoder: Any, config: EvaluationConfig, asked: list[EvalPrompts]
    ) -> None:
        """`encoder`: what makes the prompts, a `luthier.chat.ChatEncoder` or the like."""
        self.asked = asked
        self._trainer, self._encoder, self._config = trainer, encoder, config

    def to(self, asked: EvalPrompts, when: str) -> EvalReplies:
        """Answer a set's questions, greedily and shared out over the ranks, and score the replies.

        `when` is for the progress bar. Every rank gets all replies; UserError where a metric fails.
        """
        if not asked.questions:
            return EvalReplies()
        texts = self._texts(asked, when)
        replies = [
            Reply(text, question.expected, question.row)
            for text, question in zip(texts, asked.questions, strict=True)
        ]
        return _score_on_first_rank(asked.metrics, replies)

    def _texts(self, asked: EvalPrompts, when: str) -> list[str]:
        from accelerate import PartialState
        from tqdm import tqdm

        state, tokenizer = PartialState(), self._trainer.processing_class
        mine = asked.questions[state.process_index :: state.num_processes]
        name = f" ({asked.name})" if asked.name else ""
        with (
            tqdm(
                total=len(mine),
                desc=f"replies {when}{name}",
                unit="row",
                leave=False,
                disable=not state.is_main_process or self._trainer.args.disable_tqdm,
            ) as bar,
            gathered_weights(self._trainer) as model,
        ):
            ids = generate(
                model,
                [self._encoder.prompt(q.messages, tools=q.tools) for q in mine],
                stop_ids=self._encoder.stop_token_ids,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=self._config.max_new_tokens,
                batch_size=self._config.batch_size,
                on_batch=lambda rows: bar.update(rows),
            )
        return _gather_texts([tokenizer.decode(reply, skip_special_tokens=True) for reply in ids])


def _gather_texts(texts: list[str]) -> list[str]:
    """The texts of all ranks, in the order of the questions that were dealt out to them."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return texts
    first, step = state.process_index, state.num_processes
    numbered = gather_object([(first + n * step, text) for n, text in enumerate(texts)])
    return [text for _, text in sorted(numbered)]


def _score_on_first_rank(metrics: Sequence[Metric], replies: list[Reply]) -> EvalReplies:
    """Score on the first rank alone, so that all ranks act on the same numbers."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    texts = [reply.prediction for reply in replies]
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            measured = score_replies(metrics, replies)
            outcome = [EvalReplies(texts, measured.values, measured.rows)]
        except UserError as error:
            outcome = [error]
    (found,) = broadcast_object_list(outcome)
    if isinstance(found, UserError):
        raise found
    assert isinstance(found, EvalReplies)
    return found


def reply_rows(asked: EvalPrompts, answered: EvalReplies) -> list[dict[str, Any]]:
    """Questions with their replies and scores, for tables and files."""
    return [
        {
            **({"set": asked.name} if asked.name else {}),
            "prompt": question.messages[-1]["content"],
            "expected": question.expected,
            "reply": text,
            "scores": {name: scores[number] for name, scores in answered.scores.items()},
        }
        for number, (question, text) in enumerate(zip(asked.questions, answered.texts, strict=True))
    ]


# Held-out rows answered at every evaluation: metrics that choose a checkpoint or end a run.

EVALUATIONS_FILE = "evaluations.jsonl"
"""Where the replies of every evaluation are written, a reply a line."""


def set_best_model_metric(args: Any, config: RunConfig) -> None:
    """Say in the trainer's arguments which way the best checkpoint lies, if the user did not.

    transformers takes every name that does not end with `loss` for better the greater it is. With
    `patience` and no metric, the loss on held-out rows counts. Raises UserError for a metric that
    is neither good nor bad.
    """
    evaluation = config.trainer.evaluation
    if args.metric_for_best_model is None and evaluation.patience is not None:
        args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.metric_for_best_model is None or config.trainer.args.greater_is_better is not None:
        return
    found = best_metric(
        args.metric_for_best_model, evaluation.model_dump(), config.dataset.eval.sets
    )
    if found is not None:
        name, metrics = found
        args.greater_is_better = greater_is_better(metrics, name, "trainer.evaluation.metrics")


def add_evaluation_callbacks(
    trainer: Trainer, answers: ReplyGenerator, config: RunConfig, folder: Path
) -> "EvalRepliesCallback | None":
    """Give the trainer what `trainer.evaluation` has it do at its evaluations."""
    evaluation, during = config.trainer.evaluation, None
    if evaluation.when == "evaluations":
        during = EvalRepliesCallback(trainer, answers, config, folder)
        trainer.add_callback(during)
    if evaluation.patience is not None:
        # Behind the one that adds what it looks at.
        trainer.add_callback(EarlyStopping(evaluation.patience))
    return during


class EvalRepliesCallback(TrainerCallback):
    """Answers the rows of the set that was evaluated, and adds the metrics to its measures."""

    def __init__(
        self, trainer: Trainer, answers: ReplyGenerator, config: RunConfig, folder: Path
    ) -> None:
        self._trainer, self._answers, self._config = trainer, answers, config
        self._file = folder / EVALUATIONS_FILE
        self._last: dict[str, tuple[int, EvalReplies]] = {}

    def at(self, name: str, step: int) -> EvalReplies | None:
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

    def _answer(self, asked: EvalPrompts, state: Any) -> dict[str, float]:
        answered = self._answers.to(asked, f"at step {state.global_step}")
        self._last[asked.name] = state.global_step, answered
        results = {f"{asked.prefix}_{name}": value for name, value in answered.results.items()}
        # Past the trainer's own way of logging, which adds the means of what it has computed.
        Trainer.log(self._trainer, dict(results))
        if state.is_world_process_zero:
            self._write(asked, reply_rows(asked, answered), state.global_step)
        return results

    def _write(self, asked: EvalPrompts, rows: list[dict[str, Any]], step: int) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        trackers.log_replies(self._config, asked.name, rows, step)


class EarlyStopping(EarlyStoppingCallback):
    """Stops after evaluations without a better metric, and passes over the other sets' measures."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Count an evaluation that measured the metric."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
