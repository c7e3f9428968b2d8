"""Distillation: the model answers prompts, and learns what a teacher would have said at each token.

On-policy distillation, https://huggingface.co/papers/2306.13649.
"""

from pathlib import Path
from typing import Any

from trl import DistillationConfig, DistillationTrainer

from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine, choose_machine
from luthier.model.load import load_model
from luthier.model.tokenizer import load_tokenizer
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.method import TrainerInputs
from luthier.train.methods.online import OnlineTrainerMixin, make_prompt_datasets, stop_token_ids


class LuthierDistillationTrainer(OnlineTrainerMixin, DistillationTrainer):
    """TRL's DistillationTrainer over prompts of luthier's own."""


class DistillMethod:
    """Trains on the difference between the model's and a teacher's next tokens."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The `trl.DistillationConfig`."""
        # Without dropout the completions come from the very model that is trained.
        own = {"disable_dropout": config.trainer.args.disable_dropout is not False}
        own |= {"remove_unused_columns": False}
        return build_trainer_arguments(DistillationConfig, config, machine, folder, has_eval, own)

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A causal language model: the student."""
        return load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled
        )

    def build_trainer(self, given: TrainerInputs) -> LuthierDistillationTrainer:
        """TRL's trainer, with the teacher; UserError for one of another vocabulary."""
        config = given.config
        train, sets = make_prompt_datasets(given.prepared)
        teacher = teacher_config(config)
        _check_vocabulary(given.tokenizer, teacher)
        try:
            return LuthierDistillationTrainer(
                model=given.model,
                teacher_model=load_model(teacher, {}, choose_machine(config.model)),
                stop_ids=stop_token_ids(config, given.tokenizer),
                train_rows=train,
                eval_rows=sets,
                args=given.args,
                processing_class=given.tokenizer,
                callbacks=given.callbacks,
            )
        except ValueError as error:
            raise UserError(f"trainer.teacher={teacher.path}: {error}") from error


def teacher_config(config: RunConfig) -> ModelConfig:
    """Where the teacher is; it is put on this machine as the model is."""
    assert config.trainer.teacher is not None
    revision = config.trainer.args.teacher_model_revision
    own = {"path": config.trainer.teacher, "revision": revision, "tokenizer": None}
    return config.model.model_copy(update=own)


def _check_vocabulary(tokenizer: Any, teacher: ModelConfig) -> None:
    """Refuse a teacher for which the same ids are other tokens."""
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours == theirs:
        return
    other = next((token for token in ours if ours[token] != theirs.get(token)), None)
    if other is None:
        other = next(token for token in theirs if token not in ours)
    raise UserError(
        f"trainer.teacher={teacher.path}: its vocabulary is another one ({other!r} is "
        f"{ours.get(other, 'no token')} here and {theirs.get(other, 'no token')} there), and the "
        "two are compared token by token. Take a teacher of the same family."
    )
