"""Images in a conversation: where a template shows them, and the text that stands for each."""

from __future__ import annotations

from typing import Any, Protocol


class ImageExpander(Protocol):
    """What a vision-language model's processor makes of an image in a rendered text.

    `model.vision_processor.VisionProcessor` is one; this package reads no picture itself.
    """

    placeholder: str
    """The token that a chat template writes for an image part, such as `<|image_pad|>`."""
    prefix_ids: list[int]
    """The ids that the processor's own call puts in front of a text which does not begin with the
    BOS token; empty where it puts none."""

    def expand(self, image: Any) -> str:
        """Return the text that stands for an image: the processor's own replacement text.

        `image`: what an image part holds under `image`, as the rows have it.
        """

    def settings(self) -> dict[str, Any]:
        """Return everything that decides these texts, for JSON."""
