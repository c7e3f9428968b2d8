"""The reference model of DPO and KTO, and what it says of each row.

The reference is the model with its adapter off, or a model of its own for full fine-tuning. With
`precompute_ref_log_probs` it reads every row once, before training, and is then let go of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import TableWithColumns
from luthier.data.batching.token_rows import TokenRows
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.expert_adapters import add_drawn_adapter
from luthier.model.load import load_model
from luthier.model.trainable import add_new_rows
from luthier.terminal import ProgressReport

ADAPTER_COPY = "ref"
"""TRL's name for its copy of an adapter."""


def check_reference_settings(config: RunConfig) -> None:
    """Raise UserError for settings with which the reference would not be what the model was."""
    if config.lora.bias != "none":
        raise UserError(
            f"lora.bias={config.lora.bias}: the reference is the model with its adapter off, and"
            " trained biases stay on.\nSet lora.bias=none, or lora=none to train all weights."
        )


def load_reference_model(config: RunConfig, machine: Machine) -> Any:
    """The model as it is before training, for full fine-tuning; None where no copy is needed."""
    if config.lora.is_enabled or config.trainer.args.precompute_ref_log_probs:
        return None
    # In float32, as the weights of the model that trains.
    reference = load_model(config.model, config.quantization, machine, full=True)
    add_new_rows(reference, config)
    return reference


def precompute_all_scores(trainer: Any) -> None:
    """Let the reference read all rows of a trainer once, and let go of it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "trainer.args.precompute_ref_log_probs=true: the weights are split over devices, "
            "and that is done when training begins.\nSet it to false."
        )
    args, sets = trainer.args, trainer.eval_dataset
    sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
    train_size, eval_size = (args.precompute_ref_batch_size or size for size in sizes)
    precompute = trainer._precompute_ref_logps
    trainer.train_dataset = precompute(trainer.train_dataset, "train", train_size)
    if isinstance(sets, dict):
        trainer.eval_dataset = {
            name: precompute(rows, name, eval_size) for name, rows in sets.items()
        }
    elif sets is not None:
        trainer.eval_dataset = precompute(sets, "eval", eval_size)
    trainer.ref_model = None


def precompute_scores(trainer: Any, dataset: TokenRows, name: str, batch_size: int) -> TokenRows:
    """The rows of a set with what the reference says of each, as columns of their table."""
    # A row that an epoch sees twice is read once.
    distinct = TokenRows(dataset.table, dataset.different, read_images=dataset.read_images)
    columns = {
        column: np.zeros(len(dataset.table.lengths), np.float32)
        for column in trainer.reference_columns
    }
    for numbers, scores in _score_batches(trainer, distinct, name, batch_size):
        for column, values in scores.items():
            columns[column][numbers] = values
    table = TableWithColumns(dataset.table, columns)
    return TokenRows(table, dataset.index, read_images=dataset.read_images)


def _score_batches(
    trainer: Any, rows: TokenRows, name: str, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The numbers of some rows, and what the reference says of them; on all ranks for all."""
    loader = trainer._get_dataloader(rows, "Reference", batch_size)
    title = f"reference on {name or 'held-out'} rows"
    is_silent = not trainer.is_world_process_zero()
    report = ProgressReport(len(loader), title, "batches", is_silent)
    for batch in loader:
        inputs = trainer._prepare_inputs(batch)
        scores, real = trainer.score_reference(inputs), inputs["real"]
        scored_rows = (
            inputs["numbers"][real].cpu().numpy(),
            {column: values[real].float().cpu().numpy() for column, values in scores.items()},
        )
        yield from gather_object([scored_rows]) if trainer.args.world_size > 1 else [scored_rows]
        report.update()
    report.close()


# TRL 1.16 copies the adapter of a model as one called "ref", to be the reference of an adapter
# that trains on. luthier's adapters are new, so the model without them is the reference.


@contextmanager
def copy_adapter_undrawn(model: Any) -> Iterator[None]:
    """Let TRL copy the adapter within the block, also on experts, without drawing weights first.

    PiSSA, OLoRA and their like change the base model's weights when an adapter is drawn; the copy
    gets the adapter's weights in any case.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    configs = list(model.peft_config.values())
    initializations = [vars(config).get("init_lora_weights", True) for config in configs]
    for config in configs:
        config.init_lora_weights = True
    # peft 0.21 by itself puts no second adapter on luthier's layers of experts.
    vars(model)["add_adapter"] = partial(add_drawn_adapter, model)
    try:
        yield
    finally:
        del vars(model)["add_adapter"]
        for config, initialization in zip(configs, initializations, strict=True):
            config.init_lora_weights = initialization


def drop_unchanged_copy(model: Any) -> None:
    """Remove TRL's copy of an adapter that changes nothing yet: the model without it is the same.

    The copy would cost memory at every step.
    """
    if not isinstance(model, PeftModel) or ADAPTER_COPY not in model.peft_config:
        return
    outer = [
        parameter
        for name, parameter in model.named_parameters()
        if "lora_B.default" in name or "lora_embedding_B.default" in name
    ]
    if outer and not any(bool(torch.any(parameter)) for parameter in outer):
        model.delete_adapter(ADAPTER_COPY)


@contextmanager
def set_copy_aside(model: Any) -> Iterator[None]:
    """Save a model within the block without TRL's copy of its adapter, if it has one."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    copy_config = configs.pop(ADAPTER_COPY, None)
    yield
    if copy_config is not None:
        configs[ADAPTER_COPY] = copy_config
