"""A chat session remembers the messages of a conversation with a model."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.chat import ReplyDelta
    from luthier.infer.llm import GeneratedReply

Content = str | list[dict[str, Any]]
"""What a message says: a text, or a list of parts, as `LLM.replies` takes them."""


class ChatSession:
    """A conversation: each message of the user is answered in the light of all before it."""

    def __init__(
        self,
        answer: "Callable[..., Iterator[ReplyDelta]]",
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """`answer`: `LLM.stream_deltas`, or what takes a prompt and settings as it does."""
        self._answer = answer
        self.tools = tools
        """The JSON schemas of the tools that the model may call; None for no tools."""
        self.system = system
        """What stands in front of the conversation; None for nothing."""
        self.turns: list[dict[str, Any]] = []
        """The messages so far, without the system prompt; replies with reasoning and calls."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as it stands, system prompt and all."""
        front = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*front, *self.turns]

    def say(self, text: Content, **settings: Any) -> str:
        """Say something and return the reply's content; takes the settings of `LLM.replies`.

        `text` may be a list of parts, texts and images, for a model that reads images. The last of
        `turns` is the whole message, with its reasoning and its calls.
        """
        return "".join(self.stream(text, **settings))

    def stream(self, text: Content, **settings: Any) -> Generator[str]:
        """Say something and yield the reply's content piece by piece."""
        for delta in self.stream_deltas(text, **settings):
            if delta.field == "content":
                yield delta.text

    def stream_deltas(
        self,
        text: Content,
        on_end: "Callable[[GeneratedReply], None] | None" = None,
        **settings: Any,
    ) -> "Generator[ReplyDelta]":
        """Say something and yield the reply in pieces of content, reasoning and calls.

        A reply that is stopped midway stays in the conversation as far as it came. Where it is
        stopped before that, or the model could not answer, the conversation is as it was.
        """
        return self._go_on([{"role": "user", "content": text}], on_end, settings)

    def answer_calls(
        self,
        results: Sequence[str],
        on_end: "Callable[[GeneratedReply], None] | None" = None,
        **settings: Any,
    ) -> "Generator[ReplyDelta]":
        """Give the results of the last reply's calls, in their order, and yield the next reply.

        Raises UserError where the last reply has another number of calls.
        """
        calls = (self.turns[-1] if self.turns else {}).get("tool_calls", [])
        if not calls or len(results) != len(calls):
            raise UserError(
                f"answer_calls: there are {len(results)} results, and the last reply has "
                f"{len(calls)} calls."
            )
        messages = [
            {
                "role": "tool",
                "name": call["function"]["name"],
                "tool_call_id": call["id"],
                "content": result,
            }
            for call, result in zip(calls, results, strict=True)
        ]
        return self._go_on(messages, on_end, settings)

    def _go_on(
        self,
        messages: list[dict[str, Any]],
        on_end: "Callable[[GeneratedReply], None] | None",
        settings: dict[str, Any],
    ) -> "Generator[ReplyDelta]":
        """Add messages and yield the reply to them."""
        count = len(self.turns)
        self.turns += messages
        texts = {"content": "", "reasoning": ""}
        ended: list[GeneratedReply] = []
        try:
            prompt = {"messages": self.messages, "tools": self.tools}
            for delta in self._answer(prompt, on_end=ended.append, **settings):
                if delta.field != "tool_call":
                    texts[delta.field] += delta.text
                yield delta
        finally:
            # `finally` also runs when the reader closes the generator (Ctrl-C): a question without
            # any reply would make the next prompt one of two user messages, which templates refuse.
            if ended:
                self.turns.append(ended[0].message)
            elif any(texts.values()):
                self.turns.append(_stopped_message(texts))
            else:
                del self.turns[count:]
        if on_end is not None:
            on_end(*ended)

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns.clear()

    def take_back(self, contents: Sequence[Content]) -> None:
        """Forget what was said last, and its reply: one content, or the results of calls.

        Where the model could not answer them, they are not in the conversation, which stays.
        """
        has_reply = bool(self.turns) and self.turns[-1]["role"] == "assistant"
        start = len(self.turns) - has_reply - len(contents)
        last = self.turns[max(start, 0) : len(self.turns) - has_reply]
        if [turn["content"] for turn in last] == list(contents):
            del self.turns[start:]


def _stopped_message(texts: dict[str, str]) -> dict[str, Any]:
    """Return the message of a reply as far as it came."""
    message: dict[str, Any] = {"role": "assistant", "content": texts["content"]}
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    return message
