"""Conversations to token ids and labels, exact for every chat template."""

from luthier.chat.encoder import ChatEncoder
from luthier.chat.errors import ChatError
from luthier.chat.sequences import IGNORED, ChatBatch, ChatSequence, Reply, Segment

__all__ = ["IGNORED", "ChatBatch", "ChatEncoder", "ChatError", "ChatSequence", "Reply", "Segment"]
