"""A conversation with a model: it remembers what was said."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.infer.llm import LLM


class Chat:
    """A conversation: each message of the user is answered in the light of all before it."""

    def __init__(
        self, llm: "LLM", system: str | None = None, tools: list[dict[str, Any]] | None = None
    ) -> None:
        self._llm, self._tools = llm, tools
        self.system = system
        """What stands in front of the conversation; None for nothing."""
        self.turns: list[dict[str, Any]] = []
        """The messages of user and assistant so far."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as it stands, system prompt and all."""
        front = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*front, *self.turns]

    def say(self, text: str, **given: Any) -> str:
        """Say something and return the reply; takes the settings of `LLM.replies`."""
        return "".join(self.stream(text, **given))

    def stream(self, text: str, **given: Any) -> Iterator[str]:
        """Say something and yield the reply piece by piece.

        A reply that is stopped midway stays in the conversation as far as it came. Where nothing
        came, or the model could not answer, the conversation is as it was.
        """
        self.turns.append({"role": "user", "content": text})
        reply = ""
        try:
            for piece in self._pieces(given):
                reply += piece
                yield piece
        finally:
            if reply:
                self.turns.append({"role": "assistant", "content": reply})
            else:
                self.turns.pop()

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns.clear()

    def _pieces(self, given: dict[str, Any]) -> Iterator[str]:
        return self._llm.stream({"messages": self.messages, "tools": self._tools}, **given)
