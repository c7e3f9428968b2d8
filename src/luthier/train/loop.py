"""The training of a run: measure, train, measure again, save and report."""

import copy
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from typing_extensions import TypedDict

from luthier.chat import ChatEncoder
from luthier.config.renamed_settings import with_new_result_names
from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.infer.questions import turn_text
from luthier.model.adapters import convert_to_plain_lora
from luthier.model.device import preserve_random_state
from luthier.model.model_files import LOADER_FILE
from luthier.model.processor import ProcessorFile, find_processor_files, has_other_inputs
from luthier.model.response_template import choose_response_template
from luthier.record import checkpoints
from luthier.record.checkpoints import CheckpointLimits
from luthier.record.plots import plot_loss
from luthier.record.record import RunRecord, hash_logs
from luthier.record.run_dir import discard_replaced_run
from luthier.redaction import redact, redact_chat
from luthier.storage.atomic import write_json, write_jsonl
from luthier.storage.manifest import compute_seal
from luthier.storage.output_folder import publish_folder, seal_model
from luthier.storage.typed_files import DamagedFileError, load_json
from luthier.terminal import pluralize
from luthier.train import console, trackers
from luthier.train.arguments import run_title
from luthier.train.callbacks import RestoreCountersCallback, StopCallback
from luthier.train.evaluation import (
    EvalPrompts,
    EvalReplies,
    EvalRepliesCallback,
    ReplyGenerator,
)
from luthier.train.launch.rank_agreement import describe_ranks_without
from luthier.train.methods.encoders import read_saved_settings
from luthier.train.signals import SIGNALS, STOPPED_EXIT_CODE, agree_on_signal, signal_name
from luthier.train.trainers.checkpoints import report_full_disk

# torchrun ends all processes as soon as one of them fails, so those that have nothing left to write
# wait this long for the first one.
_EXIT_GRACE_SECONDS = 5.0

AfterSave = Callable[[Path], str | None]
"""Takes the folder of a finished run; returns why something could not be written, or None."""


@dataclass(frozen=True)
class TrainingSession:
    """All that takes part in one training, built and checked, before the first step."""

    config: RunConfig
    folder: Path
    record: RunRecord
    is_main_process: bool
    encoder: ChatEncoder | None
    """None for a method that reads no conversations."""
    trainer: Any
    """The method's; a `transformers.Trainer`."""
    reply_generator: ReplyGenerator
    replies_callback: EvalRepliesCallback | None = None
    """What answers at every evaluation, where `trainer.evaluation.when` says so."""
    after_save: AfterSave | None = None
    """What is called with the folder of the finished run; None calls nothing."""


@dataclass(frozen=True)
class RunOutcome:
    """How a training ended, and what is printed of it last."""

    exit_code: int
    stopped_step: int | None = None
    """The step after which a signal stopped it; None for one that came to its end."""
    reply_rows: list[dict[str, Any]] = field(default_factory=list)
    """The prompts that were answered, with the replies before and after training."""


class Measurement(TypedDict):
    """How good the model is at one point of a run."""

    results: dict[str, float]
    """Losses and metrics by name."""
    replies: dict[str, list[str]]
    """The replies to each set of evaluation prompts, by the set's name."""
    scores: dict[str, Mapping[str, Sequence[float | None]]]
    """Each metric of each reply, by the set's name and the metric's."""


class StartMeasurement(Measurement):
    """The content of `before.json`: the measurement of the untrained model."""

    logs: NotRequired[dict[str, str]]
    """The text of each log of the run behind the measurement, by its name; an older luthier wrote
    none."""
    seal: NotRequired[str]
    """The hash of all the rest."""


def fit(session: TrainingSession) -> RunOutcome:
    """Measure, train, measure again, save and record; return how it ended.

    A run that was stopped resumes from its newest checkpoint. Raises UserError where the disk is
    full.
    """
    trainer = session.trainer
    with report_full_disk(session.folder / "checkpoints", "while the run wrote to its folder"):
        checkpoint = _choose_checkpoint(session)
        start = MeasureStartCallback(session, checkpoint)
        # Sharded weights compute only inside the loop: accelerate 1.15 shards a model together with
        # its optimizer, and refuses it alone.
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.add_callback(start)
        else:
            start.measure()
        _prepare_trainer(session, checkpoint)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.monotonic() - began - start.seconds_in_loop
        after = None if trainer.stop_signal else _measure_after_training(session)
        step = int(trainer.state.global_step)
        if after is None:
            outcome = RunOutcome(STOPPED_EXIT_CODE, stopped_step=step)
            _record_stop(session, step)
        else:
            save_model(session)
            assert start.measurement is not None
            rows = _write_results(session, start.measurement, after, seconds)
            outcome = RunOutcome(0, reply_rows=rows)
    # The process group must be gone before the process is, or gloo may abort at exit.
    trainer.end()
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if after is None and is_launched and not session.is_main_process:
        time.sleep(_EXIT_GRACE_SECONDS)
    return outcome


