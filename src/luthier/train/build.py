"""The heavy part of a run: tokenizer, data, model, trainer, training, results."""

import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import enable_full_determinism, get_last_checkpoint

from luthier.config.schema import RunConfig
from luthier.data.prepare import Prepared, prepare
from luthier.model.adapters import add_adapter
from luthier.model.encoder import make_encoder
from luthier.model.machine import choose
from luthier.model.tokenizer import check_fits, load_tokenizer
from luthier.model.weights import load_model
from luthier.record.record import RunRecord
from luthier.train import finish, launch, replies, report, trackers
from luthier.train.arguments import sft_arguments
from luthier.train.progress import MetricsFile, Progress
from luthier.train.session import Session
from luthier.train.sft import TokenTrainer

if TYPE_CHECKING:
    from luthier.config import Loaded


def train(loaded: "Loaded", folder: Path) -> int:
    """Run the training of a checked config whose directory is taken; return the exit code."""
    config = loaded.config
    seed_everything(config)
    machine = choose(config.model)
    main = PartialState(cpu=machine.kind == "cpu").is_main_process
    record = RunRecord(folder)
    if main and not config.dry_run:
        record.start(config, loaded.overrides)
    try:
        with trackers.tracking(config, loaded.resolved, folder, main and not config.dry_run):
            if not config.dry_run:
                return fit(build(config, folder, record, main, machine))
            # The trainer makes its folder when it is built, and a dry run leaves nothing.
            with TemporaryDirectory() as nowhere:
                build(config, Path(nowhere), record, main, machine)
            report.say("dry run: everything up to the first step is right; nothing was written")
            return 0
    except BaseException as error:
        if main and not config.dry_run:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.end("interrupted" if interrupted else "failed", error=str(error))
        raise


def seed_everything(config: RunConfig) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse kernels that vary."""
    if config.deterministic:
        enable_full_determinism(config.seed)
    else:
        set_seed(config.seed)


def build(config: RunConfig, folder: Path, record: RunRecord, main: bool, machine: Any) -> Session:
    """Everything up to the first step: tokenizer, encoded data, model with adapters, trainer."""
    tokenizer = load_tokenizer(config.model)
    encoder = make_encoder(config, tokenizer)
    prepared = prepare(config.dataset, encoder, config.seed)
    if main:
        report.show_data({"train": prepared.train_counts, "held out": prepared.eval_counts})
    args = sft_arguments(config, machine, folder, has_eval=bool(prepared.eval["input_ids"]))
    launch.check_devices(args.distributed_state)
    model: Any = load_model(config.model, config.quantization, machine, full=not config.lora)
    check_fits(tokenizer, model)
    if config.lora:
        model = add_adapter(model, config.lora, config.seed)
    if main:
        report.show_model(model, machine, config.quantization)
    trainer = make_trainer(args, folder, model, tokenizer, prepared)
    facts = launch.check_running(trainer.accelerator, args)
    if main and not config.dry_run:
        record.update(launch=facts, data=data_facts(prepared), chat=encoder.settings())
    questions = replies.asked(config.trainer.evaluation, prepared.heldout, facts["sharding"])
    return Session(config, folder, record, main, encoder, trainer, questions)


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """What the record says of the data: a hash of all token rows and labels, and the counts."""
    return {
        "sha256": prepared.content_hash,
        "train": asdict(prepared.train_counts),
        "held_out": asdict(prepared.eval_counts),
    }


def make_trainer(
    args: Any, folder: Path, model: Any, tokenizer: Any, prepared: Prepared
) -> TokenTrainer:
    """The trainer over the token rows, with luthier's own progress and metrics."""
    trainer = TokenTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_dict(prepared.train),
        eval_dataset=Dataset.from_dict(prepared.eval) if prepared.eval["input_ids"] else None,
        processing_class=tokenizer,
        callbacks=[MetricsFile(folder / "metrics.jsonl")],
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    return trainer


def fit(session: Session) -> int:
    """Answer, train, answer again, and write down what came out."""
    trainer = session.trainer
    checkpoints = session.folder / "checkpoints"
    resume = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    before = finish.before(session)
    if resume and session.main:
        report.say(f"goes on from {resume}")
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.monotonic() - began
    after = finish.measure(session, "after")
    finish.save(session)
    finish.conclude(session, before, after, seconds)
    # The process group must be gone before the process is, or gloo may abort at exit.
    trainer.end()
    return 0
