"""Prompts of encoder-decoder models are sources, encoded as in training."""

from collections.abc import Sequence
from typing import Any

from luthier.data.encoders.tasks import Seq2SeqEncoder


class Seq2SeqPrompts:
    """Makes prompts of sources, in the place where a chat encoder makes them of messages."""

    def __init__(self, encoder: Seq2SeqEncoder, stop_token_ids: Sequence[int]) -> None:
        self._encoder = encoder
        self.stop_token_ids = list(stop_token_ids)
        """Where a reply ends."""

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Any = None,
        chat_template_kwargs: Any = None,
    ) -> list[int]:
        """The ids of a source, which is the only message."""
        # The interface is that of ChatEncoder; a source has no template, so what is for one has no
        # meaning here.
        (message,) = messages
        return self._encoder.source(message["content"])
