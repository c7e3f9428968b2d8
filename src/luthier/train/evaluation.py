"""Held-out rows answered by the model under training: their scores, and what these decide."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from luthier.config.cross_checks import find_best_metric
from luthier.config.schema import EvaluationConfig, RunConfig
from luthier.data.batching.image_collators import ImageInputs
from luthier.data.formats.image_parts import image_parts
from luthier.data.images.decode import decode_stored_image
from luthier.data.images.reader import ImageRef
from luthier.errors import UserError
from luthier.infer.generate import ImagePromptInputs, generate
from luthier.infer.questions import Answer, Question, Row, decode_answer, read_questions, turn_text
from luthier.metrics import (
    Metric,
    Prediction,
    greater_is_better,
    parse_metrics,
    prepare_metrics,
    score_replies,
)
from luthier.model.varlen_attention import attention_by_masks
from luthier.terminal import ProgressReport
from luthier.train import trackers

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS_KEY = "trainer.evaluation.metrics"
EVALUATIONS_FILE = "evaluations.jsonl"
"""The file of a run's folder with the replies of every evaluation, a reply a line."""


@dataclass(frozen=True)
class EvalPrompts:
    """The rows of one evaluation set that are answered, and what measures the replies."""

    name: str
    """The set's name; the main set has none."""
    questions: list[Question]
    metrics: list[Metric]

    @property
    def prefix(self) -> str:
        """The beginning of the names of its measures in logs."""
        return f"eval_{self.name}" if self.name else "eval"

    @property
    def label(self) -> str:
        """The beginning of the names of its measures in a run's results."""
        return f"{self.name}/" if self.name else ""


@dataclass(frozen=True)
class EvalReplies:
    """The replies to the questions of one evaluation set."""

    texts: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    """Each metric over all replies."""
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Each metric of each reply, for metrics that have one; None where it does not score it."""


def select_eval_prompts(
    config: EvaluationConfig, heldout: Mapping[str, Iterable[Row]]
) -> list[EvalPrompts]:
    """Return what a run answers of each evaluation set: all that is scored, or a few samples.

    `heldout` has the rows of each set by its name; the only set has no name in the result, as in
    the trainer's logs. A set without metrics is not answered, but for the first, whose samples are
    shown. What the metrics need is imported. Raises UserError for metrics that cannot compare with
    the set's replies, and for a set that has none.
    """
    prompt_sets = []
    for number, (name, rows) in enumerate(heldout.items()):
        key = f"trainer.evaluation.sets.{name}" if name in config.sets else METRICS_KEY
        metrics = parse_metrics(config.sets.get(name, config.metrics), key)
        limit = config.rows if metrics else config.samples if number == 0 else 0
        if not limit:
            continue
        selected = read_questions(rows, limit, metrics)
        _check_scored(metrics, selected, key, name)
        # Before the first step, so that a metric that cannot work ends the run here and not hours
        # later.
        expected = [question.expected for question in selected]
        prepare_metrics(metrics, [text for text in expected if text is not None])
        prompt_sets.append(EvalPrompts(name if len(heldout) > 1 else "", selected, metrics))
    return prompt_sets


_EXAMPLE_CHARS = 400
"""A longer prompt is no example."""


def select_example(prompt_sets: Sequence[EvalPrompts]) -> str:
    """Return a prompt that shows how the trained model is asked, for its model card.

    It is the first short one of the held-out rows that is a single message of the user; empty
    where there is none.
    """
    for messages in (question.messages for each in prompt_sets for question in each.questions):
        roles = [message["role"] for message in messages if message["role"] != "system"]
        text = turn_text(messages[-1])
        if roles == ["user"] and 0 < len(text) <= _EXAMPLE_CHARS:
            return text
    return ""


def _check_scored(
    metrics: list[Metric], questions: list[Question], key: str, set_name: str
) -> None:
    """Raise UserError for a metric that no row of an evaluation set has something for."""
    for metric in metrics:
        if not any(metric.takes(question.prediction("", {})) for question in questions):
            label = f" {set_name}" if set_name else ""
            has_words = metric.takes(Prediction("", ""))
            lacking = "ends with a reply in words" if has_words else "has tools or a call"
            raise UserError(
                f"{key}: no row of the evaluation set{label} {lacking} that {metric.name} could "
                "compare with.\nUse an empty list for the loss alone."
            )


@dataclass(frozen=True)
class QuestionImages:
    """Makes what a model takes for the images of questions."""

    processor: ImageInputs
    """The model's processor."""
    read_image: Callable[[ImageRef], bytes]
    """Returns the bytes of an image that a row refers to."""

    def bind(self, questions: Sequence[Question]) -> ImagePromptInputs:
        """Return what makes the inputs of some of these questions, by their numbers."""

        def make(numbers: Sequence[int], input_ids: Any) -> dict[str, Any]:
            pixels = self.processor.pixel_inputs([self._open(questions[n]) for n in numbers])
            return pixels | self.processor.token_type_inputs(input_ids) if pixels else {}

        return make

    def _open(self, question: Question) -> "list[Image]":
        parts = image_parts({"messages": question.messages})
        return [decode_stored_image(self.read_image(part["image"])) for part in parts]


