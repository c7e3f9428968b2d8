"""What comes out of a run: its measures before and after, the model on disk, the summary."""

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from luthier.chat import ChatEncoder
from luthier.errors import UserError
from luthier.model.adapters import convert_to_plain_lora
from luthier.model.device import preserve_random_state
from luthier.record import checkpoints
from luthier.record.checkpoints import CheckpointLimits
from luthier.record.plots import plot_loss, read_metrics
from luthier.storage.atomic import publish_folder, read_json, write_json, write_jsonl
from luthier.train import console, trackers
from luthier.train.callbacks import StopCallback, TruncateLogsCallback
from luthier.train.evaluation import EvalPrompts
from luthier.train.session import TrainingSession
from luthier.train.signals import SIGNALS, STOPPED_EXIT_CODE, agree_on_signal, signal_name
from luthier.train.trainers.checkpoints import disk_full_message, is_disk_full

# What makes others' servers read and stop as the training did, beside a saved adapter or model.


def save_serving_files(folder: Path, trainer: Any, encoder: ChatEncoder) -> None:
    """Write the training's template with the tokenizer, and its stop tokens.

    A tokenizer keeps its own template where the config names another; and the token that ends a
    turn is often none of the base's end tokens, or an adapter's folder has no generation config
    at all.
    """
    tokenizer = copy.copy(trainer.processing_class)
    tokenizer.chat_template = encoder.settings()["template"]
    tokenizer.save_pretrained(folder)
    if trainer.model.can_generate():  # a model that scores says nothing
        _save_generation_config(
            folder, trainer.model.generation_config, encoder, tokenizer.pad_token_id
        )


def _save_generation_config(folder: Path, base: Any, encoder: ChatEncoder, pad: int | None) -> None:
    """Write a generation config with the base's settings and the training's stop tokens."""
    config = copy.deepcopy(base)
    stops = encoder.stop_token_ids
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    more = [end for end in own if end is not None and end not in stops]
    config.eos_token_id = [*stops, *more]
    config.pad_token_id = pad
    # Not `save_pretrained`, which refuses settings that do not go together, the base's own among
    # them.
    config.to_json_file(folder / "generation_config.json")


Measurement = dict[str, Any]
"""`results` by name, and for each set of answered rows, by its name, `replies` and `scores`."""


def measure_before_training(session: TrainingSession) -> Measurement:
    """The untrained model's measure; a run that goes on finds the one it took at its start."""
    path = session.folder / "before.json"
    measured: Measurement | None = read_json(path)
    if measured is None:
        if session.main:
            # Lines of a start that was killed before its measure was whole.
            for name in checkpoints.STEP_LOGS:
                (session.folder / name).unlink(missing_ok=True)
        for part in measure_in_parts(session, "before training"):
            measured = part()
        if session.main:
            write_json(path, measured)
    assert measured is not None
    return measured


def measure_in_parts(session: TrainingSession, when: str) -> Iterator[Callable[[], Measurement]]:
    """The measure of the model as it stands, part by part; the last one returns it whole.

    The first part is the held-out loss, and each of the others the scored replies to one set.
    """
    measured: Measurement = {"results": {}, "replies": {}, "scores": {}}
    step = loaded_weights_step(session.trainer)

    def loss() -> Measurement:
        measured["results"] |= _held_out_results(session, _evaluate_once(session, step))
        return measured

    def replies(asked: EvalPrompts) -> Measurement:
        answered = session.answered(asked, when, step)
        found = {f"{asked.label}{name}": value for name, value in answered.results.items()}
        measured["results"] |= found
        measured["replies"][asked.name] = answered.texts
        measured["scores"][asked.name] = answered.scores
        return measured

    yield loss
    for asked in session.answers.asked:
        yield partial(replies, asked)


