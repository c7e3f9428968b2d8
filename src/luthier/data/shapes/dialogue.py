"""Conversations written as one text, as in Anthropic's hh-rlhf."""

import re

from luthier.data.shapes.messages import Message

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_dialogue(text: str) -> list[Message] | None:
    r"""The messages of a text such as `\n\nHuman: Hi\n\nAssistant: Hello`; None for any other."""
    before, *pieces = _TURN.split(text)
    if before or not pieces:
        return None
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": said} for speaker, said in turns]


def read_prompt(text: str) -> list[Message]:
    r"""A prompt as messages: a whole dialogue up to `\n\nAssistant:`, or what one user says."""
    messages = read_dialogue(text)
    if messages is None:
        return [{"role": "user", "content": text}]
    is_open = messages[-1] == {"role": "assistant", "content": ""}
    return messages[:-1] if is_open else messages
