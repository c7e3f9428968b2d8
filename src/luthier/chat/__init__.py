"""Conversations to token ids and labels, exact for every chat template."""

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
