"""Making a row shorter: whole turns go from the front, what stands above them stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import Conversation
from luthier.chat.fast_path.plans import FastPathEncoder, FormCache
from luthier.chat.labels import EncodedSequence, LabelBuilder
from luthier.chat.template import ChatTemplate, read_template
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import SequencePlanner
from luthier.chat.types import ChatError

# What is known about one template: how it renders, steers, plans and labels.


@dataclass(frozen=True, slots=True)
class TemplatePipeline:
    """All that works on the rows of one template."""

    template: ChatTemplate
    controls: ControlTokens
    planner: SequencePlanner
    labeller: LabelBuilder
    forms: FormCache
    tracks: FastPathEncoder


class TemplatePipelines:
    """The kits of a tokenizer's templates; each is made when it is first asked for."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | dict[str, str] | None,
        variables: dict[str, Any],
        date: str,
        eos_token_ids: Iterable[int],
        boundaries: Literal["served", "segments"],
        train_on: str | list[str],
    ) -> None:
        self.sources = _template_sources(tokenizer, template)
        self._tokens = TokenEncoder(tokenizer)
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._date = date
        self._eos_token_ids = list(eos_token_ids)
        self._boundaries = boundaries
        self._train_on = train_on
        self._made: dict[str, TemplatePipeline] = {}
        self.default = self.of(None)

    def of(self, tools: list | None) -> TemplatePipeline:
        """The kit for rows with these tools, or without any."""
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self._made:
            self._made[name] = self._make(self.sources[name])
        return self._made[name]

    def _make(self, source: str) -> TemplatePipeline:
        template = ChatTemplate(source, self._variables, self._date)
        controls = ControlTokens(template, self._tokens, self._eos_token_ids)
        labeller = LabelBuilder(self._tokens, controls, self._boundaries)
        return TemplatePipeline(
            template,
            controls,
            SequencePlanner(template, controls),
            labeller,
            FormCache(template, controls, self._train_on),
            FastPathEncoder(self._tokens, labeller),
        )


def _template_sources(tokenizer: Any, template: str | dict[str, str] | None) -> dict[str, str]:
    """The text of each template by its name; `default` is always there."""
    if isinstance(template, str):
        return {"default": read_template(template)}
    own = template if template is not None else tokenizer.chat_template
    if own is None:
        raise ChatError(
            "the tokenizer has no chat template; give one as Jinja text or a file "
            "(`chat.template=path/to/template.jinja`)",
            reason="no template",
        )
    if isinstance(own, str):
        return {"default": own}
    return {"default": own.get("default", next(iter(own.values()))), **own}


_SYSTEM_ROLES = ("system", "developer")


def turn_starts(conversation: Conversation, last: int) -> list[int]:
    """Places where a shorter row may start: users' turns behind the first, up to `last`."""
    starts = [
        place
        for place, message in enumerate(conversation.messages)
        if message["role"] == "user"
        and conversation.numbers[place] < last
        and (place == 0 or conversation.messages[place - 1]["role"] != "user")
    ]
    return [start for start in starts if start > _count_system_messages(conversation)]


def drop_front(conversation: Conversation, start: int) -> Conversation:
    """The row from message `start` on, behind its system messages; numbers stay the row's own."""
    kept = [*range(_count_system_messages(conversation)), *range(start, len(conversation.messages))]
    return replace(
        conversation,
        messages=[conversation.messages[place] for place in kept],
        train=[conversation.train[place] for place in kept],
        numbers=[conversation.numbers[place] for place in kept],
    )


def _count_system_messages(conversation: Conversation) -> int:
    """How many system messages the row begins with."""
    count = 0
    while count < len(conversation.messages) and conversation.role(count) in _SYSTEM_ROLES:
        count += 1
    return count


class Truncator:
    """Makes rows fit a length in tokens."""

    def __init__(self, limit: int, drops_turns: bool) -> None:
        self._limit = limit
        self._drops_turns = drops_turns

    def fitted(
        self, kit: TemplatePipeline, conversation: Conversation, encoded: list[EncodedSequence]
    ) -> tuple[list[EncodedSequence], int]:
        """The sequences, the longer ones cut, and how many trained turns went with what was cut.

        Raises ChatError for a row that cannot be made to fit.
        """
        longest = max(len(item.ids) for item in encoded)
        if not self._drops_turns:
            raise _too_long_error(longest, self._limit)
        fitted: list[EncodedSequence] = []
        for item in encoded:
            fits = len(item.ids) <= self._limit
            fitted += [item] if fits else self._cut(kit, conversation, item)
        if not fitted:
            raise _too_long_error(longest, self._limit)
        before, after = (sum(len(item.trained) for item in items) for items in (encoded, fitted))
        return fitted, before - after

    def _cut(
        self, kit: TemplatePipeline, conversation: Conversation, item: EncodedSequence
    ) -> list[EncodedSequence]:
        """The sequence with as few turns removed from its front as make it fit, or nothing."""
        wanted = set(item.trained)
        starts = turn_starts(conversation, max(wanted))
        low, high = 0, len(starts)
        found: list[EncodedSequence] = []
        while low < high:
            middle = (low + high) // 2
            tried = _encode_from(kit, conversation, starts[middle], wanted)
            if all(len(part.ids) <= self._limit for part in tried):
                found, high = tried, middle
            else:
                low = middle + 1
        return found


def _encode_from(
    kit: TemplatePipeline, conversation: Conversation, start: int, wanted: set[int]
) -> list[EncodedSequence]:
    shorter = drop_front(conversation, start)
    trained = [place for place, number in enumerate(shorter.numbers) if number in wanted]
    plans = kit.planner.plan(shorter, trained)
    encoded = kit.labeller.encode([(plan, True) for plan in plans])
    return [item for items in encoded for item in items]


def _too_long_error(length: int, limit: int) -> ChatError:
    return ChatError(
        f"the row makes {length} tokens, and no whole turns can go to make it fit the {limit} "
        "of `max_length`",
        reason="too long",
    )
