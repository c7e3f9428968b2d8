"""What luthier promises of every trainer, on top of TRL's and transformers' own."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import get_last_checkpoint

from luthier.config.schema import OptimizerConfig
from luthier.data.batching.samplers import SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.errors import UserError
from luthier.model.adapter_keys import open_adapter
from luthier.model.device import preserve_random_state
from luthier.model.fused_head import use_head_log_probs
from luthier.model.processor import ProcessorFile, copy_processor_files
from luthier.record.checkpoints import COUNTERS_FILE, CheckpointLimits, copy_logs
from luthier.record.machine_info import memory_gib
from luthier.storage.atomic import write_json
from luthier.storage.typed_files import load_json
from luthier.train.dataloaders import build_eval_sampler, build_train_sampler
from luthier.train.trainers import fsdp, sharded_weights
from luthier.train.trainers.checkpoints import (
    has_other_names,
    has_stopped_early,
    load_named_weights,
    mark_best_checkpoint,
    report_unreadable_checkpoint,
    stateful_callbacks,
    write_checkpoint,
)
from luthier.train.trainers.parameter_groups import create_configured_optimizer

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

LISTED_ROWS = 8
"""The number of rows that the message of a broken step names."""


class TrainerMixin(Base):
    """The first part of every trainer, before the class of its loss family and TRL's own.

    Telemetry is off, a training that follows an evaluation is wrapped for DDP, an evaluation draws
    no random number that the training would have drawn, a loss that is not finite stops the run,
    checkpoints are complete or absent, a resumed run counts on from its checkpoint, and the
    processes end.
    """

    batching: BatchingSettings | None = None
    """How rows of a table are put into batches; None leaves the loaders to the trainer itself."""
    result_metrics: tuple[str, ...] = ()
    """The metrics of the held-out rows that a run's results have besides the loss."""
    reports_eval_loss: bool = True
    """Whether a run's results have the loss on held-out rows."""
    locate_rows: Callable[[Sequence[int]], list[str]] | None = None
    """Takes numbers of training rows, returns where they stand, such as `data.jsonl:7`."""
    optimizer_config: OptimizerConfig | None = None
    """What `trainer.optimizer` says; None for the optimizer of the trainer's arguments."""
    checkpoint_limits = CheckpointLimits()
    """How many checkpoints stay on disk, and how much room they may take."""
    is_scheduled_save = True
    """Whether the settings ask for the checkpoint that is being written; else a signal does."""
    stop_signal = 0
    """The signal for which the training ended; 0 if it came to its own end."""
    run_folder: Path | None = None
    """The run's directory, whose logs each checkpoint holds; None for a trainer without one."""
    processor_files: tuple[ProcessorFile, ...] = ()
    """The files of the base's processor, which every saved model and checkpoint gets."""
    writing_folder: Path | None = None
    """The folder that checkpoints are written into; None between them."""
    counts_all_ranks = False
    """Whether the items of a step are counted over all ranks, whatever the settings say."""
    _resumed_checkpoint: Path | None = None
    _has_reported_budget = False
    _was_ended = False
    """Whether a callback had ended the training at the checkpoint that it resumes."""
    _paused_seconds = 0.0
    """What evaluations and checkpoints have taken."""
    _speed_mark: tuple[float, int] | None = None
    """The seconds of training and the tokens at the last line of the log; None if not known."""
    _gradient_norms: list[tuple[int, Any]]
    """Each step and the norm of its gradient, since they were last looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the class of TRL or transformers takes."""
        super().__init__(*args, **kwargs)
        for model in (self.model, vars(self).get("ref_model")):
            if model is not None:
                use_head_log_probs(model)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL 1.16 reports the start of a training to the Hugging Face hub."""

    # Training: from the beginning or from a checkpoint.

    def count_planned_steps(self) -> int:
        """The optimizer steps of a training from the beginning, known before it starts."""
        values = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(values[-1])

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given; also after an evaluation."""
        model: Any = self.model
        # accelerate 1.15 marks a model that it prepared for an evaluation as prepared, and then
        # never wraps it for DDP: each rank would train alone, without a message.
        if vars(model).pop("_is_accelerate_prepared", False):
            original = vars(model).pop("_original_forward", None)
            if original is not None:
                model.forward = original
        if self.accelerator.is_fsdp2:
            sharded_weights.choose_layers(self)
        self._gradient_norms = []
        self._was_ended = False
        self._speed_mark = None
        self._resumed_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._stop_if_not_finite()
        return output

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, with luthier's number formats under FSDP2."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            fsdp.set_number_formats(self.accelerator.state.fsdp_plugin)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer that `trainer.optimizer` chooses; else Trainer's."""
        trainer: Any = self
        create_default = partial(super().create_optimizer, model)
        if trainer.optimizer is not None or self.optimizer_config is None:
            return create_default()
        trained_model = self.model if model is None else model
        trainer.optimizer = create_configured_optimizer(
            self, trained_model, self.optimizer_config, create_default
        )
        return trainer.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model and make its optimizer, so that the output layer trains under FSDP2."""
        if not self.accelerator.is_fsdp2:
            return super()._prepare_for_training(*args, **kwargs)
        with (
            fsdp.gather_head_with_norm(),
            fsdp.share_buffers(self.model, self.accelerator.device),
        ):
            prepared = super()._prepare_for_training(*args, **kwargs)
        fsdp.check_head_is_gathered(self.model)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the checkpoint was taken behind the last step."""
        # transformers 5.23 compares the number of steps only behind each of them, so a training
        # that was complete at its checkpoint would take one more.
        is_complete = self.state.global_step >= self.state.max_steps
        has_ended = self._was_ended or any(map(has_stopped_early, stateful_callbacks(self)))
        if is_complete or has_ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def end(self) -> None:
        """End the process group, after what holds on to it."""
        # Where DDP's wrapper outlives the group, its destructor waits for a thread of gloo that
        # may wait for Python itself, and the process never ends (torch 2.13).
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    # Loaders in luthier's own order, for every trainer over rows of a table.

    def make_sampler(
        self, rows: TokenRows, size: int, processes: int, is_training: bool
    ) -> Sampler:
        """The order of the rows, for batches of `size` rows on each of `processes` processes."""
        assert self.batching is not None
        build_sampler = build_train_sampler if is_training else build_eval_sampler
        return build_sampler(rows, self.batching, self.args, size, processes)

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows in the order of a sampler, as the trainer's collator takes them."""
        return SampledDataset(sampler)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """Build a loader, with luthier's own samplers where the trainer has batching settings."""
        if self.batching is not None:
            rows_per_step = self._train_batch_size * self.args.gradient_accumulation_steps
            processes = self.get_total_train_batch_size(self.args) // rows_per_step
            sampler = self.make_sampler(dataset, batch_size, processes, is_training)
            dataset, sampler_fn = self.order_rows(sampler, is_training), lambda rows: sampler
        return super()._get_dataloader(
            dataset=dataset,
            description=description,
            batch_size=batch_size,
            sampler_fn=sampler_fn,
            is_training=is_training,
            dataloader_key=dataloader_key,
        )

    # Losses and gradients that are not finite.

    def _scale_over_ranks(self, loss: Tensor, num_items_in_batch: Any) -> Tensor:
        """Multiply a loss by the number of ranks where it was divided by what all of them count.

        DDP averages the gradients of the ranks, which would divide by their number once more.
        `num_items_in_batch` is None outside of training, where nothing is averaged.
        """
        is_global = self.counts_all_ranks or self.args.average_tokens_across_devices
        if num_items_in_batch is None or not is_global:
            return loss
        return loss * self.accelerator.num_processes

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Remember the norm; it is looked at when something is logged or saved, and costs no sync.

        It is the same on all ranks, so all of them stop together. In float16 the scaler leaves out
        steps that overflow, and goes on.
        """
        self._refuse_missing_gradients()
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None:
            self._gradient_norms.append((self.state.global_step + 1, norm))
        return norm

    def _refuse_missing_gradients(self) -> None:
        """Raise UserError where DDP waits for the gradient of a weight that the step left out.

        torch would say so at the next step alone, and the last one would go on with gradients that
        were not averaged.
        """
        model: Any = self.model_wrapped
        if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
            return
        groups = self.optimizer.param_groups
        if all(p.grad is not None for g in groups for p in g["params"] if p.requires_grad):
            return
        names = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"Step {self.state.global_step + 1}: {names[0]}{more} got no gradient, and the "
            "processes would not train one model: DDP was told that each step reaches all weights."
            "\nSet trainer.args.ddp_find_unused_parameters=true, or leave those weights out of "
            "what trains (model.freeze)."
        )

    def _stop_if_not_finite(self, loss: float = 0.0) -> None:
        """Raise UserError at the first gradient, or a mean loss, that is not a finite number."""
        norms, self._gradient_norms = self._gradient_norms, []
        step = next((step for step, norm in norms if not math.isfinite(float(norm))), None)
        problem = "The gradient is no finite number"
        if not math.isfinite(loss):
            step, problem = step or self.state.global_step, f"The loss is {loss}"
        if step is not None:
            rows = rows_of_step(self, step)
            locations = self.locate_rows(rows) if self.locate_rows is not None else []
            last_checkpoint = get_last_checkpoint(self.args.output_dir)
            raise UserError(_not_finite_message(problem, step, locations, last_checkpoint))

    # Evaluation and logs.

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, each of several sets under its name; the main one, which has none, as `eval`.

        So there is an `eval_loss` to choose a checkpoint by, however many sets there are.
        """
        with preserve_random_state(), self._pause_clock():
            sets = self.eval_dataset if eval_dataset is None else eval_dataset
            if not isinstance(sets, dict):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics: dict[str, float] = {}
            for name, rows in sets.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                # The trainer's own sets go by name: by that Trainer tells their loaders apart.
                dataset = name if eval_dataset is None else rows
                metrics |= super().evaluate(dataset, ignore_keys, prefix)
            return metrics

    def add_log_means(self, logs: dict[str, float]) -> None:
        """Add means since the last line of metrics to `logs`; called on all ranks."""

    @contextmanager
    def _pause_clock(self) -> Iterator[None]:
        """Leave the block out of the time that steps take."""
        began = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - began

    def _add_speed(self, logs: dict[str, float]) -> None:
        """Add the tokens that all ranks have trained on in a second since the last line."""
        if "num_tokens" not in logs:
            return
        seconds, tokens = time.monotonic() - self._paused_seconds, int(logs["num_tokens"])
        if self._speed_mark is not None:
            earlier, earlier_tokens = self._speed_mark
            speed = (tokens - earlier_tokens) / max(seconds - earlier, 1e-9)
            logs["tokens_per_second"] = round(speed, 1)
        self._speed_mark = seconds, tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and stop on a loss that is not finite."""
        if self.model.training and "loss" in logs:
            self.add_log_means(logs)
            self._add_speed(logs)
            logs["memory_gib"] = round(memory_gib(), 3)
            self._stop_if_not_finite(logs["loss"])
        if "train_loss" in logs:
            if self.stop_signal:
                return
            # The mean over all steps, also over those before the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    # Checkpoints, and what has been counted since the last line of metrics.

    def counter_state(self) -> dict[str, Any]:
        """What this process has counted since the last line of metrics, for JSON."""
        # TRL's trainers collect measures in `_metrics` and log the mean of each.
        measures = vars(self).get("_metrics", {}).get("train", {})
        return {
            "loss": self._tr_loss.item(),
            "losses": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
            "callbacks": {name: c.state()["attributes"] for name, c in self._stateful().items()},
            "is_ended": self._is_ended_by_callback(),
            "measures": {name: list(values) for name, values in measures.items()},
        }

    def _stateful(self) -> dict[str, Any]:
        """The callbacks that have a state, by class; of one class the second is `NAME 2`."""
        callbacks: dict[str, Any] = {}
        counts: Counter[str] = Counter()
        for callback in stateful_callbacks(self):
            name = type(callback).__name__
            counts[name] += 1
            callbacks[f"{name} {counts[name]}" if counts[name] > 1 else name] = callback
        return callbacks

    def _is_ended_by_callback(self) -> bool:
        """Whether a callback has ended the training before its last step."""
        is_early = self.state.global_step < self.state.max_steps
        return bool(self.control.should_training_stop and is_early and not self.stop_signal)

    def load_counter_state(self, state: dict[str, Any]) -> None:
        """Count on from what `counter_state` returned."""
        # Added in place, so that the tensor stays on its device.
        self._tr_loss += state["loss"]
        self._total_loss_scalar = state["losses"]
        self._globalstep_last_logged = state["logged"]
        for callback_name, callback in self._stateful().items():
            for attribute, value in state["callbacks"].get(callback_name, {}).items():
                setattr(callback, attribute, value)
        self._was_ended = bool(state.get("is_ended"))
        for name, values in state["measures"].items():
            self._metrics["train"][name].extend(values)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights as Trainer does, whichever names they have in the checkpoint."""
        if self.accelerator.is_fsdp2:
            sharded_weights.load_weights(self, Path(resume_from_checkpoint))
        elif self._loads_by_name(resume_from_checkpoint):
            load_named_weights(self.model, Path(resume_from_checkpoint))
        elif hasattr(self.model, "peft_config"):
            # An adapter that was trained on the text part alone had other names, and peft passes
            # over them.
            base = self.model.get_base_model()
            with open_adapter(Path(resume_from_checkpoint), base) as folder:
                super()._load_from_checkpoint(str(folder), model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, by the same rule."""
        best = self.state.best_model_checkpoint
        if best is not None and self.accelerator.is_fsdp2:
            sharded_weights.load_weights(self, Path(best))
        elif best is not None and self._loads_by_name(best):
            load_named_weights(self.model, Path(best))
        else:
            super()._load_best_model()

    def _loads_by_name(self, checkpoint: str) -> bool:
        """Return whether a checkpoint holds a whole model under other names than its own."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not is_sharded and has_other_names(self.model, Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as Trainer does; what cannot be read, or would run code, is said in words."""
        in_format: AbstractContextManager[Any] = nullcontext()
        if self.accelerator.is_fsdp2 and checkpoint is not None:
            in_format = sharded_weights.optimizer_format(self, checkpoint)
        with report_unreadable_checkpoint(checkpoint), in_format:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both as Trainer does, without a second copy of FSDP2's weights."""
        if self.accelerator.is_fsdp2:
            sharded_weights.save_training_state(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state, by the same rule."""
        with report_unreadable_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def restore_counters(self) -> None:
        """Load the counters of the checkpoint that the training resumes; call it as it begins."""
        if self._resumed_checkpoint is None:
            self._speed_mark = time.monotonic() - self._paused_seconds, 0
            return
        file = self._resumed_checkpoint / COUNTERS_FILE.format(rank=self.args.process_index)
        self.load_counter_state(load_json(file, dict[str, Any]))
        # The state in a checkpoint has the intervals of its time, by which Trainer would go on.
        self.state.compute_steps(self.args, self.state.max_steps)
        mark_best_checkpoint(self.state, self._resumed_checkpoint.parent)

    def _get_output_dir(self, trial: Any) -> str:
        if self.writing_folder is not None:
            return str(self.writing_folder)
        return super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does; of FSDP2's slices whole, read back and compared."""
        if not self.accelerator.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        # Trainer calls itself for a checkpoint.
        sharded_weights.save_weights(self, folder, is_checkpoint=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, with the processor's files.

        Trainer's pickle of the arguments, which nothing reads, goes.
        """
        super()._save(output_dir, self._without_tied_copies(state_dict))
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            copy_processor_files(self.processor_files, folder)

    def _without_tied_copies(self, state_dict: Any) -> Any:
        """Return the weights that DeepSpeed gathered, of tied ones the one that models load by.

        accelerate 1.15 copies each tensor under ZeRO-2, so that nobody sees any more that two of
        them were one.
        """
        if state_dict is None or not self.is_deepspeed_enabled:
            return state_dict
        model: Any = self.model
        ties = model.all_tied_weights_keys
        return {n: w for n, w in state_dict.items() if ties.get(n) not in state_dict}

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what this process has counted beside its random state."""
        super()._save_rng_state(output_dir)
        # Trainer calls this in all processes, where most of a checkpoint is written by the first.
        file = Path(output_dir) / COUNTERS_FILE.format(rank=self.args.process_index)
        write_json(file, self.counter_state())
        if self.args.process_index == 0 and self.run_folder is not None:
            copy_logs(self.run_folder, Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, complete or not at all, and none with weights that are broken."""
        self._stop_if_not_finite()
        folder = Path(super()._get_output_dir(trial))
        for states in self.state.stateful_callbacks.values():
            # Of two callbacks of one class transformers 5.23 adds both states at each checkpoint.
            if isinstance(states, list):
                states.clear()
        with self._pause_clock():
            write_checkpoint(self, folder, partial(super()._save_checkpoint, model, trial))

    def report_over_budget(self, sentence: str) -> None:
        """Print, once, that the checkpoints which must stay are more than the budget."""
        if not self._has_reported_budget:
            from luthier.train import console

            console.print_line(sentence)
            self._has_reported_budget = True


def rows_of_step(trainer: Any, step: int) -> list[int]:
    """The numbers, in their table, of the rows that all ranks saw in an optimizer step.

    They follow from the order of the epoch; none where the rows come as a stream.
    """
    loader = trainer.callback_handler.train_dataloader
    rows = None if loader is None else loader.dataset
    if not isinstance(rows, SampledDataset):
        return []
    sampler, size = copy(rows.sampler), trainer.get_total_train_batch_size(trainer.args)
    epoch, step_of_epoch = divmod(step - 1, -(-len(sampler) // size))
    sampler.set_epoch(epoch)
    batches = islice(sampler, step_of_epoch * size, (step_of_epoch + 1) * size)
    return list(dict.fromkeys(number for numbers in batches for number in numbers))


def _not_finite_message(
    problem: str, step: int, locations: Sequence[str], last_checkpoint: str | None
) -> str:
    """The message that ends a run: what broke, where, what is left and what may mend it."""
    listed = ", ".join(locations[:LISTED_ROWS])
    more = f" and {len(locations) - LISTED_ROWS} more" if len(locations) > LISTED_ROWS else ""
    rows = f"Rows of that step: {listed}{more}.\n" if locations else ""
    left = (
        f"The last checkpoint before it: {last_checkpoint}."
        if last_checkpoint
        else "There is no checkpoint before it."
    )
    return (
        f"{problem} at step {step}, so the run stops.\n{rows}{left}\n"
        "A smaller trainer.args.learning_rate, more trainer.args.warmup_steps, or "
        "model.dtype=bfloat16 in place of float16 usually mends it; else look at those rows."
    )


@contextmanager
def keep_weight_precision(model: Any) -> Iterator[None]:
    """Put trained weights back into the number formats they had before a trainer was built.

    TRL 1.16 rounds those of a quantized model to bfloat16, where small updates vanish.
    """
    exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in exact and parameter.dtype != exact[name].dtype:
            parameter.data = exact[name].to(parameter.device)


@contextmanager
def pause_activation_checkpointing(model: Any) -> Iterator[None]:
    """Keep activations within the block, and recompute them behind it as before.

    TRL 1.16 does that itself where it looks at a model without gradients, but turns it on again
    with settings that torch does not know (`every_n_layers`, `offload`). It does nothing where it
    finds it turned off.
    """
    layers = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
