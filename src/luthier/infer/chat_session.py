"""A chat session remembers the messages of a conversation with a model."""

from collections.abc import Callable, Generator, Iterator
from typing import Any


class ChatSession:
    """A conversation: each message of the user is answered in the light of all before it."""

    def __init__(
        self,
        answer: Callable[..., Iterator[str]],
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """`answer`: `LLM.stream`, or what takes a prompt and settings as it does."""
        self._answer, self._tools = answer, tools
        self.system = system
        """What stands in front of the conversation; None for nothing."""
        self.turns: list[dict[str, Any]] = []
        """The messages of user and assistant so far."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as it stands, system prompt and all."""
        front = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*front, *self.turns]

    def say(self, text: str, **settings: Any) -> str:
        """Say something and return the reply; takes the settings of `LLM.replies`."""
        return "".join(self.stream(text, **settings))

    def stream(self, text: str, **settings: Any) -> Generator[str]:
        """Say something and yield the reply piece by piece.

        A reply that is stopped midway stays in the conversation as far as it came. Where it is
        stopped before that, or the model could not answer, the conversation is as it was.
        """
        self.turns.append({"role": "user", "content": text})
        reply, is_whole = "", False
        try:
            prompt = {"messages": self.messages, "tools": self._tools}
            for piece in self._answer(prompt, **settings):
                reply += piece
                yield piece
            is_whole = True
        finally:
            # `finally` also runs when the reader closes the generator (Ctrl-C): a question without
            # any reply would make the next prompt one of two user messages, which templates refuse.
            if reply or is_whole:
                self.turns.append({"role": "assistant", "content": reply})
            else:
                self.turns.pop()

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns.clear()

    def take_back(self, text: str) -> None:
        """Forget what the user said last, if it was this, and its reply."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        # Only that very message: where the model could not answer, it is not in the conversation.
        if self.turns and self.turns[-1] == {"role": "user", "content": text}:
            self.turns.pop()
