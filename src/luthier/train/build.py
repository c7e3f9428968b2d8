"""From a checked config to what trains: tokenizer, data, model, trainer, and the run's record."""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import enable_full_determinism

from luthier.config.code_settings import hash_code
from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.batching.settings import read_batching_settings
from luthier.data.batching.token_rows import TokenRows
from luthier.data.examples import DatasetSources
from luthier.data.prepare import PreparedData, prepare
from luthier.errors import UserError, explain_lost_process
from luthier.inspection.warnings import collect_run_facts, find_warnings
from luthier.metrics import parse_metrics
from luthier.model import adapter_training, quantized
from luthier.model.device import choose_machine
from luthier.model.experts import has_experts
from luthier.model.load import read_model_config, resolve_attention
from luthier.model.model_class import check_trains_on_text
from luthier.model.tokenizer import check_vocabulary_in_files, load_tokenizer
from luthier.model.trainable import make_trainable
from luthier.model.vision_processor import VisionProcessor
from luthier.record.checkpoints import METRICS_FILE
from luthier.record.plots import collect_data_numbers, plot_data
from luthier.record.record import RunRecord
from luthier.report.data_summary import write_data_summary
from luthier.report.run_report import write_report
from luthier.terminal import pluralize
from luthier.train import (
    activation_checkpointing,
    console,
    evaluation,
    methods,
    profiler,
    resume,
    trackers,
)
from luthier.train.arguments import check_router_loss, run_title, set_unused_search
from luthier.train.callbacks import LastLogCallback, MetricsFileCallback, ProgressLineCallback
from luthier.train.dataloaders import refuse_idle_processes
from luthier.train.evaluation import ReplyGenerator
from luthier.train.launch.checks import (
    LaunchFacts,
    check_devices,
    check_running_launch,
    refuse_other_launch,
)
from luthier.train.launch.deepspeed import check_zero_settings
from luthier.train.launch.fsdp import check_packed_storage
from luthier.train.launch.rank_agreement import (
    check_input_agreement,
    check_rank_agreement,
    join_processes,
)
from luthier.train.launch.request import launched_by
from luthier.train.loop import AfterSave, RunOutcome, TrainingSession, fit
from luthier.train.methods import TrainerInputs
from luthier.train.methods.encoders import (
    find_images,
    make_chat_encoder,
    make_eval_prompts,
    read_saved_settings,
)
from luthier.train.own_callbacks import make_own_callbacks
from luthier.train.signals import StoppedBySignal
from luthier.train.trainers import vision_tower

if TYPE_CHECKING:
    from luthier.config import LoadedConfig


def build_and_fit(
    loaded: "LoadedConfig",
    folder: Path,
    sources: DatasetSources | None = None,
    after_save: AfterSave | None = None,
    began: float | None = None,
) -> int:
    """Run the training of a checked config whose directory is taken; return the exit code.

    The record and the trackers are open for as long as it runs. A dry run builds everything in a
    temporary folder and takes no step. `sources` are those that the check has opened; None opens
    them. `began` is when the command did, by `time.monotonic`; None is now.
    """
    config = loaded.config
    seed_everything(config)
    machine = choose_machine(config.model)
    is_main_process = join_processes(loaded.recorded, machine).is_main_process
    record = RunRecord(folder, began)
    is_recorded = is_main_process and not config.dry_run
    if is_recorded:
        record.start(config, loaded.overrides, loaded.recorded)
        changed_versions = resume.describe_changed_versions(record)
        if changed_versions is not None:
            console.print_line(changed_versions)
    try:
        tracked_record = record if is_recorded else None
        with trackers.open_trackers(config, loaded.recorded, folder, tracked_record):
            if config.dry_run:
                # The trainer makes its folder when it is built, and a dry run leaves nothing.
                with TemporaryDirectory() as temporary:
                    run_folder = Path(temporary)
                    build_session(config, run_folder, record, is_main_process, machine, sources)
                if is_main_process:
                    console.print_line("Dry run: the run could start, and nothing was written.")
                return 0
            session = build_session(config, folder, record, is_main_process, machine, sources)
            outcome = fit(replace(session, after_save=after_save))
    # Signals and Ctrl-C are no Exceptions, and the record tells of those ends too.
    except BaseException as error:
        if is_recorded:
            _record_failure(record, error)
            _write_report(folder)
        raise
    # The trackers print when they close, and what counts stands last.
    if is_main_process:
        _write_report(folder)
        _print_outcome(outcome, record, config)
    return outcome.exit_code


