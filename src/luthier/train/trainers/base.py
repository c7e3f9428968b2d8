"""What luthier promises of every trainer, on top of TRL's and transformers' own."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from luthier.data.batching.samplers import SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.errors import UserError
from luthier.model.device import preserve_random_state
from luthier.train.dataloaders import build_eval_sampler, build_train_sampler
from luthier.train.trainers.checkpoints import CheckpointMixin

# Losses and gradients that are no numbers: at which step, in which rows, and what is left.

LISTED_ROWS = 8
"""Rows that a message names."""


def first_bad_step(norms: Iterable[tuple[int, Any]]) -> int | None:
    """The first step whose gradient has no finite norm, of (step, norm) pairs in order."""
    return next((step for step, norm in norms if not math.isfinite(float(norm))), None)


def rows_of_step(trainer: Any, step: int) -> list[int]:
    """The numbers, in their table, of the rows that all ranks saw in an optimizer step.

    They follow from the order of the epoch; none where the rows come as a stream.
    """
    loader = trainer.callback_handler.train_dataloader
    rows = None if loader is None else loader.dataset
    if not isinstance(rows, SampledDataset):
        return []
    sampler, size = copy(rows.sampler), trainer.get_total_train_batch_size(trainer.args)
    epoch, place = divmod(step - 1, -(-len(sampler) // size))
    sampler.set_epoch(epoch)
    seen = islice(sampler, place * size, (place + 1) * size)
    return list(dict.fromkeys(number for numbers in seen for number in numbers))


def bad_step_message(trainer: Any, what: str, step: int, places: Sequence[str]) -> str:
    """The message that ends a run: what broke, where, what is left and what may mend it."""
    shown = ", ".join(places[:LISTED_ROWS])
    more = f" and {len(places) - LISTED_ROWS} more" if len(places) > LISTED_ROWS else ""
    rows = f"Rows of that step: {shown}{more}.\n" if places else ""
    last = get_last_checkpoint(trainer.args.output_dir)
    kept = (
        f"The last checkpoint before it: {last}." if last else "There is no checkpoint before it."
    )
    return (
        f"{what} at step {step}, so the run stops.\n{rows}{kept}\n"
        "A smaller trainer.args.learning_rate, more trainer.args.warmup_steps, or "
        "model.dtype=bfloat16 in place of float16 usually mends it; else look at those rows."
    )


@contextmanager
def keep_weight_precision(model: Any) -> Iterator[None]:
    """Put trained weights back into the number formats they had before a trainer was built.

    TRL rounds those of a quantized model to bfloat16, where small updates vanish.
    """
    exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in exact and parameter.dtype != exact[name].dtype:
            parameter.data = exact[name].to(parameter.device)


@contextmanager
def pause_activation_checkpointing(model: Any) -> Iterator[None]:
    """Keep activations within the block, and recompute them behind it as before.

    TRL does that itself where it looks at a model without gradients, but turns it on again with
    settings that torch does not know (`every_n_layers`, `offload`). It does nothing where it finds
    it turned off.
    """
    parts = [part for part in model.modules() if vars(part).get("gradient_checkpointing")]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


class TrainerMixin(CheckpointMixin):
    """Stands before a trainer: `class Mine(Exact, DPOTrainer)`.

    Nobody is told that someone trains, a training that follows an evaluation is whole under DDP,
    an evaluation draws nothing that the training would have drawn, a broken loss stops the run,
    checkpoints are whole, and the processes end.
    """

    result_metrics: tuple[str, ...] = ()
    """Metrics of the held-out rows that a run's results have besides the loss."""
    reports_eval_loss: bool = True
    """Whether a run's results have the loss on held-out rows."""
    locate_rows: Callable[[Sequence[int]], list[str]] | None = None
    """Says where training rows stand, such as `data.jsonl:7`, by their numbers in the table."""
    _norms: list[tuple[int, Any]]
    """The step and the norm of its gradient, since they were last looked at."""

    def _send_telemetry(self) -> None:
        """Tell nobody that someone trains."""

    def count_planned_steps(self) -> int:
        """The optimizer steps that a training from the beginning takes, known before it starts."""
        values = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(values[-1])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, also after an evaluation.

        accelerate marks a model that it prepared for evaluation as prepared, and then never wraps
        it for DDP: each rank would train alone, without a word. So the mark is taken off here.
        """
        model: Any = self.model
        if vars(model).pop("_is_accelerate_prepared", False):
            original = vars(model).pop("_original_forward", None)
            if original is not None:
                model.forward = original
        self._norms = []
        result = super().train(*args, **kwargs)
        self._stop_if_broken()
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Remember the norm; it is looked at when something is logged or saved, and costs no sync.

        It is the same on all ranks, so all of them stop together. In float16 the scaler leaves out
        steps that overflow, and goes on.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None:
            self._norms.append((self.state.global_step + 1, norm))
        return norm

    def _stop_if_broken(self, loss: float = 0.0) -> None:
        """Raise UserError at a step whose gradient, or a mean loss that, is no finite number."""
        norms, self._norms = self._norms, []
        step, what = first_bad_step(norms), "The gradient is no finite number"
        if not math.isfinite(loss):
            step, what = step or self.state.global_step, f"The loss is {loss}"
        if step is not None:
            rows = rows_of_step(self, step)
            places = self.locate_rows(rows) if self.locate_rows is not None else []
            raise UserError(bad_step_message(self, what, step, places))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, but none with weights that are broken."""
        self._stop_if_broken()
        super()._save_checkpoint(model, trial)

    def end(self) -> None:
        """End the process group, after what holds on to it.

        Where DDP's wrapper outlives the group, its destructor waits for a thread of gloo that may
        wait for Python itself, and the process never ends (torch 2.13).
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, each of several sets under its name; the main one, which has none, as `eval`.

        So there is an `eval_loss` to choose a checkpoint by, however many sets there are.
        """
        with preserve_random_state():
            return self._evaluate_all(eval_dataset, ignore_keys, metric_key_prefix)

    def _evaluate_all(
        self, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, rows in given.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            # The trainer's own sets go by name: by that it tells their loaders apart.
            metrics |= super().evaluate(name if eval_dataset is None else rows, ignore_keys, prefix)
        return metrics

    def counter_state(self) -> dict[str, Any]:
        """What was counted, with the measures that TRL takes the mean of at the next line."""
        measures = vars(self).get("_metrics", {}).get("train", {})
        return super().counter_state() | {
            "measures": {name: list(of) for name, of in measures.items()}
        }

    def load_counter_state(self, counted: dict[str, Any]) -> None:
        """Go on counting from there."""
        super().load_counter_state(counted)
        for name, values in counted["measures"].items():
            self._metrics["train"][name].extend(values)

    def add_log_means(self, logs: dict[str, float]) -> None:
        """Add what was measured since the last line of metrics; asked on all ranks."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop on a broken loss."""
        if self.model.training and "loss" in logs:
            self.add_log_means(logs)
            self._stop_if_broken(logs["loss"])
        super().log(logs, start_time)


# Loaders in luthier's own order, for every trainer over rows of a table.


class LoaderMixin(TrainerMixin):
    """Stands before a trainer: `class Mine(Ordered, Trainer)`."""

    batching: BatchingSettings

    def sampler(self, rows: TokenRows, size: int, processes: int, is_training: bool) -> Sampler:
        """The order of the rows; `size`: those of a batch of one process."""
        make = build_train_sampler if is_training else build_eval_sampler
        return make(rows, self.batching, self.args, size, processes)

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows in this order, as the trainer's collator takes them."""
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
        """Make a loader with luthier's own samplers."""
        in_step = self._train_batch_size * self.args.gradient_accumulation_steps
        processes = self.get_total_train_batch_size(self.args) // in_step
        sampler = self.sampler(dataset, batch_size, processes, is_training)
        return super()._get_dataloader(
            dataset=self.order_rows(sampler, is_training),
            description=description,
            batch_size=batch_size,
            sampler_fn=lambda rows: sampler,
            is_training=is_training,
            dataloader_key=dataloader_key,
        )