def _choose_checkpoint(session: TrainingSession) -> Path | None:
    """Return the checkpoint to go on from, None for none; all processes agree on it.

    Raises UserError where the run has taken more steps already than it is to have now.
    """
    folder, trainer = session.folder / "checkpoints", session.trainer
    chosen: list[Path | None] = [None]
    if session.is_main_process:
        # The first process alone repairs the folder and chooses; what others see of a network file
        # system may be older.
        checkpoints.recover_checkpoints(folder)
        newest = checkpoints.find_newest_checkpoint(folder)
        for sentence in newest.skipped:
            console.print_line(sentence)
        if newest.path is None and newest.skipped:
            console.print_line("No checkpoint is complete, so the training starts again.")
        elif newest.path is not None and newest.skipped:
            step = checkpoints.checkpoint_step(newest.path)
            console.print_line(f"resuming at step {step:,} instead, from {newest.path}")
        chosen = [newest.path]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    (checkpoint,) = chosen
    if checkpoint is None:
        unseen = describe_ranks_without(session.folder / "run.json")
        if unseen and session.is_main_process:
            console.print_line(
                f"output    {session.folder} is not shared: {unseen} cannot see it. "
                "Checkpoints will lack their random state, so a stopped run could not resume."
            )
        return None
    _refuse_unseen_checkpoint(session, checkpoint)
    step, planned_steps = checkpoints.checkpoint_step(checkpoint), trainer.count_planned_steps()
    if step > planned_steps:
        raise UserError(
            f"trainer.args: this run has taken {step:,} steps already ({checkpoint}), more than "
            f"the {planned_steps:,} that the settings give it now.\nSet at least as many steps, "
            "choose another output_dir=..., or start again with overwrite=true."
        )
    # Only now, as the refusal shall leave the run as it is.
    if session.is_main_process:
        for sentence in checkpoints.restore_logs(session.folder, checkpoint):
            console.print_line(sentence)
    trainer.accelerator.wait_for_everyone()
    return checkpoint


def _refuse_unseen_checkpoint(session: TrainingSession, checkpoint: Path) -> None:
    """Raise UserError in all processes where one of them does not see its part of a checkpoint."""
    name = checkpoints.COUNTERS_FILE.format(rank=session.trainer.args.process_index)
    unseen = describe_ranks_without(checkpoint / name)
    if unseen:
        raise UserError(
            f"output_dir: the run resumes from {checkpoint}, but {unseen} cannot see their part "
            "of it.\nThe output_dir of a run over several machines must be on a file system that "
            "all of them share: copy it to one, or start again with overwrite=true."
        )