def _print_outcome(outcome: RunOutcome, record: RunRecord, config: RunConfig) -> None:
    """Print the results of a finished run, or where a stopped one stopped."""
    if outcome.stopped_step is not None:
        console.print_line(
            f"\nStopped after step {outcome.stopped_step:,}. Run the same command to resume."
        )
        return
    console.print_replies(outcome.reply_rows, config.trainer.evaluation.samples)
    # The card and the report were written after the record was closed.
    entries = record.entries | {"seconds": record.total_seconds()}
    console.print_results(entries, record.path.parent, config)


def seed_everything(config: RunConfig) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse kernels that vary."""
    if config.deterministic:
        enable_full_determinism(config.seed)
    else:
        set_seed(config.seed)


def build_session(
    config: RunConfig,
    folder: Path,
    record: RunRecord,
    is_main_process: bool,
    machine: Any,
    sources: DatasetSources | None = None,
) -> TrainingSession:
    """Build and check everything up to the first step: tokenizer, data, model, trainer.

    Raises UserError where anything does not go together, or has changed since the run began.
    """
    is_recorded = is_main_process and not config.dry_run
    method, facts = methods.load_method(config.trainer.method), METHODS[config.trainer.base_method]
    quantized.check_quantized_model(config, machine)
    architecture = read_model_config(config.model)
    if config.model.loader is None:
        check_trains_on_text(architecture, config.model.trust_remote_code, facts.task)
    machine = resolve_attention(config.model, machine, facts.task, config.trainer.args.packs_rows)
    check_rank_agreement({"model.attention": machine.attention})
    check_router_loss(config)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary_in_files(tokenizer, config.model)
    encoder = make_chat_encoder(config, tokenizer) if facts.trains_on_chats else None
    row_encoders = methods.make_row_encoders(config, tokenizer)
    _announce("the data", is_main_process)
    prepared = prepare(config.dataset, row_encoders, tokenizer, config.seed, sources)
    # Before the model, which may take minutes to load.
    images = find_row_images(config, prepared)
    inputs = _check_inputs(config, tokenizer, encoder, prepared)
    if is_recorded:
        resume.refuse_changed_inputs(record, inputs, config)
    if is_main_process:
        _report_data(config, folder, prepared, tokenizer, facts.trained_values)
        record.entries["warnings"] = _print_warnings(config, tokenizer, encoder, prepared)
    config = activation_checkpointing.resolve_auto_checkpointing(
        config, prepared.train_counts.longest, prepared.largest_images if images else (), record
    )
    args = method.build_arguments(config, machine, folder, has_eval=bool(prepared.eval))
    evaluation.set_best_model_metric(args, config)
    _check_launch(config, args, architecture, prepared.has_images)
    # What was drawn so far depends on what was found in caches.
    set_seed(config.seed)
    _announce(f"the model {config.model.path}", is_main_process)
    model: Any = method.load_model(config, machine, prepared)
    model = make_trainable(model, config, tokenizer, machine, facts.task)
    vision_tower.check_trained_parts(model, config, images is not None)
    set_unused_search(args, model, config)
    if is_main_process:
        console.print_model(model, machine, config.quantization, config.lora)
    own_callbacks = make_own_callbacks(config.trainer.callbacks)
    callbacks = [MetricsFileCallback(folder / "metrics.jsonl"), *own_callbacks]
    trainer_inputs = TrainerInputs(config, args, model, tokenizer, prepared, callbacks, images)
    # New adapter weights were drawn in between.
    set_seed(config.seed)
    trainer = method.build_trainer(trainer_inputs)
    if images is not None:
        vision_tower.run_tower_in_each_batch(trainer, images)
    _add_callbacks(trainer, config, folder)
    trainer.locate_rows = prepared.locate_rows
    trainer.optimizer_config = config.trainer.optimizer
    adapter_training.prepare_trainer(trainer, config.lora)
    # The accelerator, which knows what really runs, is made with the trainer.
    launch = check_running_launch(trainer.accelerator, args)
    if is_recorded:
        refuse_other_launch(record, launch)
        code = hash_code(config.model_dump(mode="json"))
        written = inputs | {"data": data_facts(prepared), "code": code}
        _record_inputs(record, written, trainer, launch, encoder)
    reply_generator = _make_reply_generator(trainer_inputs, trainer, encoder, record)
    callback = evaluation.add_evaluation_callbacks(trainer, reply_generator, config, folder)
    return TrainingSession(
        config, folder, record, is_main_process, encoder, trainer, reply_generator, callback
    )


def _announce(what: str, is_main_process: bool) -> None:
    """Print what is loaded next, which may take minutes."""
    if is_main_process:
        console.print_line(f"loading   {what}")


def _check_launch(config: RunConfig, args: Any, architecture: Any, has_images: bool) -> None:
    """Raise UserError where the processes lack devices, or do not train what the config has.

    `args` are the trainer's, `architecture` is the model's `PretrainedConfig`, and `has_images`
    tells of the rows.
    """
    check_devices(args.distributed_state)
    check_zero_settings(config, args, has_experts(architecture.to_dict()), has_images)
    check_packed_storage(config, args)


def _make_reply_generator(
    inputs: TrainerInputs, trainer: Any, encoder: Any, record: RunRecord
) -> ReplyGenerator:
    """Return what answers the held-out rows of a run; UserError where that is not possible.

    One of their prompts becomes an entry of `record`, for the model card.
    """
    config, prepared = inputs.config, inputs.prepared
    prompts = make_eval_prompts(config, inputs.tokenizer, encoder)
    writes_replies = METHODS[config.trainer.base_method].writes_replies
    heldout = prepared.heldout if writes_replies and prompts is not None else {}
    rows = {name: examples.with_columns() for name, examples in heldout.items()}
    settings = config.trainer.evaluation
    prompt_sets = evaluation.select_eval_prompts(settings, rows)
    record.entries["example"] = evaluation.select_example(prompt_sets)
    images = None
    if inputs.images is not None:
        images = evaluation.QuestionImages(inputs.images, prepared.read_image)
    return ReplyGenerator(trainer, prompts, settings, prompt_sets, images)


def find_row_images(config: RunConfig, prepared: PreparedData) -> VisionProcessor | None:
    """Return what makes the inputs of pictures; None where no row has an image.

    Raises UserError where the run is to train a tower for images all the same.
    """
    images = find_images(config) if prepared.has_images else None
    if config.lora.vision and images is None:
        raise UserError(
            "lora.vision=true: no row has an image, so no tower would train. Remove it."
        )
    return None if images is None else images.processor


def _check_inputs(
    config: RunConfig, tokenizer: Any, encoder: Any, prepared: PreparedData
) -> dict[str, dict[str, Any]]:
    """Return the hashes of what the run is made of, once all processes have the same.

    Raises UserError where they differ, or where there are more processes than rows.
    """
    state = PartialState()
    # Of the weights each machine has files of its own, which its first process reads.
    with_weights = state.is_local_main_process
    inputs = resume.hash_run_inputs(config, tokenizer, encoder, prepared, with_weights)
    check_input_agreement(inputs)
    refuse_idle_processes(prepared.train, read_batching_settings(config), state.num_processes)
    return inputs


def _record_inputs(
    record: RunRecord,
    inputs: dict[str, dict[str, Any]],
    trainer: Any,
    launch: LaunchFacts,
    encoder: Any,
) -> None:
    """Write what the run is made of and how it was launched."""
    text_config = trainer.model.config.get_text_config()
    record.update_session(attention=text_config._attn_implementation)
    record.update(
        **inputs,
        launch={**launch, "launcher": launched_by()},
        chat=read_saved_settings(encoder) if encoder else None,
    )


def _add_callbacks(trainer: Any, config: RunConfig, folder: Path) -> None:
    """Add what a run shows and writes between its steps."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    metrics = parse_metrics(config.trainer.evaluation.metrics)
    measures = [*trainer.result_metrics, *(metric.name for metric in metrics)]
    unit = "completion" if METHODS[config.trainer.base_method].uses_rewards else "row"
    rows = pluralize(trainer.get_total_train_batch_size(trainer.args), unit)
    trainer.add_callback(ProgressLineCallback(rows, measures, not trainer.args.disable_tqdm))
    trainer.add_callback(LastLogCallback())
    profiler.add_profiler(trainer, config, folder)


