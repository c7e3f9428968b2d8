"""Conversations to token ids and labels, exact for every chat template."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.chat.encoder import ChatEncoder
    from luthier.chat.images import ImageExpander
    from luthier.chat.reply_parser import ParsedReply, ReplyDelta, ReplyStream
    from luthier.chat.types import (
        IGNORED,
        ChatBatch,
        ChatError,
        ChatSequence,
        ImageSpan,
        Reply,
        Segment,
    )

__all__ = [
    "IGNORED",
    "ChatBatch",
    "ChatEncoder",
    "ChatError",
    "ChatSequence",
    "ImageExpander",
    "ImageSpan",
    "ParsedReply",
    "Reply",
    "ReplyDelta",
    "ReplyStream",
    "Segment",
]

_HOMES = {
    "ChatEncoder": "encoder",
    "ImageExpander": "images",
    **dict.fromkeys(("ParsedReply", "ReplyDelta", "ReplyStream"), "reply_parser"),
}
"""Public names -> their modules, where that is not `types`. Jinja is imported for those that need
it, and not for a template that is no file."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(f"luthier.chat.{_HOMES.get(name, 'types')}"), name)
    raise AttributeError(f"module 'luthier.chat' has no attribute {name!r}")
