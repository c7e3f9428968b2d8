"""Find the models to measure, what they are compared with, and measure those that write."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Union

from luthier.config.schema import RunConfig
from luthier.config.trust import NO_TRUST, Trust
from luthier.errors import UserError
from luthier.evaluate.likelihood import ModelScores, compute_losses
from luthier.evaluate.rows import (
    ChatRowBuilder,
    EvaluationRows,
    EvaluationSet,
    RowBuilder,
    TargetRowBuilder,
    metrics_of_run,
    rows_with_replies,
)
from luthier.infer.llm import LLM
from luthier.infer.questions import decode_answer
from luthier.metrics import Metric, MetricScores, score_replies
from luthier.model.adapters import HEAD_TASKS
from luthier.model.artifact import find_artifact
from luthier.terminal import ProgressReport

if TYPE_CHECKING:
    from luthier.evaluate.heads import HeadModel


def measure_model(
    llm: LLM, items: EvaluationRows, metrics: Sequence[Metric], settings: dict[str, Any]
) -> ModelScores:
    """Measure a loaded model as it answers now.

    Without `metrics` it is the perplexity alone. `settings` are those of generation, and
    `batch_size`.
    Raises UserError where a metric fails and for rows that the model cannot read.
    """
    total = sum(len(item.sequences) for item in items.rows)
    with ProgressReport(total, "likelihood", "sequences") as bar:
        losses = compute_losses(llm.model, items.rows, bar.update, llm.image_inputs)
    # Without a metric no replies are generated: they take most of the time of an evaluation.
    asked = items.asked if metrics else []
    if not asked:
        return ModelScores(losses, [], MetricScores({}))
    with ProgressReport(len(asked), "replies") as bar:
        replies = llm.replies(
            [question.prompt for _, question in asked], places=[row.where for row, _ in asked],
            on_replies=lambda number, replies: bar.update(1), **settings,
        )  # fmt: skip
    answers = [
        decode_answer(llm.prompter, llm.tokenizer, reply.ids, reply.finish == "stop", question)
        for reply, (_, question) in zip(replies, asked, strict=True)
    ]
    predictions = [
        question.prediction(text, message)
        for (text, message), (_, question) in zip(answers, asked, strict=True)
    ]
    scores = score_replies(metrics, predictions)
    # Turns of one row are drawn together: what makes the row hard makes all of them hard.
    numbers = {id(row): number for number, row in enumerate(items.rows)}
    scored = scores.by_row([numbers[id(row)] for row, _ in asked])
    return ModelScores(losses, [text for text, _ in answers], scored)


class WritingModel(LLM):
    """A model that writes."""

    def maker(self, config: RunConfig | None) -> RowBuilder:
        """Return what encodes rows for this model; `config` is that of the run, if there is one."""
        if self.artifact.task == "SEQ_2_SEQ_LM":
            if config is None:
                return TargetRowBuilder(self.tokenizer, None, "drop")
            return TargetRowBuilder(self.tokenizer, config.chat.max_length, config.chat.on_long)
        # The encoder of the loaded model has the template and date of the training, and a base that
        # stands beside a run gets the same.
        settings = self.encoder.settings() if self.has_template else None
        images = self.encoder.images if self.has_template else None
        stride = 0 if config is None else config.dataset.stride
        return ChatRowBuilder(self.tokenizer, settings, stride, self.context, images)

    def set_of(
        self, items: EvaluationRows, metrics: list[Metric] | None, config: RunConfig | None
    ) -> EvaluationSet:
        """Return the rows with these metrics; None stands for the run's own."""
        metrics_used = metrics_of_run(config, items.name) if metrics is None else metrics
        return rows_with_replies(items, metrics_used)

    def measure(self, each: EvaluationSet, settings: dict[str, Any]) -> ModelScores:
        """Return the model's losses and scored replies, as it answers now."""
        return measure_model(self, each.items, each.metrics, settings)

    @property
    def alphabet(self) -> Any:
        """What another model must share for its loss to be of the same: tokens."""
        return self.tokenizer.get_vocab()


MeasuredModel = Union[WritingModel, "HeadModel"]


def find_models(
    word: str,
    base: str | None,
    against: str | None,
    alone: bool,
    options: Mapping[str, Any],
    trust: Trust = NO_TRUST,
) -> tuple[MeasuredModel, MeasuredModel | None]:
    """Return the model that is typed and what it is compared with, neither loaded yet.

    The second is `against`, else what the model began with: itself where that is an adapter's base,
    None where there is nothing. `trust` is what may run of the code that the runs' configs name.
    Raises UserError for words that name no models, and for two models
    that do different things.
    """
    model = _subject(word, options, base, trust)
    if alone:
        return model, None
    if against is not None:
        return model, _alike(model, _subject(against, options, None, trust))
    artifact = model.artifact
    if artifact.task in HEAD_TASKS:
        # The base has no head for these labels: it would be a random one.
        return model, None
    # The adapter is switched off for the base's turn, so one model in memory is both.
    if artifact.adapter is not None:
        return model, model
    if artifact.config is None:
        return model, None
    other = _subject(artifact.config.model.path, options, None, trust)
    # The base is asked in the words of the training: its own template may be another one.
    base_config = artifact.config.model.model_copy(update={"tokenizer": artifact.base.tokenizer})
    other.artifact = replace(
        other.artifact, chat=artifact.chat, base=base_config, config=artifact.config
    )
    return model, other


def check_comparable(
    model: MeasuredModel, theirs: Any, mine: list[EvaluationSet], its: list[EvaluationSet]
) -> None:
    """Raise UserError where the numbers of two models cannot be put beside each other.

    `theirs` is the alphabet of the other one, whose rows are `its`.
    """
    # A loss per token depends on how long the tokens are: another tokenizer, another number.
    if model.alphabet != theirs:
        difference = (
            "reads other tokens" if isinstance(model, WritingModel) else "knows other labels"
        )
        raise UserError(
            f"{model.artifact.name} {difference}, so the losses of the two say nothing beside each "
            "other. "
            "Measure each with --alone."
        )
    for evaluation_set, other in zip(mine, its, strict=True):
        rows, others = evaluation_set.items.rows, other.items.rows
        # Paired differences need the same rows: a template may cut or drop one that the other
        # keeps.
        if [item.where for item in rows] != [item.where for item in others]:
            raise UserError(
                f"{evaluation_set.items.name}: {len(rows):,} rows make tokens for the one model "
                "and "
                f"{len(others):,} for the other. Measure each with --alone."
            )


def _subject(
    word: str, options: Mapping[str, Any], base: str | None, trust: Trust
) -> MeasuredModel:
    artifact = find_artifact(word, base, trust)
    if artifact.task not in HEAD_TASKS:
        return WritingModel(artifact, **options)
    from luthier.evaluate.heads import HeadModel

    return HeadModel(artifact, **options)


def _alike(model: MeasuredModel, other: MeasuredModel) -> MeasuredModel:
    """Return `other`; UserError where the two models do different things."""
    if other.artifact.task != model.artifact.task:
        raise UserError(
            f"--against {other.artifact.name}: this model does something else than "
            f"{model.artifact.name}, so no number of the two can be compared."
        )
    return other
