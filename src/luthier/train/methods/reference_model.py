"""Trainers that compare the model with what it was: the reference, and what it says of each row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import TableWithColumns
from luthier.data.batching.token_rows import TokenRows
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.model.trainable import add_new_rows
from luthier.train.methods.preference_trainer import PlaceholderDataset, RowScores

if TYPE_CHECKING:
    from luthier.train.methods.preference_trainer import PreferenceTrainerMixin as Base
else:
    Base = object

ADAPTER_COPY = "ref"
"""TRL's name for its copy of an adapter."""


class Referring(Base):
    """Stands before `PreferenceTrainerMixin` where the loss needs a reference.

    That is the model with its adapter off, or a model of its own for full fine-tuning. With
    `precompute_ref_log_probs` it is asked once, before training, and then let go of.
    """

    reference_columns: Sequence[str]
    """The columns in which a batch has what the reference says."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        with _plain_copy(model):
            super().__init__(model, **kwargs)
        _drop_copy(self.model)
        if self.args.precompute_ref_log_probs:
            self._precompute_all()

    def reference_scores(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of a batch, under the names of `references`."""
        raise NotImplementedError

    def reference(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of a batch, asked now or known already."""
        if self.precompute_ref_logps:
            return {name: inputs[name] for name in self.reference_columns}
        return self.reference_scores(inputs)

    def _precompute_all(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "trainer.args.precompute_ref_log_probs=true: the weights are split over devices, "
                "and that is done when training begins.\nSet it to false."
            )
        args, sets = self.args, self.eval_dataset
        sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
        train, evaluated = (args.precompute_ref_batch_size or size for size in sizes)
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", train)
        if isinstance(sets, dict):
            self.eval_dataset = {
                name: self._precompute_ref_logps(rows, name, evaluated)
                for name, rows in sets.items()
            }
        elif sets is not None:
            self.eval_dataset = self._precompute_ref_logps(sets, "eval", evaluated)
        self.ref_model = None

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The rows with what the reference says of each."""
        if isinstance(dataset, PlaceholderDataset):
            return dataset
        # A row that an epoch sees twice is asked about once.
        rows = TokenRows(dataset.table, dataset.different)
        columns = {column: np.zeros(len(dataset.table.lengths), np.float32) for column in
                   self.reference_columns}  # fmt: skip
        for numbers, found in self._asked(rows, name, batch_size):
            for column, values in found.items():
                columns[column][numbers] = values
        return TokenRows(TableWithColumns(dataset.table, columns), dataset.index)

    def _asked(self, rows: TokenRows, name: str, size: int) -> Iterator[tuple[Any, Any]]:
        """The numbers of some rows, and what the reference says of them; on all ranks for all."""
        loader = self._get_dataloader(rows, "Reference", size)
        bar = f"reference on {name or 'held-out'} rows"
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for batch in tqdm(loader, desc=bar, disable=hidden):
            inputs = self._prepare_inputs(batch)
            found, real = self.reference_scores(inputs), inputs["real"]
            own = (
                inputs["numbers"][real].cpu().numpy(),
                {column: part[real].float().cpu().numpy() for column, part in found.items()},
            )
            yield from gather_object([own]) if self.args.world_size > 1 else [own]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, without TRL's copy of the adapter, which each start makes anew."""
        model: Any = self.accelerator.unwrap_model(self.model)
        configs = model.peft_config if isinstance(model, PeftModel) else {}
        copy = configs.pop(ADAPTER_COPY, None)
        super()._save(output_dir, state_dict)
        if copy is not None:
            configs[ADAPTER_COPY] = copy


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
    reference = load_model(config.model, config.quantization, machine, full=True)
    add_new_rows(reference, config)
    return reference


@contextmanager
def _plain_copy(model: Any) -> Iterator[None]:
    """Let TRL copy the adapter without drawing one first, which changes the base of some kinds.

    It copies the weights in any case, to be the reference of an adapter that trains on.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    drawn = [vars(config).get("init_lora_weights", True) for config in configs]
    for config in configs:
        config.init_lora_weights = True
    yield
    for config, kind in zip(configs, drawn, strict=True):
        config.init_lora_weights = kind


def _drop_copy(model: Any) -> None:
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
