"""Distillation: the model answers prompts, and learns what a teacher would have said at each token.

On-policy distillation, https://huggingface.co/papers/2306.13649.
"""

from typing import Any

from trl import DistillationConfig, DistillationTrainer

from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model.device import choose_machine
from luthier.model.load import load_model
from luthier.model.tokenizer import load_tokenizer
from luthier.train.methods.method import TrainerInputs, TrainingMethod
from luthier.train.methods.online import (
    OnlineTrainerMixin,
    make_prompt_datasets,
    stop_token_ids,
)


class LuthierDistillationTrainer(OnlineTrainerMixin, DistillationTrainer):
    """TRL's DistillationTrainer over prompts of luthier's own."""


class DistillMethod(TrainingMethod):
    """Trains the model, the student, on how its next tokens differ from a teacher's."""

    arguments_class = DistillationConfig

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """Rows keep their columns; without dropout the model that trains is the one that writes."""
        disable_dropout = config.trainer.args.disable_dropout is not False
        return {"disable_dropout": disable_dropout, "remove_unused_columns": False}

    def build_trainer(self, inputs: TrainerInputs) -> LuthierDistillationTrainer:
        """Return TRL's trainer, with the teacher; UserError for one of another vocabulary."""
        config = inputs.config
        train, sets = make_prompt_datasets(inputs.prepared)
        teacher = teacher_config(config)
        _check_vocabulary(inputs.tokenizer, teacher)
        try:
            return LuthierDistillationTrainer(
                teacher_model=load_model(teacher, {}, choose_machine(config.model)),
                stop_ids=stop_token_ids(config, inputs.tokenizer),
                train_rows=train,
                eval_rows=sets,
                **inputs.common_arguments(),
            )
        except ValueError as error:
            raise UserError(f"trainer.teacher={teacher.path}: {error}") from error


def teacher_config(config: RunConfig) -> ModelConfig:
    """The teacher's part of the config; it is put on the device as the model is."""
    assert config.trainer.teacher is not None
    revision = config.trainer.args.teacher_model_revision
    update = {
        "path": config.trainer.teacher,
        "revision": revision,
        "tokenizer": None,
        "loader": None,
    }
    return config.model.model_copy(update=update)


def _check_vocabulary(tokenizer: Any, teacher: ModelConfig) -> None:
    """Refuse a teacher for which the same ids are other tokens."""
    student_ids, teacher_ids = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if student_ids == teacher_ids:
        return
    differing = [token for token in student_ids if student_ids[token] != teacher_ids.get(token)]
    token = next(iter(differing or (token for token in teacher_ids if token not in student_ids)))
    raise UserError(
        f"trainer.teacher={teacher.path}: its vocabulary is another one ({token!r} is "
        f"{student_ids.get(token, 'no token')} here and {teacher_ids.get(token, 'no token')} "
        "there), and the two are compared token by token. Take a teacher of the same family."
    )