def data_facts(prepared: PreparedData) -> dict[str, Any]:
    """Return what the record says of the data: a hash of all rows and labels, and the counts."""
    counts = {name or "held_out": asdict(counts) for name, counts in prepared.eval_counts.items()}
    return {
        "sha256": prepared.content_hash,
        "sources": {key: source.stored.folder.name for key, source in prepared.sources.items()},
        "train": asdict(prepared.train_counts),
        **counts,
    }


def _report_data(
    config: RunConfig, folder: Path, prepared: PreparedData, tokenizer: Any, answers: str
) -> None:
    """Print what the data is, and write the dropped rows and pictures of it beside the run.

    `answers` says what trains, where that is not tokens of the rows. A dry run writes nothing.
    """
    console.print_data(prepared, answers)
    console.print_packing(prepared, read_batching_settings(config))
    if not config.dry_run:
        console.write_dropped(prepared, folder)
        numbers = collect_data_numbers(prepared, config.chat.max_length)
        plot_data(numbers, run_title(config, folder), folder / "data.png")
        write_data_summary(folder, config, prepared, tokenizer)


def _write_report(folder: Path) -> None:
    """Write the run as a page, however it ended; one that measured nothing has none."""
    if not (folder / METRICS_FILE).is_file():
        return
    try:
        write_report(folder)
    except Exception as error:  # whatever it is, hours of training must not end with it
        console.print_line(f"report    not written: {type(error).__name__}: {error}")


