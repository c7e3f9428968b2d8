"""What comes out of a run: its measures before and after, the model on disk, the summary."""

from typing import Any

from luthier.record.files import publish_folder, read_json, write_json, write_jsonl
from luthier.record.plot import plot_loss, read_metrics
from luthier.train import replies, report, trackers
from luthier.train.session import Session

Measure = dict[str, Any]


def before(session: Session) -> Measure:
    """The untrained model's measure; a run that goes on finds the one it took at its start."""
    path = session.folder / "before.json"
    measured: Measure | None = read_json(path)
    if measured is None:
        measured = measure(session, "before")
        if session.main:
            write_json(path, measured)
    return measured


def measure(session: Session, when: str) -> Measure:
    """The held-out loss and the scored replies of the model as it stands."""
    trainer, config = session.trainer, session.config.trainer.evaluation
    results: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        results["held_out_loss"] = _held_out_loss(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    texts = replies.answer(
        model, trainer.processing_class, session.encoder, config, session.questions, when
    ) if session.questions else []  # fmt: skip
    return {"results": results | replies.score(config, session.questions, texts), "replies": texts}


def _held_out_loss(trainer: Any) -> float:
    """The loss on the held-out rows, taken from the log where the last step was evaluated."""
    step = trainer.state.global_step
    logged = [
        r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r and r["step"] == step
    ]
    return float(logged[-1] if logged else trainer.evaluate()["eval_loss"])


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
        write_json(temporary / "chat.json", session.encoder.settings())
        publish_folder(temporary, target)
    trainer.accelerator.wait_for_everyone()


def conclude(session: Session, before: Measure, after: Measure, training_seconds: float) -> None:
    """Write replies, plot and record, tell the trackers, print the summary."""
    if not session.main:
        return
    folder, config = session.folder, session.config
    rows = _reply_rows(session, before, after)
    write_jsonl(folder / "replies.jsonl", rows)
    names = before["results"] | after["results"]
    results = {
        n: {"before": before["results"].get(n), "after": after["results"].get(n)} for n in names
    }
    plot_loss(
        read_metrics(folder / "metrics.jsonl"), config.recipe or folder.name, folder / "loss.png"
    )
    trackers.log_results(config, after["results"], rows)
    session.record.end("finished", results=results, training_seconds=round(training_seconds, 1))
    report.show_replies(rows, config.trainer.evaluation.samples)
    report.show_results(session.record.entries, folder)


def _reply_rows(session: Session, before: Measure, after: Measure) -> list[dict[str, Any]]:
    return [
        {
            "prompt": question.messages[-1]["content"],
            "expected": question.expected,
            "before": old,
            "after": new,
            "exact": new.strip() == question.expected.strip(),
        }
        for question, old, new in zip(
            session.questions, before["replies"], after["replies"], strict=True
        )
    ]
