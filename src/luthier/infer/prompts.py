"""Prompts in any form become the token ids that a model reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.chat import ChatEncoder, ChatError, ParsedReply, ReplyStream
from luthier.errors import UserError
from luthier.infer.prompt_images import name_prompts
from luthier.infer.seq2seq_prompts import Seq2SeqPrompts

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A user's message, token ids, the messages of a conversation, or a dict of `messages` and perhaps
`tools` and `chat_template_kwargs`, variables for the chat template. The content of a message is a
text, or a list of parts: texts and images."""


class Prompts:
    """Makes prompts as the training did: from the run's own encoder, special tokens once."""

    def __init__(
        self, tokenizer: Any, encoder: ChatEncoder | Seq2SeqPrompts | None, context: int | None
    ) -> None:
        """`encoder`: None for a model without a chat template, which goes on with plain text.

        `context`: the most tokens of a prompt and its reply together.
        """
        self._tokenizer, self._encoder, self._context = tokenizer, encoder, context

    def ids(
        self, prompts: Sequence[Prompt], places: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Return the ids of each prompt; raises UserError with the place of one that makes none.

        `places` say where each prompt comes from; `prompt 1` and so on if there are none.
        """
        names = name_prompts(prompts, places)
        return [self._one(prompt, name) for prompt, name in zip(prompts, names, strict=True)]

    def parse(self, prompt: Prompt, ids: Sequence[int]) -> ParsedReply | None:
        """Return the message that the reply to a prompt is, as `ChatEncoder.parse` reads its ids.

        None where there is no chat template, or the prompt came as ids: its conversation is not
        known.
        """
        row = self._conversation(prompt)
        return row if row is None else self._chat().parse(ids, **row)

    def stream_parser(self, prompt: Prompt) -> ReplyStream | None:
        """Return what takes the reply to a prompt apart while it comes; None as `parse` has it."""
        row = self._conversation(prompt)
        return row if row is None else self._chat().stream_parser(**row)

    def turn(self, prompt: Prompt) -> int:
        """Return the number of messages in a prompt; 0 where that is not known."""
        return len((self._conversation(prompt) or {"messages": ()})["messages"])

    def _chat(self) -> ChatEncoder:
        assert isinstance(self._encoder, ChatEncoder)
        return self._encoder

    def _conversation(self, prompt: Prompt) -> dict[str, Any] | None:
        """Return a prompt as the arguments of `ChatEncoder.prompt`; None for one of ids."""
        if not isinstance(self._encoder, ChatEncoder):
            return None
        if isinstance(prompt, str):
            return {"messages": [{"role": "user", "content": prompt}]}
        if isinstance(prompt, Mapping):
            names = ("tools", "chat_template_kwargs")
            inputs = {name: prompt.get(name) for name in names}
            return {"messages": list(prompt["messages"]), **inputs}
        if any(isinstance(each, int) for each in prompt):
            return None
        return {"messages": list(prompt)}

    def _one(self, prompt: Prompt, name: str) -> list[int]:
        try:
            ids = self._of(prompt)
        # The encoder knows the mistake and not the prompt's origin: here the two come together.
        except ChatError as error:
            raise UserError(f"{name}: {error}") from error
        if not ids:
            raise UserError(f"{name}: is empty, and this model has no template to begin with.")
        # At least one token of reply must fit behind the prompt.
        if self._context is not None and len(ids) >= self._context:
            raise UserError(
                f"{name}: has {len(ids):,} tokens, and the model reads {self._context:,} with its "
                "reply. Shorten it."
            )
        return ids

    def _of(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._of_text(prompt)
        if isinstance(prompt, Mapping):
            return self._of_messages(
                prompt.get("messages"), prompt.get("tools"), prompt.get("chat_template_kwargs")
            )
        # Token ids go through as they are, special tokens and all: who encodes knows why.
        if isinstance(prompt, Sequence) and prompt and all(isinstance(n, int) for n in prompt):
            return [n for n in prompt if isinstance(n, int)]
        return self._of_messages(prompt)

    def _of_text(self, text: str) -> list[int]:
        if self._encoder is None:
            # Plain text to continue begins with the tokenizer's own special tokens, such as BOS.
            ids: list[int] = self._tokenizer(text)["input_ids"]
            return ids
        return self._encoder.prompt([{"role": "user", "content": text}])

    def _of_messages(self, messages: Any, tools: Any = None, kwargs: Any = None) -> list[int]:
        if not isinstance(messages, Sequence) or not messages:
            raise ChatError(
                "a prompt is a text, or messages; found neither", reason="malformed row"
            )
        if self._encoder is None:
            raise ChatError(
                "the model has no chat template, so it is asked in plain text and not in messages",
                reason="no template",
            )
        # A template would end this turn and begin an empty one: the model would answer itself.
        last = messages[-1]
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            raise ChatError(
                "the conversation ends with a reply, so there is nothing to answer; leave it out",
                reason="malformed row",
            )
        inputs = {"tools": tools, "chat_template_kwargs": kwargs}
        return self._encoder.prompt(list(messages), **inputs)