_COMPARED_ROWS = 100_000
"""Rows up to which training rows are compared with held-out ones; `luthier check` compares all."""


def _print_warnings(
    config: RunConfig, tokenizer: Any, encoder: Any, prepared: PreparedData
) -> list[dict[str, str]]:
    """Print what usually ruins such a training, a line each, and return it for the record."""
    train = prepared.train
    is_compared = prepared.train_counts.rows <= _COMPARED_ROWS
    facts = collect_run_facts(
        config,
        tokenizer,
        encoder,
        read_batching_settings(config),
        lengths=train.lengths if isinstance(train, TokenRows) else None,
        rows=prepared.train_counts.rows,
        similar_rows=prepared.count_similar_rows() if is_compared else {},
        processes=PartialState().num_processes,
    )
    warnings = find_warnings(facts)
    for warning in warnings:
        console.print_line(f"warning   {warning}")
    return [warning._asdict() for warning in warnings]


def _record_failure(record: RunRecord, error: BaseException) -> None:
    """Record why a run ended before its end; on a full disk that may fail, too."""
    with suppress(OSError):
        if isinstance(error, StoppedBySignal):
            record.update_session(signal=str(error))
            record.end("stopped")
        else:
            is_interrupted = isinstance(error, KeyboardInterrupt)
            reason = str(explain_lost_process(error) or error)
            record.end("interrupted" if is_interrupted else "failed", error=reason)
