"""Replies from a model: batched generation from the chat encoder's own prompts, and their score."""

from luthier.infer.llm import LLM, GeneratedReply

__all__ = ["LLM", "GeneratedReply"]
