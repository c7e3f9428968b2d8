"""What comes out of a run: its measures before and after, the model on disk, the summary."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from luthier.errors import UserError
from luthier.model.adapters import make_plain
from luthier.record import checkpoints
from luthier.record.plots import plot_loss, read_metrics
from luthier.storage.atomic import publish_folder, read_json, write_json, write_jsonl
from luthier.train import report, trackers
from luthier.train.replies import Asked
from luthier.train.served import write_served
from luthier.train.session import Session

Measure = dict[str, Any]
"""`results` by name, and for each set of answered rows, by its name, `replies` and `scores`."""


def measure_before(session: Session) -> Measure:
    """The untrained model's measure; a run that goes on finds the one it took at its start."""
    path = session.folder / "before.json"
    measured: Measure | None = read_json(path)
    if measured is None:
        if session.main:
            # Lines of a start that was killed before its measure was whole.
            for name in checkpoints.NAMES:
                (session.folder / name).unlink(missing_ok=True)
        for part in measure_stepwise(session, "before training"):
            measured = part()
        if session.main:
            write_json(path, measured)
    assert measured is not None
    return measured


def measure_stepwise(session: Session, when: str) -> Iterator[Callable[[], Measure]]:
    """The measure of the model as it stands, part by part; the last one returns it whole.

    The first part is the held-out loss, and each of the others the scored replies to one set.
    """
    measured: Measure = {"results": {}, "replies": {}, "scores": {}}
    step = weights_step(session.trainer)

    def loss() -> Measure:
        measured["results"] |= _held_out(session, _evaluated(session, step))
        return measured

    def replies(asked: Asked) -> Measure:
        answered = session.answered(asked, when, step)
        found = {f"{asked.label}{name}": value for name, value in answered.results.items()}
        measured["results"] |= found
        measured["replies"][asked.name] = answered.texts
        measured["scores"][asked.name] = answered.scores
        return measured

    yield loss
    for asked in session.answers.asked:
        yield partial(replies, asked)


def weights_step(trainer: Any) -> int:
    """The optimizer step whose weights the model has: the last one's, or the best checkpoint's."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return int(state.global_step)


def _evaluated(session: Session, step: int) -> dict[str, float]:
    """What an evaluation of these weights measured: the one in the log, or one that is made now."""
    trainer = session.trainer
    if trainer.eval_dataset is None:
        return {}
    logged: dict[str, float] = {}
    for row in trainer.state.log_history:
        logged |= row if row["step"] == step else {}
    if all(f"{_prefix(name)}_runtime" in logged for name in _sets(trainer)):
        return logged
    measured: dict[str, float] = trainer.evaluate()
    _refuse_unknown_best(trainer.args, measured)
    return measured


def _refuse_unknown_best(args: Any, measured: dict[str, float]) -> None:
    """Stop, before the first step, where the best checkpoint is chosen by what nobody measures."""
    name = args.metric_for_best_model
    if name is None or args.eval_strategy == "no":
        return
    if f"eval_{name.removeprefix('eval_')}" not in measured:
        known = ", ".join(sorted(key.removeprefix("eval_") for key in measured))
        raise UserError(
            f"trainer.args.metric_for_best_model={name}: no evaluation measures it. "
            f"Measured are: {known}."
        )


def _sets(trainer: Any) -> list[str]:
    """The names of the evaluation sets; the only one has none."""
    sets = trainer.eval_dataset
    return list(sets) if isinstance(sets, dict) else [""]


def _prefix(name: str) -> str:
    return f"eval_{name}" if name else "eval"


def _held_out(session: Session, evaluated: dict[str, float]) -> dict[str, float]:
    """What the trainer measures of each evaluation set, by name."""
    trainer = session.trainer
    measures = [("held_out_loss", "loss")] if trainer.loss_shown else []
    measures += [(name, name) for name in trainer.shown]
    sets = _sets(trainer) if evaluated else []
    return {
        f"{name}/{ours}" if name else ours: float(evaluated[f"{_prefix(name)}_{theirs}"])
        for name in sets
        for ours, theirs in measures
        if evaluated.get(f"{_prefix(name)}_{theirs}") is not None
    }


def save(session: Session) -> None:
    """Write the adapter or model, the tokenizer with its template, and the chat settings."""
    trainer, target = session.trainer, session.folder / "model"
    temporary = session.folder / ".model.tmp"
    # Sharded weights are gathered on all ranks, so every rank takes part in the writing.
    trainer.save_model(str(temporary))
    if session.main:
        # A pickle of this machine's paths, and a model card of blanks to fill in.
        for name in ("training_args.bin", "README.md"):
            (temporary / name).unlink(missing_ok=True)
        # TRL's copy of the adapter as it was at first, which some losses compare with.
        shutil.rmtree(temporary / "ref", ignore_errors=True)
        make_plain(trainer.model, temporary)
        if session.encoder is not None:
            write_json(temporary / "chat.json", session.encoder.settings())
            write_served(temporary, trainer, session.encoder)
        publish_folder(temporary, target)
    trainer.accelerator.wait_for_everyone()


def conclude(session: Session, before: Measure, after: Measure, training_seconds: float) -> None:
    """Write replies, plot and record, tell the trackers, print the summary."""
    if not session.main:
        return
    folder, config = session.folder, session.config
    rows = [row for asked in session.answers.asked for row in _reply_rows(asked, before, after)]
    write_jsonl(folder / "replies.jsonl", rows)
    names = before["results"] | after["results"]
    results = {
        n: {"before": before["results"].get(n), "after": after["results"].get(n)} for n in names
    }
    plot_loss(
        read_metrics(folder / "metrics.jsonl"), config.recipe or folder.name, folder / "loss.png"
    )
    trackers.log_results(config, after["results"], rows)
    seconds = round(session.record.entries.get("training_seconds", 0) + training_seconds, 1)
    session.record.end("finished", results=results, training_seconds=seconds)
    problem = session.after_save(folder) if session.after_save else None
    if problem:
        report.say(f"card      not written: {problem}")
    trackers.log_files(config, folder)
    report.show_replies(rows, config.trainer.evaluation.samples)
    report.show_results(session.record.entries, folder)


def _reply_rows(asked: Asked, before: Measure, after: Measure) -> list[dict[str, Any]]:
    """A set's questions with the replies and the scores before and after training."""
    old, new = (
        {part: measured[part][asked.name] for part in ("replies", "scores")}
        for measured in (before, after)
    )
    return [
        {
            **({"set": asked.name} if asked.name else {}),
            "prompt": question.messages[-1]["content"],
            "expected": question.expected,
            "before": old["replies"][number],
            "after": new["replies"][number],
            "scores": {
                name: {"before": old["scores"][name][number], "after": scores[number]}
                for name, scores in new["scores"].items()
            },
        }
        for number, question in enumerate(asked.questions)
    ]
