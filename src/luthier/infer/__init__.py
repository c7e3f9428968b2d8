"""Replies from a model: batched generation from the chat encoder's own prompts, and their score."""

from luthier.infer.llm import LLM, Reply

__all__ = ["LLM", "Reply"]
