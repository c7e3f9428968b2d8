"""What takes part in one training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.chat import ChatEncoder
from luthier.config.schema import RunConfig
from luthier.record.record import RunRecord
from luthier.train.evaluation import EvalPrompts, EvalReplies, EvalRepliesCallback, ReplyGenerator

AfterSave = Callable[[Path], str | None]
"""Takes the folder of a finished run; returns why something could not be written, or None."""


@dataclass(frozen=True)
class TrainingSession:
    """All that takes part in one training, built and checked, before the first step."""

    config: RunConfig
    folder: Path
    record: RunRecord
    main: bool
    encoder: ChatEncoder | None
    """None for a method that reads no conversations."""
    trainer: Any
    """The method's; a `transformers.Trainer`."""
    answers: ReplyGenerator
    during: EvalRepliesCallback | None = None
    """What answers at every evaluation, where `trainer.evaluation.when` says so."""

    after_save: AfterSave | None = None
    """What is called with the folder of the finished run; None calls nothing."""

    def answered(self, asked: EvalPrompts, when: str, step: int | None) -> EvalReplies:
        """The replies of the model as it stands: those of the last evaluation if it was at `step`.

        `step`: whose weights the model has; None where that is not known.
        """
        found = None if self.during is None or step is None else self.during.at(asked.name, step)
        return found or self.answers.to(asked, when)