def loaded_weights_step(trainer: Any) -> int:
    """The optimizer step whose weights the model has: the last one's, or the best checkpoint's."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return int(state.global_step)


def _evaluate_once(session: TrainingSession, step: int) -> dict[str, float]:
    """What an evaluation of these weights measured: the one in the log, or one that is made now."""
    trainer = session.trainer
    if trainer.eval_dataset is None:
        return {}
    logged: dict[str, float] = {}
    for row in trainer.state.log_history:
        logged |= row if row["step"] == step else {}
    if all(f"{_eval_prefix(name)}_runtime" in logged for name in _eval_set_names(trainer)):
        return logged
    measured: dict[str, float] = trainer.evaluate()
    _refuse_unmeasured_best_metric(trainer.args, measured)
    return measured


def _refuse_unmeasured_best_metric(args: Any, measured: dict[str, float]) -> None:
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


def _eval_set_names(trainer: Any) -> list[str]:
    """The names of the evaluation sets; the only one has none."""
    sets = trainer.eval_dataset
    return list(sets) if isinstance(sets, dict) else [""]


def _eval_prefix(name: str) -> str:
    return f"eval_{name}" if name else "eval"


def _held_out_results(session: TrainingSession, evaluated: dict[str, float]) -> dict[str, float]:
    """What the trainer measures of each evaluation set, by name."""
    trainer = session.trainer
    measures = [("held_out_loss", "loss")] if trainer.reports_eval_loss else []
    measures += [(name, name) for name in trainer.result_metrics]
    sets = _eval_set_names(trainer) if evaluated else []
    return {
        f"{name}/{ours}" if name else ours: float(evaluated[f"{_eval_prefix(name)}_{theirs}"])
        for name in sets
        for ours, theirs in measures
        if evaluated.get(f"{_eval_prefix(name)}_{theirs}") is not None
    }


def save_model(session: TrainingSession) -> None:
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
        convert_to_plain_lora(trainer.model, temporary)
        if session.encoder is not None:
            write_json(temporary / "chat.json", session.encoder.settings())
            save_serving_files(temporary, trainer, session.encoder)
        publish_folder(temporary, target)
    trainer.accelerator.wait_for_everyone()


def report_results(
    session: TrainingSession, before: Measurement, after: Measurement, training_seconds: float
) -> None:
    """Write replies, plot and record, tell the trackers, print the summary."""
    if not session.main:
        return
    folder, config = session.folder, session.config
    rows = [
        row for asked in session.answers.asked for row in _before_after_rows(asked, before, after)
    ]
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
        console.print_line(f"card      not written: {problem}")
    trackers.log_files(config, folder)
    console.print_replies(rows, config.trainer.evaluation.samples)
    console.print_results(session.record.entries, folder)


def _before_after_rows(
    asked: EvalPrompts, before: Measurement, after: Measurement
) -> list[dict[str, Any]]:
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


# The training of a session: from its newest checkpoint to its results, or to where it stops.

_EXIT_GRACE_SECONDS = 5.0
"""How long the other processes wait, so that a launcher does not end the first one too early."""


def fit(session: TrainingSession) -> int:
    """Answer, train, answer again, and write down what came out; return the exit code.

    Raises UserError where the disk is full.
    """
    trainer = session.trainer
    with _disk_full_as_user_error(session):
        resume = _choose_checkpoint(session)
        with preserve_random_state():
            before = measure_before_training(session)
        _prepare_trainer(session, resume)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.monotonic() - began
        stopped = trainer.stop_signal or _finish(session, before, seconds)
        if stopped:
            _report_stop(session, stopped)
    # The process group must be gone before the process is, or gloo may abort at exit.
    trainer.end()
    if stopped and not session.main:
        time.sleep(_EXIT_GRACE_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    return STOPPED_EXIT_CODE if stopped else 0


def _finish(session: TrainingSession, before: Measurement, seconds: float) -> int:
    """Measure, save and conclude; the signal's number where one came before the model was saved.

    The trained weights are then in a checkpoint, and the same command measures them.
    """
    for part in measure_in_parts(session, "after training"):
        stopped = agree_on_signal(session.trainer.accelerator)
        if stopped:
            _save_last_checkpoint(session.trainer)
            return stopped
        after = part()
    save_model(session)
    report_results(session, before, after, seconds)
    return 0


def _save_last_checkpoint(trainer: Any) -> None:
    """Take a checkpoint behind the last step, if there is none.

    Not where the best weights are back in place: they are those of another step.
    """
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not trainer.args.load_best_model_at_end and not last.is_dir():
        trainer.is_scheduled_save = False
        trainer._save_checkpoint(trainer.model, None)


def _choose_checkpoint(session: TrainingSession) -> Path | None:
    """The checkpoint to go on from; all processes agree on it."""
    folder = session.folder / "checkpoints"
    chosen: list[Path | None] = [None]
    if session.main:
        checkpoints.recover_checkpoints(folder)
        found = checkpoints.find_newest_checkpoint(folder)
        for sentence in found.passed_over:
            console.print_line(sentence)
        if found.path is not None:
            console.print_line(f"goes on from {found.path}")
        elif found.passed_over:
            console.print_line("there is no whole checkpoint, so the training begins again")
        chosen = [found.path]
    if session.trainer.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    _refuse_fewer_steps(session.trainer, chosen[0])
    return chosen[0]


def _refuse_fewer_steps(trainer: Any, resume: Path | None) -> None:
    """Stop where the run has taken more steps already than it is to have now."""
    step = 0 if resume is None else checkpoints.checkpoint_step(resume)
    if step and step > trainer.count_planned_steps():
        raise UserError(
            f"trainer.args: the run is at step {step} already ({resume}), and "
            f"{trainer.count_planned_steps()} steps are asked for.\nAsk for at least as many, "
            "choose another output_dir=..., or overwrite=true to begin anew."
        )


def _prepare_trainer(session: TrainingSession, resume: Path | None) -> None:
    """Give the trainer what it needs to stop and to go on; from here signals are only noted."""
    trainer, config = session.trainer, session.config
    trainer.checkpoint_limits = CheckpointLimits(
        trainer.args.save_total_limit, config.trainer.checkpoints.bytes
    )
    trainer.log_files = tuple(session.folder / name for name in checkpoints.STEP_LOGS)
    trainer.add_callback(TruncateLogsCallback(trainer, resume))
    trainer.add_callback(StopCallback(trainer))
    if session.main:
        session.record.note(from_step=checkpoints.checkpoint_step(resume) if resume else 0)
    SIGNALS.waits = True


def _report_stop(session: TrainingSession, number: int) -> None:
    """Say where the run stopped and how it goes on."""
    step, name = int(session.trainer.state.global_step), signal_name(number)
    if session.main:
        session.record.note(to_step=step, signal=name)
        session.record.end("stopped")
        console.print_line(
            f"stopped by {name} behind step {step}; the same command goes on from there"
        )


@contextmanager
def _disk_full_as_user_error(session: TrainingSession) -> Iterator[None]:
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
