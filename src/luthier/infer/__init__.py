"""Replies from a model: batched generation from the chat encoder's own prompts, and their score."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.infer.llm import LLM, GeneratedReply

__all__ = ["LLM", "GeneratedReply"]


def __getattr__(name: str) -> Any:
    # numpy and pyarrow come with it, which the commands' help and mistakes do not need.
    if name in __all__:
        from luthier.infer import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'luthier.infer' has no attribute {name!r}")