class MeasureStartCallback(TrainerCallback):
    """Measures the untrained model, before the loop or as its first thing; once in each session."""

    def __init__(self, session: TrainingSession, checkpoint: Path | None) -> None:
        self._session, self._checkpoint = session, checkpoint
        self.measurement: Measurement | None = None
        """What was measured, in this session or the first one; None until then."""
        self.seconds_in_loop = 0.0

    def measure(self) -> None:
        """Measure now."""
        # Whether the start is measured, or read from an earlier session, must not change what the
        # training draws.
        with preserve_random_state():
            self.measurement = _measure_before_training(self._session, self._checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step, when the weights are sharded."""
        if self.measurement is not None:
            return
        began, was_deferred = time.monotonic(), SIGNALS.is_deferred
        # Nothing is trained yet, so a signal may end the run at once.
        SIGNALS.is_deferred = False
        self.measure()
        SIGNALS.is_deferred = was_deferred
        self.seconds_in_loop = time.monotonic() - began


def _measure_before_training(session: TrainingSession, checkpoint: Path | None) -> Measurement:
    """Measure the untrained model; a run that goes on reads what it measured at its start.

    Raises UserError where that is damaged and the run has a checkpoint to go on from.
    """
    path = session.folder / checkpoints.START_FILE
    start = _read_start_measurement(session, path, checkpoint)
    if start is not None:
        start["results"] = with_new_result_names(start["results"])
        return start
    logs = [session.folder / name for name in checkpoints.STEP_LOGS]
    if session.is_main_process:
        # Lines of a start that was killed before its measurement was complete.
        for log in logs:
            checkpoints.restore_log(log, None)
    measurement = _measure(session, "before training", is_interrupted=lambda: False)
    assert measurement is not None
    if session.is_main_process:
        texts = {log.name: log.read_text(encoding="utf-8") for log in logs if log.is_file()}
        content = {**measurement, "logs": texts}
        write_json(path, {**content, "seal": compute_seal(content)})
        discard_replaced_run(session.folder)
    return measurement


def _read_start_measurement(
    session: TrainingSession, path: Path, checkpoint: Path | None
) -> StartMeasurement | None:
    """Return what was measured before the first step, with the logs as they were then.

    None where there is none. Without a checkpoint a damaged one is measured again, which is said.
    """
    try:
        start: StartMeasurement | None = load_json(path, StartMeasurement)
        if start is None or checkpoint is not None:
            # Beside a checkpoint it was put back from there, or is of an older luthier.
            return start
        content = {name: value for name, value in start.items() if name != "seal"}
        if start.get("seal") != compute_seal(content):
            raise DamagedFileError(f"{path}: its content is not what luthier wrote there.")
    except DamagedFileError as damage:
        if checkpoint is not None:
            raise
        if session.is_main_process:
            console.print_line(f"{damage} Nothing was trained yet, so the start is measured again.")
        return None
    if session.is_main_process:
        for name in checkpoints.STEP_LOGS:
            problem = checkpoints.restore_log(
                session.folder / name, start.get("logs", {}).get(name)
            )
            if problem:
                console.print_line(f"{problem} and has been restored from {path.name}")
    return start


def _measure_after_training(session: TrainingSession) -> Measurement | None:
    """Measure the trained model; None where a signal came before the end.

    The trainer's `stop_signal` is that signal then, and the trained weights are in a checkpoint, so
    that the same command measures them.
    """
    trainer = session.trainer

    def is_interrupted() -> bool:
        number = agree_on_signal(trainer.accelerator)
        if number:
            _save_last_checkpoint(trainer)
            trainer.stop_signal = number
        return bool(number)

    return _measure(session, "after training", is_interrupted)


def _measure(
    session: TrainingSession, when: str, is_interrupted: Callable[[], bool]
) -> Measurement | None:
    """Measure the loss on held-out rows and answer the evaluation prompts.

    `when` is for the progress bar. `is_interrupted` is called before the loss and before each set
    of prompts, on all processes; where it says so, None is returned.
    """
    if is_interrupted():
        return None
    if session.is_main_process:
        _announce_measurement(session, when)
    step = _step_of_weights(session.trainer)
    evaluation = _evaluate_once(session.trainer, step)
    results = _held_out_results(session.trainer, evaluation)
    measurement = Measurement(results=results, replies={}, scores={})
    for prompts in session.reply_generator.prompt_sets:
        if is_interrupted():
            return None
        replies = _generate_or_reuse(session, prompts, when, step)
        for name, value in replies.results.items():
            measurement["results"][f"{prompts.label}{name}"] = value
        measurement["replies"][prompts.name] = replies.texts
        measurement["scores"][prompts.name] = replies.scores
    return measurement


def _announce_measurement(session: TrainingSession, when: str) -> None:
    """Print what is measured, which may take minutes, and what makes it shorter."""
    sets = session.trainer.eval_dataset
    rows = sum(map(len, sets.values() if isinstance(sets, dict) else [sets])) if sets else 0
    prompt_sets = session.reply_generator.prompt_sets
    replies = sum(len(prompts.questions) for prompts in prompt_sets)
    texts = [f"the loss of {pluralize(rows, 'held-out row')}"] if rows else []
    if replies:
        has_metrics = any(prompts.metrics for prompts in prompt_sets)
        setting = "rows sets how many" if has_metrics else "samples=0 for none"
        texts.append(f"{pluralize(replies, 'reply', 'replies')} (trainer.evaluation.{setting})")
    if texts:
        console.print_line(f"measuring {when}: {' and '.join(texts)}")


def _step_of_weights(trainer: Any) -> int:
    """Return the optimizer step whose weights the model has: the last or the best checkpoint's."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return checkpoints.checkpoint_step(Path(state.best_model_checkpoint))
    return int(state.global_step)


def _evaluate_once(trainer: Any, step: int) -> dict[str, float]:
    """Return what an evaluation of the weights of this step measured, by the trainer's names.

    It is in the log where the training has just evaluated them, and is made now where not; it is
    empty without held-out rows. Raises UserError where the best checkpoint is chosen by what nobody
    measures, before the first step.
    """
    if trainer.eval_dataset is None:
        return {}
    # An evaluation may take as long as many steps, and the last step often ends with one.
    logged: dict[str, float] = {}
    for row in trainer.state.log_history:
        logged |= row if row["step"] == step else {}
    if all(f"{_eval_prefix(name)}_runtime" in logged for name in _eval_set_names(trainer)):
        return logged
    evaluation: dict[str, float] = trainer.evaluate()
    best = trainer.args.metric_for_best_model
    if best is None or trainer.args.eval_strategy == "no":
        return evaluation
    if f"eval_{best.removeprefix('eval_')}" not in evaluation:
        measured = ", ".join(sorted(key.removeprefix("eval_") for key in evaluation))
        raise UserError(
            f"trainer.args.metric_for_best_model={best}: no evaluation measures it. "
            f"Measured are: {measured}."
        )
    return evaluation


def _held_out_results(trainer: Any, evaluation: dict[str, float]) -> dict[str, float]:
    """Return what a run's results name of an evaluation: the loss and the method's own metrics."""
    measures = [("eval_loss", "loss")] if trainer.reports_eval_loss else []
    measures += [(name, name) for name in trainer.result_metrics]
    results = {}
    for set_name in _eval_set_names(trainer):
        for name, logged_name in measures:
            value = evaluation.get(f"{_eval_prefix(set_name)}_{logged_name}")
            if value is not None:
                results[f"{set_name}/{name}" if set_name else name] = float(value)
    return results


def _eval_set_names(trainer: Any) -> list[str]:
    """Return the names of the evaluation sets; the only set has none."""
    return list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [""]


def _eval_prefix(name: str) -> str:
    """Return what the trainer puts before the measures of an evaluation set in its logs."""
    return f"eval_{name}" if name else "eval"


def _generate_or_reuse(
    session: TrainingSession, prompts: EvalPrompts, when: str, step: int
) -> EvalReplies:
    """Return the replies of the last evaluation if it was at `step`, and generate them if not."""
    callback = session.replies_callback
    replies = callback.replies_at(prompts.name, step) if callback is not None else None
    return replies or session.reply_generator.generate_replies(prompts, when)


def _save_last_checkpoint(trainer: Any) -> None:
    """Take a checkpoint behind the last step, if there is none.

    There is none to take where the best weights are back in place: they are of another step.
    """
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not trainer.args.load_best_model_at_end and not last.is_dir():
        trainer.is_scheduled_save = False
        # The Trainer of transformers has no public way to take a checkpoint outside of its loop.
        trainer._save_checkpoint(trainer.model, None)


def _prepare_trainer(session: TrainingSession, checkpoint: Path | None) -> None:
    """Give the trainer what it needs to stop and to go on; from here signals are only noted."""
    trainer = session.trainer
    trainer.checkpoint_limits = CheckpointLimits(
        trainer.args.save_total_limit, session.config.trainer.checkpoints.bytes
    )
    trainer.run_folder = session.folder
    trainer.processor_files = _find_processor(session)
    # The first of all: the callbacks of the user's own begin with what a checkpoint restores.
    trainer.callback_handler.callbacks.insert(0, RestoreCountersCallback(trainer))
    trainer.add_callback(StopCallback(trainer))
    if session.is_main_process:
        step = checkpoints.checkpoint_step(checkpoint) if checkpoint else 0
        session.record.update_session(from_step=step)
    # From here on a checkpoint can hold what is done, so a signal waits for the end of a step.
    SIGNALS.is_deferred = True


def _find_processor(session: TrainingSession) -> tuple[ProcessorFile, ...]:
    """Return the files of the base's processor; a model of images without any is told."""
    model = session.config.model
    files = find_processor_files(model)
    if not files and session.is_main_process and has_other_inputs(session.trainer.model.config):
        console.print_line(
            f"processor {model.path} has no processor files on this machine (such as "
            "processor_config.json), so the saved model will read text only."
        )
    return files


def _record_stop(session: TrainingSession, step: int) -> None:
    """Record the step after which a signal stopped the run, on the first rank."""
    if session.is_main_process:
        name = signal_name(session.trainer.stop_signal)
        session.record.update_session(to_step=step, signal=name)
        session.record.end("stopped")


def save_model(session: TrainingSession) -> None:
    """Write the adapter or model, the tokenizer with its template, and the chat settings."""
    trainer, temporary = session.trainer, session.folder / ".model.tmp"
    # Sharded weights are gathered on all ranks, so every rank takes part in the writing.
    trainer.save_model(str(temporary))
    if session.is_main_process:
        # A pickle of this machine's paths, and a model card of blanks to fill in.
        for name in ("training_args.bin", "README.md"):
            (temporary / name).unlink(missing_ok=True)
        # TRL's copy of the adapter as it was at first, which some losses compare with.
        shutil.rmtree(temporary / "ref", ignore_errors=True)
        convert_to_plain_lora(trainer.model, temporary)
        if session.encoder is not None:
            settings = redact_chat(read_saved_settings(session.encoder))
            write_json(temporary / "chat.json", settings)
            save_serving_files(temporary, trainer, session.encoder)
        loader = session.config.model.loader
        if loader is not None:
            write_json(temporary / LOADER_FILE, {"loader": redact(loader)})
        seal_model(temporary)
        publish_folder(temporary, session.folder / "model")
    trainer.accelerator.wait_for_everyone()


def save_serving_files(folder: Path, trainer: Any, encoder: ChatEncoder) -> None:
    """Write what makes other servers read and stop as the training did, beside a saved model.

    That is the training's template with the tokenizer, which keeps its own one where the config
    names another, a response template where one reads replies as luthier does, and the stop tokens
    in the generation config: the token that ends a turn is often none of the base's
    end tokens, and an adapter's folder has no generation config at all.
    """
    tokenizer = copy.copy(trainer.processing_class)
    tokenizer.chat_template = encoder.settings()["template"]
    # None: a template that reads replies otherwise than they were trained would mislead servers.
    tokenizer.response_template = choose_response_template(tokenizer, encoder)
    tokenizer.save_pretrained(folder)
    if not trainer.model.can_generate():  # a model that scores ends nothing
        return
    config = copy.deepcopy(trainer.model.generation_config)
    stop_ids, end_ids = encoder.stop_token_ids, config.eos_token_id
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    more_ids = [end for end in end_ids if end is not None and end not in stop_ids]
    config.eos_token_id = [*stop_ids, *more_ids]
    config.pad_token_id = tokenizer.pad_token_id
    # Not `save_pretrained`, which refuses settings that do not go together, the base's own among
    # them.
    config.to_json_file(folder / "generation_config.json")


def _write_results(
    session: TrainingSession, before: Measurement, after: Measurement, training_seconds: float
) -> list[dict[str, Any]]:
    """Write replies, plot, record and card, and tell the trackers; return the rows of replies.

    Only the first rank does, and the others return no rows.
    """
    if not session.is_main_process:
        return []
    folder, config, record = session.folder, session.config, session.record
    rows: list[dict[str, Any]] = []
    for prompts in session.reply_generator.prompt_sets:
        rows += _reply_rows(prompts, before, after)
    write_jsonl(folder / "replies.jsonl", rows)
    metrics = checkpoints.read_step_log(folder / "metrics.jsonl")
    plot_loss(metrics, run_title(config, folder), folder / "loss.png")
    trackers.log_results(config, after["results"], rows)
    results = {
        name: {"before": before["results"].get(name), "after": after["results"].get(name)}
        for name in before["results"] | after["results"]
    }
    seconds = round(record.entries.get("training_seconds", 0) + training_seconds, 1)
    # Before what may fail for reasons of its own, such as the card and the trackers' uploads.
    logs = hash_logs(folder)
    record.end("finished", results=results, training_seconds=seconds, logs=logs)
    problem = session.after_save(folder) if session.after_save else None
    if problem:
        console.print_line(f"card      not written: {problem}")
    trackers.log_files(config, folder)
    return rows


def _reply_rows(
    prompts: EvalPrompts, before: Measurement, after: Measurement
) -> list[dict[str, Any]]:
    """Return a set's prompts with the replies and the scores before and after training."""
    name, rows = prompts.name, []
    for number, question in enumerate(prompts.questions):
        row = {
            "prompt": turn_text(question.messages[-1]),
            "expected": question.expected_text,
            "before": before["replies"][name][number],
            "after": after["replies"][name][number],
            "scores": {
                metric: {"before": before["scores"][name][metric][number], "after": scores[number]}
                for metric, scores in after["scores"][name].items()
            },
        }
        rows.append({"set": name} | row if name else row)
    return rows
