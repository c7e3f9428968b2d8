"""Fields whose text no sequence of the row shows: the template drops them without a word.

A model trained on such a row (Llama-3's template drops tool calls) would learn to stop at once.
"""

from __future__ import annotations

import re

from luthier.chat.conversation import REASONING_FIELDS, Conversation
from luthier.chat.provenance import FieldOrigin, TracedStr
from luthier.chat.template import ChatTemplate
from luthier.chat.turns import RenderedSequence
from luthier.chat.types import ChatError

# Tags around thoughts: templates that take them off write their own in their place.
_TAGS = re.compile(r"</?\w+>|\[/?[A-Z_]+\]|<\|\w+\|>")


def find_lost_fields(
    conversation: Conversation, sequences: list[RenderedSequence], template: ChatTemplate
) -> list[ChatError]:
    """Return one error for each non-empty field that is in none of the sequences, in order."""
    for sequence in sequences:
        _mark_complete_fields(sequence.text)
    missing = [origin for origin in conversation.origins if not origin.is_complete]
    if not missing:
        return []
    texts = [sequence.text for sequence in sequences]
    trained = {span.message for sequence in sequences for span in sequence.spans}
    return [
        _lost_field_error(origin)
        for origin in missing
        if not _is_complete(origin, texts)
        and not _is_history(origin, trained, conversation, template)
    ]


def find_lost_field_of_turn(
    conversation: Conversation, message: int, template: ChatTemplate
) -> ChatError | None:
    """Return an error for a field of a message that its own turn does not show; None without one.

    `message`: its number. A turn that shows nothing has no visible beginning and no end either.
    """
    index = conversation.numbers.index(message)
    try:
        turn = template.render(conversation.messages[: index + 1], conversation.tools, False)
    except ChatError:
        return None
    _mark_complete_fields(turn)
    origins = [origin for origin in conversation.origins if origin.message == message]
    lost = (o for o in origins if not o.is_complete and not _is_complete(o, [turn]))
    return next(map(_lost_field_error, lost), None)


def _mark_complete_fields(text: TracedStr) -> None:
    """Note the fields that the text holds in one run."""
    for length, origin, start in text._runs:
        if origin is None:
            continue
        if origin.covers:
            for leaf in origin.covers:
                leaf.is_complete = leaf.is_complete or not leaf.is_json
        elif (
            (start < 0 and not origin.is_json) or origin.text is None or length == len(origin.text)
        ):
            origin.is_complete = True


def _is_complete(origin: FieldOrigin, texts: list[TracedStr]) -> bool:
    """Return whether the field's text is there, but for space and for tags that mark its parts."""
    if origin.text is None:
        return False
    # A template may write a field in pieces, for example reasoning and answer apart.
    missing = list(origin.text)
    for text in texts:
        for length, source, start in text._runs:
            if source is origin and start >= 0:
                missing[start : start + length] = [""] * length
    return not _TAGS.sub("", "".join(missing)).strip()


def _is_history(
    origin: FieldOrigin, trained: set[int], conversation: Conversation, template: ChatTemplate
) -> bool:
    """Return whether a template strips this from history only: reasoning of an untrained turn."""
    if origin.message is None or origin.message in trained or origin.role != "assistant":
        return False
    if origin.field not in (*REASONING_FIELDS, "content"):
        return False
    # Text that stands in the turn's own context is stripped from history by intent.
    index = conversation.numbers.index(origin.message)
    try:
        turn = template.render(conversation.messages[: index + 1], conversation.tools, False)
    except ChatError:
        return False
    _mark_complete_fields(turn)
    return origin.is_complete or _is_complete(origin, [turn])


def _lost_field_error(origin: FieldOrigin) -> ChatError:
    if origin.is_json:
        return ChatError(
            "the call's arguments are text, which this template leaves out or encodes once more; "
            "give them as an object, or as JSON text of one",
            reason="lost",
            message=origin.message,
            field=origin.field,
        )
    start = " ".join((origin.text or "").split())[:60]
    what = "the row's tools" if origin.field == "tools" else f"this text ({start!r})"
    return ChatError(
        f"the chat template does not show {what}, so a model trained on the row would not see it; "
        "use a template that shows it, remove it, or set chat.on_lost=drop or chat.on_lost=keep",
        reason="lost",
        message=origin.message,
        field=origin.field,
    )
