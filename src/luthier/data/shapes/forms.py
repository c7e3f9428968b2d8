"""The forms in which rows come: which columns each needs, and what it makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from luthier.data.rows import Row
from luthier.data.shapes import evidence
from luthier.data.shapes.columns import Columns
from luthier.data.shapes.conversation import (
    Example,
    from_alpaca,
    from_messages,
    from_prompt,
    from_prompt_completion,
    from_sharegpt,
)
from luthier.data.shapes.labelled import (
    from_classification,
    from_classified_pair,
    from_seq2seq,
    from_tagging,
    from_text,
)
from luthier.data.shapes.pairs import (
    from_alpaca_pair,
    from_implicit_pair,
    from_judged_alpaca,
    from_judged_completion,
    from_judged_messages,
    from_messages_pair,
    from_prompted_pair,
)

Kind = Literal[
    "conversation", "text", "preference", "unpaired", "classification", "tagging", "seq2seq"
]
VERSION = 2
"""Changes whenever the same row would give another example."""


@dataclass(frozen=True)
class Slot:
    """One of our columns, and the names under which datasets have it."""

    ours: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """One way to write a shape."""

    shape: str
    kind: Kind
    needs: tuple[Slot, ...]
    optional: tuple[Slot, ...]
    read: Callable[[Row, Columns], Example]
    judge: Callable[[evidence.Sample], evidence.Evidence] = evidence.certain
    """What the values of its columns say."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Our names of all its columns."""
        return tuple(slot.ours for slot in (*self.needs, *self.optional))


_MESSAGES = Slot("messages", ("messages", "conversation", "conversations", "dialogue", "dialog"))
_TURNS = Slot("conversations", ("conversations", "messages", "conversation", "dialogue", "dialog"))
_EITHER = Slot("messages", ("messages", "conversations", "conversation"))
PROMPT = Slot("prompt", ("prompt", "question", "query", "input", "instruction"))
COMPLETION = Slot("completion", ("completion", "answer", "response", "output"))
_INSTRUCTION = Slot("instruction", ("instruction",))
_OUTPUT = Slot("output", ("output", "response"))
_VERDICT = Slot("label", ("label", "kto_tag"))
_TEXT = Slot("text", ("text",))
_LABEL = Slot("label", ("label", "labels"))
_PAIR = (Slot("chosen", ("chosen",)), Slot("rejected", ("rejected",)))
_CHAT = (
    Slot("tools", ("tools", "functions")),
    Slot("system", ("system", "system_prompt", "system_message")),
)
_ALPACA = (Slot("input", ("input", "context")), Slot("history", ("history",)), *_CHAT)

_TEXT_PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""How SNLI, GLUE and their like name the two texts of a pair."""


def _classified_pair(text: str, text_pair: str) -> Form:
    """The form of two texts with a class, under these names."""
    needs = (Slot("text", (text,)), Slot("text_pair", (text_pair,)), _LABEL)
    return Form("classification", "classification", needs, (), from_classified_pair)


FORMS: tuple[Form, ...] = (
    Form("messages", "conversation", (_MESSAGES,), _CHAT, from_messages, evidence.messages),
    Form("sharegpt", "conversation", (_TURNS,), _CHAT, from_sharegpt, evidence.turns),
    Form("alpaca", "conversation", (_INSTRUCTION, _OUTPUT), _ALPACA, from_alpaca),
    Form(
        "prompt_completion", "conversation", (PROMPT, COMPLETION), _CHAT,
        from_prompt_completion, evidence.spoken,
    ),
    Form("prompt", "conversation", (PROMPT,), _CHAT, from_prompt, evidence.named_only),
    Form(
        "preference", "preference", (_EITHER, *_PAIR), _CHAT,
        from_messages_pair, evidence.open_messages,
    ),
    Form("preference", "preference", (_INSTRUCTION, *_PAIR), _ALPACA, from_alpaca_pair),
    Form("preference", "preference", (PROMPT, *_PAIR), _CHAT, from_prompted_pair, evidence.spoken),
    Form("preference", "preference", _PAIR, _CHAT, from_implicit_pair),
    Form(
        "unpaired", "unpaired", (_EITHER, _VERDICT), _CHAT,
        from_judged_messages, evidence.judged_messages,
    ),
    Form(
        "unpaired", "unpaired", (_INSTRUCTION, _OUTPUT, _VERDICT), _ALPACA,
        from_judged_alpaca, evidence.judged,
    ),
    Form(
        "unpaired", "unpaired", (PROMPT, COMPLETION, _VERDICT), _CHAT,
        from_judged_completion, evidence.judged,
    ),
    *(_classified_pair(*names) for names in _TEXT_PAIRS),
    Form(
        "classification", "classification", (Slot("text", ("text", "sentence")), _LABEL), (),
        from_classification,
    ),
    Form(
        "tagging", "tagging",
        (Slot("tokens", ("tokens", "words")), Slot("tags", ("tags", "ner_tags", "labels"))), (),
        from_tagging, evidence.lists,
    ),
    Form(
        "seq2seq", "seq2seq", (Slot("source", ("source",)), Slot("target", ("target",))), (),
        from_seq2seq,
    ),
    Form("text", "text", (_TEXT,), (), from_text),
)  # fmt: skip
"""All of them; of two that need the same columns the first is meant."""
