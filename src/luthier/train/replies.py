"""Held-out rows answered by the model under training, and their score."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.config.schema import EvaluationConfig
from luthier.errors import UserError
from luthier.infer.generate import generate
from luthier.infer.questions import Question, Row, questions
from luthier.metrics import Metric, Reply, parse_metrics, prepare_metrics, score_replies
from luthier.train.gathered import gathered

KEY = "trainer.evaluation.metrics"


@dataclass(frozen=True)
class Asked:
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
class Answered:
    """The replies to the questions of one evaluation set."""

    texts: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    """Each metric over all replies."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Each metric of each reply, where it has such."""


def asked(
    config: EvaluationConfig, heldout: Mapping[str, Iterable[Row]], sharding: str
) -> list[Asked]:
    """What a run answers of each evaluation set: all that is scored, or only what is shown.

    The only set has no name, as in the trainer's logs. A set without metrics is asked nothing, but
    for the first, whose samples are shown. Imports what
    the metrics need. Raises UserError for metrics that cannot compare with the set's replies, for a
    set that has none, and for a sharding under which nothing is generated.
    """
    found = []
    for number, (name, rows) in enumerate(heldout.items()):
        metrics = parse_metrics(config.sets.get(name, config.metrics), _key(config, name))
        limit = config.rows if metrics else config.samples if number == 0 else 0
        if not limit or _is_refused(sharding, metrics):
            continue
        these = questions(rows, limit)
        if metrics and not these:
            raise UserError(
                f"{_key(config, name)}: no row of the evaluation set{f' {name}' if name else ''} "
                "ends with a reply in words that could be compared with.\nUse an empty list for "
                "the loss alone."
            )
        prepare_metrics(metrics, [question.expected for question in these])
        found.append(Asked(name if len(heldout) > 1 else "", these, metrics))
    return found


def _key(config: EvaluationConfig, name: str) -> str:
    return f"trainer.evaluation.sets.{name}" if name in config.sets else KEY


def _is_refused(sharding: str, metrics: list[Metric]) -> bool:
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


class Answers:
    """Answers the held-out rows of a run with its model as it stands."""

    def __init__(
        self, trainer: Any, encoder: Any, config: EvaluationConfig, asked: list[Asked]
    ) -> None:
        """`encoder`: what makes the prompts, a `luthier.chat.ChatEncoder` or the like."""
        self.asked = asked
        self._trainer, self._encoder, self._config = trainer, encoder, config

    def to(self, asked: Asked, when: str) -> Answered:
        """Answer a set's questions, greedily and shared out over the ranks, and score the replies.

        `when` is for the progress bar. Every rank gets all replies; UserError where a metric fails.
        """
        if not asked.questions:
            return Answered()
        texts = self._texts(asked, when)
        replies = [
            Reply(text, question.expected, question.row)
            for text, question in zip(texts, asked.questions, strict=True)
        ]
        return _scored(asked.metrics, replies)

    def _texts(self, asked: Asked, when: str) -> list[str]:
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
            gathered(self._trainer) as model,
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
        return _from_all([tokenizer.decode(reply, skip_special_tokens=True) for reply in ids])


def _from_all(texts: list[str]) -> list[str]:
    """The texts of all ranks, in the order of the questions that were dealt out to them."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return texts
    first, step = state.process_index, state.num_processes
    numbered = gather_object([(first + n * step, text) for n, text in enumerate(texts)])
    return [text for _, text in sorted(numbered)]


def _scored(metrics: Sequence[Metric], replies: list[Reply]) -> Answered:
    """Score on the first rank alone, so that all ranks act on the same numbers."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    texts = [reply.prediction for reply in replies]
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            measured = score_replies(metrics, replies)
            outcome = [Answered(texts, measured.values, measured.rows)]
        except UserError as error:
            outcome = [error]
    (found,) = broadcast_object_list(outcome)
    if isinstance(found, UserError):
        raise found
    assert isinstance(found, Answered)
    return found


def rows_of(asked: Asked, answered: Answered) -> list[dict[str, Any]]:
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
