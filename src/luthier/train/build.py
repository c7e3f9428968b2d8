"""The heavy part of a run: tokenizer, data, model, trainer, training, results."""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import enable_full_determinism

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.batching.settings import batching_of
from luthier.data.prepare import PreparedData, prepare
from luthier.model import adapter_training, quantized
from luthier.model.device import choose_machine
from luthier.model.tokenizer import load_tokenizer
from luthier.model.trainable import make_trainable
from luthier.record.plots import collect_data_numbers, plot_data
from luthier.record.record import RunRecord
from luthier.train import (
    activation_checkpointing,
    console,
    evaluation,
    launch_checks,
    methods,
    resume,
    trackers,
)
from luthier.train.callbacks import MetricsFileCallback, ProgressLineCallback
from luthier.train.evaluation import ReplyGenerator
from luthier.train.launch_request import launched_by
from luthier.train.loop import fit
from luthier.train.methods import TrainerInputs, TrainingMethod
from luthier.train.methods.encoders import make_chat_encoder, make_seq2seq_prompts
from luthier.train.session import AfterSave, TrainingSession
from luthier.train.signals import StoppedBySignal

if TYPE_CHECKING:
    from luthier.config import Loaded


def build_and_fit(loaded: "Loaded", folder: Path, after_save: AfterSave | None = None) -> int:
    """Run the training of a checked config whose directory is taken; return the exit code."""
    config = loaded.config
    seed_everything(config)
    machine = choose_machine(config.model)
    main = PartialState(cpu=machine.device_type == "cpu").is_main_process
    record = RunRecord(folder)
    if main and not config.dry_run:
        record.start(config, loaded.overrides)
    try:
        kept = record if main and not config.dry_run else None
        with trackers.open_trackers(config, loaded.resolved, folder, kept):
            if not config.dry_run:
                session = build_session(config, folder, record, main, machine)
                return fit(replace(session, after_save=after_save))
            # The trainer makes its folder when it is built, and a dry run leaves nothing.
            with TemporaryDirectory() as nowhere:
                build_session(config, Path(nowhere), record, main, machine)
            console.print_line(
                "dry run: everything up to the first step is right; nothing was written"
            )
            return 0
    except BaseException as error:
        if main and not config.dry_run:
            _record_failure(record, error)
        raise


def _record_failure(record: RunRecord, error: BaseException) -> None:
    """Record why a run ended before its end; on a full disk that may fail, too."""
    with suppress(OSError):
        if isinstance(error, StoppedBySignal):
            record.note(signal=str(error))
            record.end("stopped")
        else:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.end("interrupted" if interrupted else "failed", error=str(error))


def seed_everything(config: RunConfig) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse kernels that vary."""
    if config.deterministic:
        enable_full_determinism(config.seed)
    else:
        set_seed(config.seed)


def build_session(
    config: RunConfig, folder: Path, record: RunRecord, main: bool, machine: Any
) -> TrainingSession:
    """Everything up to the first step: tokenizer, encoded data, model with adapters, trainer."""
    method, facts = methods.load_method(config.trainer.method), METHODS[config.trainer.method]
    quantized.check_quantized_model(config, machine)
    tokenizer = load_tokenizer(config.model)
    encoder = make_chat_encoder(config, tokenizer) if facts.chats else None
    prepared = prepare(
        config.dataset, methods.make_row_encoders(config, tokenizer), tokenizer, config.seed
    )
    made = resume.hash_run_inputs(config, tokenizer, encoder, prepared) if main else {}
    if main and not config.dry_run:
        resume.refuse_changed_inputs(record, made)
    if main:
        console.print_data(prepared, facts.answers)
        console.print_packing(prepared, batching_of(config))
        if not config.dry_run:
            console.write_dropped(prepared, folder)
            plot_data(
                collect_data_numbers(prepared, config.chat.max_length),
                folder.name,
                folder / "data.png",
            )
    config = activation_checkpointing.resolve_auto_checkpointing(config)
    args = method.build_arguments(config, machine, folder, has_eval=bool(prepared.eval))
    evaluation.set_best_model_metric(args, config)
    launch_checks.check_devices(args.distributed_state)
    # What was drawn so far depends on what was found in caches.
    set_seed(config.seed)
    model: Any = method.load_model(config, machine, prepared)
    model = make_trainable(model, config, tokenizer, machine, facts.task)
    if main:
        console.print_model(model, machine, config.quantization)
    callbacks = [MetricsFileCallback(folder / "metrics.jsonl")]
    given = TrainerInputs(config, args, model, tokenizer, prepared, callbacks)
    set_seed(config.seed)
    trainer = build_trainer(method, given)
    adapter_training.prepare_trainer(trainer, config.lora)
    launched = launch_checks.check_running_launch(trainer.accelerator, args)
    if main and not config.dry_run:
        chat = encoder.settings() if encoder else None
        resume.refuse_other_launch(record, dict(launched))
        launch_facts = {**launched, "launcher": launched_by()}
        record.update(**made | {"data": data_facts(prepared)}, launch=launch_facts, chat=chat)
    prompts = make_seq2seq_prompts(config, tokenizer) if facts.task == "SEQ_2_SEQ_LM" else encoder
    heldout = prepared.heldout if facts.replies and prompts is not None else {}
    rows = {name: examples.with_columns() for name, examples in heldout.items()}
    asked = evaluation.select_eval_prompts(config.trainer.evaluation, rows, launched["sharding"])
    answers = ReplyGenerator(trainer, prompts, config.trainer.evaluation, asked)
    during = evaluation.add_evaluation_callbacks(trainer, answers, config, folder)
    return TrainingSession(config, folder, record, main, encoder, trainer, answers, during)


def data_facts(prepared: PreparedData) -> dict[str, Any]:
    """What the record says of the data: a hash of all token rows and labels, and the counts."""
    heldout = {name or "held_out": asdict(part) for name, part in prepared.eval_counts.items()}
    return {
        "sha256": prepared.content_hash,
        "sources": {key: part.stored.folder.name for key, part in prepared.sources.items()},
        "train": asdict(prepared.train_counts),
        **heldout,
    }


def build_trainer(method: TrainingMethod, given: TrainerInputs) -> Any:
    """The method's trainer, with luthier's own progress and metrics."""
    trainer = method.build_trainer(given)
    if not given.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLineCallback)
    trainer.locate_rows = given.prepared.locate_rows
    return trainer
