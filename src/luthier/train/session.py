"""What takes part in one training."""

from dataclasses import dataclass
from pathlib import Path

from luthier.chat import ChatEncoder
from luthier.config.schema import RunConfig
from luthier.infer.score import Question
from luthier.record.record import RunRecord
from luthier.train.sft import TokenTrainer


@dataclass(frozen=True)
class Session:
    """All that takes part in one training, built and checked, before the first step."""

    config: RunConfig
    folder: Path
    record: RunRecord
    main: bool
    encoder: ChatEncoder
    trainer: TokenTrainer
    questions: list[Question]