class ReplyGenerator:
    """Answers the held-out rows of a run with its model as it stands."""

    def __init__(
        self,
        trainer: Any,
        encoder: Any,
        config: EvaluationConfig,
        prompt_sets: list[EvalPrompts],
        images: "QuestionImages | None" = None,
    ) -> None:
        """`encoder` makes the prompts: a `luthier.chat.ChatEncoder`, or what has its `prompt`.

        `images` makes the inputs of the questions' pictures; None where no row has one.
        """
        self.prompt_sets = prompt_sets
        self._trainer, self._encoder, self._config = trainer, encoder, config
        self._images = images

    def generate_replies(self, prompts: EvalPrompts, when: str) -> EvalReplies:
        """Answer a set's questions, greedily and shared out over the ranks, and score the replies.

        `when` is for the progress bar. Every rank gets all replies; UserError where a metric fails.
        """
        if not prompts.questions:
            return EvalReplies()
        answers = self._generate_answers(prompts, when)
        replies = [
            question.prediction(text, message)
            for (text, message), question in zip(answers, prompts.questions, strict=True)
        ]
        return _score_on_first_rank(prompts.metrics, replies)

    def _generate_answers(self, prompts: EvalPrompts, when: str) -> list[Answer]:
        """Return the text of each reply, and the message that it is."""
        from accelerate import PartialState

        state, tokenizer = PartialState(), self._trainer.processing_class
        is_main_process = state.is_main_process
        # Every n-th question is this rank's.
        rank_questions = prompts.questions[state.process_index :: state.num_processes]
        set_name = f" ({prompts.name})" if prompts.name else ""
        with (
            ProgressReport(
                len(rank_questions), f"replies {when}{set_name}", is_silent=not is_main_process
            ) as bar,
            gathered_weights(self._trainer) as model,
            attention_by_masks(model),
        ):
            token_ids = generate(
                model,
                [self._encoder.prompt(**question.prompt) for question in rank_questions],
                stop_ids=self._encoder.stop_token_ids,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=self._config.max_new_tokens,
                batch_size=self._config.batch_size,
                on_batch=lambda rows: bar.update(rows),
                image_inputs=None if self._images is None else self._images.bind(rank_questions),
            )
        longest = self._config.max_new_tokens
        return _gather_answers(
            [
                decode_answer(self._encoder, tokenizer, ids, len(ids) < longest, question)
                for ids, question in zip(token_ids, rank_questions, strict=True)
            ]
        )


def _gather_answers(answers: list[Answer]) -> list[Answer]:
    """Return the answers of all ranks, in the order of the questions dealt out to them."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return answers
    rank, ranks = state.process_index, state.num_processes
    # `gather_object` lays the ranks' lists end to end; the numbers put the texts back into order.
    numbered = gather_object([(rank + n * ranks, answer) for n, answer in enumerate(answers)])
    return [answer for _, answer in sorted(numbered, key=lambda pair: pair[0])]


def _score_on_first_rank(metrics: Sequence[Metric], replies: list[Prediction]) -> EvalReplies:
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
            # Raised on all ranks: the others would wait for the first one for ever.
            outcome = [error]
    (scored,) = broadcast_object_list(outcome)
    if isinstance(scored, UserError):
        raise scored
    assert isinstance(scored, EvalReplies)
    return scored


@contextmanager
def gathered_weights(trainer: Any) -> Iterator[Any]:
    """Yield the trainer's model with all its weights on every rank within the block.

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

    `reshards` is what its `fully_shard` was told as `reshard_after_forward`.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    was_training = model.training
    for module in sharded_modules:
        # One by one: `recurse` would set the modules within each of them again and again.
        module.set_reshard_after_forward(False, recurse=False)
    try:
        with torch.no_grad():
            # One token: a rank without a question takes part in the gathering, too.
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            decoder = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
            # Without a cache, as losses call it: a tower is gathered then, too.
            model.eval()(input_ids=token, use_cache=False, **decoder)
        yield
    finally:
        model.train(was_training)
        for module in sharded_modules:
            # What stayed gathered would take the memory of the whole model in the next training
            # step.
            module.reshard()
            module.set_reshard_after_forward(reshards, recurse=False)


