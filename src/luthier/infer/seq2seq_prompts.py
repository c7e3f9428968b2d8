"""What an encoder-decoder model is asked: the sources of rows, as in training."""

from collections.abc import Sequence
from typing import Any

from luthier.data.encoders.tasks import Seq2SeqEncoder


class Seq2SeqPrompts:
    """Stands where a chat encoder makes the prompts."""

    def __init__(self, encoder: Seq2SeqEncoder, stop_token_ids: Sequence[int]) -> None:
        self._encoder = encoder
        self.stop_token_ids = list(stop_token_ids)
        """Where a reply ends."""

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[int]:
        """The ids of a source, which is the only message."""
        (message,) = messages
        return self._encoder.source(message["content"])
