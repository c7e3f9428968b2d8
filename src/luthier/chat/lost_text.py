"""Fields whose text no sequence of the row shows."""

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
    """One error for each field that is not in any of the sequences."""
    for sequence in sequences:
        _mark_complete_fields(sequence.text)
    missing = [origin for origin in conversation.origins if not origin.whole]
    if not missing:
        return []
    shown = [sequence.text for sequence in sequences]
    trained = {span.message for sequence in sequences for span in sequence.trained}
    return [
        _lost_field_error(origin)
        for origin in missing
        if not _is_complete(origin, shown)
        and not _is_history(origin, trained, conversation, template)
    ]


def _mark_complete_fields(text: TracedStr) -> None:
    """Note the fields that the text holds in one run."""
    for length, origin, start in text._runs:
        if origin is None:
            continue
        if origin.covers:
            for leaf in origin.covers:
                leaf.whole = leaf.whole or not leaf.encoded
        elif (
            (start < 0 and not origin.encoded) or origin.text is None or length == len(origin.text)
        ):
            origin.whole = True


def _is_complete(origin: FieldOrigin, shown: list[TracedStr]) -> bool:
    """Whether the field's text is there, but for space and for tags that mark its parts."""
    if origin.text is None:
        return False
    left = list(origin.text)
    for text in shown:
        for length, source, start in text._runs:
            if source is origin and start >= 0:
                left[start : start + length] = [""] * length
    return not _TAGS.sub("", "".join(left)).strip()


def _is_history(
    origin: FieldOrigin, trained: set[int], conversation: Conversation, template: ChatTemplate
) -> bool:
    """Whether a template strips this from history only: reasoning of a turn that does not train."""
    if origin.message is None or origin.message in trained or origin.role != "assistant":
        return False
    if origin.field not in (*REASONING_FIELDS, "content"):
        return False
    place = conversation.numbers.index(origin.message)
    try:
        own = template.render(conversation.messages[: place + 1], conversation.tools, False)
    except ChatError:
        return False
    _mark_complete_fields(own)
    return origin.whole or _is_complete(origin, [own])


def _lost_field_error(origin: FieldOrigin) -> ChatError:
    if origin.encoded:
        return ChatError(
            "the call's arguments are a JSON string, which this template leaves out or encodes "
            "once more; give them as a dict",
            reason="lost",
            message=origin.message,
            field=origin.field,
        )
    start = " ".join((origin.text or "").split())[:60]
    what = "the row's tools" if origin.field == "tools" else f"this text ({start!r})"
    return ChatError(
        f"the chat template does not show {what}, so a model trained on the row would not see it; "
        "use a template that shows it, remove it, or set `on_lost` to `drop` or `keep`",
        reason="lost",
        message=origin.message,
        field=origin.field,
    )