def set_best_model_metric(args: Any, config: RunConfig) -> None:
    """Set in the trainer's arguments which way the best checkpoint lies, if the user did not.

    transformers takes every name that does not end with `loss` for better the greater it is. With
    `patience` and no metric, the loss on held-out rows counts. Raises UserError for a metric that
    is neither good nor bad.
    """
    evaluation = config.trainer.evaluation
    if args.metric_for_best_model is None and evaluation.patience is not None:
        args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.metric_for_best_model is None or config.trainer.args.greater_is_better is not None:
        return
    best = find_best_metric(
        args.metric_for_best_model, evaluation.model_dump(), config.dataset.eval.sets
    )
    if best is not None:
        name, metrics = best
        args.greater_is_better = greater_is_better(metrics, name, METRICS_KEY)


def add_evaluation_callbacks(
    trainer: Trainer, reply_generator: ReplyGenerator, config: RunConfig, folder: Path
) -> "EvalRepliesCallback | None":
    """Give the trainer what `trainer.evaluation` has it do at its evaluations.

    Returns the callback that answers at each of them; None where that is not configured.
    """
    evaluation, callback = config.trainer.evaluation, None
    if evaluation.when == "evaluations":
        callback = EvalRepliesCallback(trainer, reply_generator, config, folder)
        trainer.add_callback(callback)
    if evaluation.patience is not None:
        # Behind the one that adds what it looks at.
        trainer.add_callback(Patience(evaluation.patience))
    return callback


class EvalRepliesCallback(TrainerCallback):
    """Answers the rows of the set that was evaluated, and adds the metrics to its measures."""

    def __init__(
        self, trainer: Trainer, reply_generator: ReplyGenerator, config: RunConfig, folder: Path
    ) -> None:
        self._trainer, self._reply_generator, self._config = trainer, reply_generator, config
        self._file = folder / EVALUATIONS_FILE
        self._last: dict[str, tuple[int, EvalReplies]] = {}

    def replies_at(self, name: str, step: int) -> EvalReplies | None:
        """Return the last replies to a set's questions; None if they are not of this step."""
        last_step, replies = self._last.get(name, (None, None))
        return replies if last_step == step else None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the metrics, in place: the trainer chooses the best checkpoint by what is there."""
        for prompts in self._reply_generator.prompt_sets:
            # One evaluation of several sets comes here once for each of them.
            if f"{prompts.prefix}_runtime" in metrics:
                metrics |= self._answer(prompts, state)

    def _answer(self, prompts: EvalPrompts, state: Any) -> dict[str, float]:
        step = state.global_step
        replies = self._reply_generator.generate_replies(prompts, f"at step {step}")
        self._last[prompts.name] = step, replies
        results = {f"{prompts.prefix}_{name}": value for name, value in replies.results.items()}
        # Past the trainer's own way of logging, which adds the means of what it has computed.
        Trainer.log(self._trainer, dict(results))
        if state.is_world_process_zero:
            rows = reply_rows(prompts, replies)
            with self._file.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
            trackers.log_replies(self._config, prompts.name, rows, step)
        return results


def reply_rows(prompts: EvalPrompts, replies: EvalReplies) -> list[dict[str, Any]]:
    """Return a set's prompts with their replies and scores, for tables and files."""
    rows = []
    for number, question in enumerate(prompts.questions):
        row = {
            "prompt": turn_text(question.messages[-1]),
            "expected": question.expected_text,
            "reply": replies.texts[number],
            "scores": {name: scores[number] for name, scores in replies.scores.items()},
        }
        rows.append({"set": prompts.name} | row if prompts.name else row)
    return rows


class Patience(EarlyStoppingCallback):
    """Stops after evaluations without a better metric, and passes over the other sets' measures.

    Checkpoints keep its count under the name of this class, so the name must stay.
    """

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Count an evaluation that measured the metric."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
