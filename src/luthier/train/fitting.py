"""The training of a session: from its newest checkpoint to its results, or to where it stops."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from luthier.errors import UserError
from luthier.model.device import random_state_kept
from luthier.record import checkpoints
from luthier.record.checkpoints import Bounds
from luthier.train import finish, report
from luthier.train.continuing import Journals, Stopping
from luthier.train.full_disk import disk_full_message, is_disk_full
from luthier.train.session import Session
from luthier.train.stopping import SIGNALS, STOPPED, agreed, name_of

_SECONDS_TO_END = 5.0
"""How long the other processes wait, so that a launcher does not end the first one too early."""


def fit(session: Session) -> int:
    """Answer, train, answer again, and write down what came out; return the exit code.

    Raises UserError where the disk is full.
    """
    trainer = session.trainer
    with _disk_in_words(session):
        resume = _resumed(session)
        with random_state_kept():
            before = finish.measure_before(session)
        _prepare(session, resume)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.monotonic() - began
        stopped = trainer.stopped or _measured_or_stopped(session, before, seconds)
        if stopped:
            _leave(session, stopped)
    # The process group must be gone before the process is, or gloo may abort at exit.
    trainer.end()
    if stopped and not session.main:
        time.sleep(_SECONDS_TO_END if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    return STOPPED if stopped else 0


def _measured_or_stopped(session: Session, before: finish.Measure, seconds: float) -> int:
    """Measure, save and conclude; the signal's number where one came before the model was saved.

    The trained weights are then in a checkpoint, and the same command measures them.
    """
    for part in finish.measure_stepwise(session, "after training"):
        stopped = agreed(session.trainer.accelerator)
        if stopped:
            _checkpoint(session.trainer)
            return stopped
        after = part()
    finish.save(session)
    finish.conclude(session, before, after, seconds)
    return 0


def _checkpoint(trainer: Any) -> None:
    """Take a checkpoint behind the last step, if there is none.

    Not where the best weights are back in place: they are those of another step.
    """
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not trainer.args.load_best_model_at_end and not last.is_dir():
        trainer.planned = False
        trainer._save_checkpoint(trainer.model, None)


def _resumed(session: Session) -> Path | None:
    """The checkpoint to go on from; all processes agree on it."""
    folder = session.folder / "checkpoints"
    chosen: list[Path | None] = [None]
    if session.main:
        checkpoints.recover(folder)
        found = checkpoints.newest(folder)
        for sentence in found.passed_over:
            report.say(sentence)
        if found.path is not None:
            report.say(f"goes on from {found.path}")
        elif found.passed_over:
            report.say("there is no whole checkpoint, so the training begins again")
        chosen = [found.path]
    if session.trainer.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    _refuse_shorter(session.trainer, chosen[0])
    return chosen[0]


def _refuse_shorter(trainer: Any, resume: Path | None) -> None:
    """Stop where the run has taken more steps already than it is to have now."""
    if resume is not None and checkpoints.step_of(resume) > trainer.planned_steps():
        raise UserError(
            f"trainer.args: the run is at step {checkpoints.step_of(resume)} already ({resume}), "
            f"and {trainer.planned_steps()} steps are asked for.\nAsk for at least as many, choose "
            "another output_dir=..., or overwrite=true to begin anew."
        )


def _prepare(session: Session, resume: Path | None) -> None:
    """Give the trainer what it needs to stop and to go on; from here signals are only noted."""
    trainer, config = session.trainer, session.config
    trainer.bounds = Bounds(trainer.args.save_total_limit, config.trainer.checkpoints.bytes)
    trainer.journals = tuple(session.folder / name for name in checkpoints.NAMES)
    trainer.add_callback(Journals(trainer, resume))
    trainer.add_callback(Stopping(trainer))
    if session.main:
        session.record.note(from_step=checkpoints.step_of(resume) if resume else 0)
    SIGNALS.waits = True


def _leave(session: Session, number: int) -> None:
    """Say where the run stopped and how it goes on."""
    step, name = int(session.trainer.state.global_step), name_of(number)
    if session.main:
        session.record.note(to_step=step, signal=name)
        session.record.end("stopped")
        report.say(f"stopped by {name} behind step {step}; the same command goes on from there")


@contextmanager
def _disk_in_words(session: Session) -> Iterator[None]:
    """A disk that is full while anything else than a checkpoint is written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folder = session.folder / "checkpoints"
        if not is_disk_full(error, folder):
            raise
        raise UserError(disk_full_message(folder, "while the run wrote to its folder")) from error
