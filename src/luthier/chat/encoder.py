"""ChatEncoder: conversations to prompts, and to sequences with labels."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date as Date
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from luthier.chat.control import Controls
from luthier.chat.conversation import Conversation, read_conversation
from luthier.chat.errors import ChatError
from luthier.chat.filled import filled_where_refused
from luthier.chat.fitting import front_turns, without_front
from luthier.chat.labels import Encoded, Labeller
from luthier.chat.lost import lost_fields
from luthier.chat.sequences import ChatBatch, ChatSequence
from luthier.chat.sharing import Shared
from luthier.chat.template import ChatTemplate, template_text
from luthier.chat.text import Text
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import Sequence, Turn, grouped, own_turn, trained_messages

_CHUNK = 512
_ANYONE = {"role": "user", "content": "?"}


@dataclass(slots=True)
class Planned:
    """A row as the texts of its sequences."""

    conversation: Conversation
    sequences: list[Sequence]
    suspect: bool
    """Whether a text of the row may hold a control token."""
    lost: list[ChatError]
    """Fields that no sequence shows."""


OnLost = Literal["error", "drop", "keep"]
OnLong = Literal["turns", "drop", "error"]


class ChatEncoder:
    """Turns conversations into prompts and into training sequences, for one template.

    tokenizer: a fast tokenizer of transformers. template: Jinja text or a file, instead of the
    tokenizer's own. train_on: `all` assistant turns, the `last`, or the turns of the given roles.
    boundaries: `served` encodes as a server encodes the rendered text; `segments` encodes every
    segment alone. on_lost: what to do with a row whose text the template does not show, or that it
    refuses. max_length (tokens) and on_long: a longer row loses whole turns from its front, is
    dropped, or is an error. date: YYYY-MM-DD for templates that write today's date. variables:
    more variables for the template. eos_token_ids: the generation config's, where they are known.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        train_on: str | list[str] = "all",
        boundaries: Literal["served", "segments"] = "served",
        on_lost: OnLost = "error",
        max_length: int | None = None,
        on_long: OnLong = "turns",
        date: str | None = None,
        variables: dict[str, Any] | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.boundaries = boundaries
        self.on_lost = on_lost
        self.max_length = max_length
        self.on_long = on_long
        self.date = date or Date.today().isoformat()
        self.variables = dict(variables or {})
        self.eos_token_ids = list(eos_token_ids)
        self._sources = _template_sources(tokenizer, template)
        self._tokens = TokenEncoder(tokenizer)
        self._sets: dict[str, tuple[ChatTemplate, Controls, Labeller]] = {}
        self._set_for(None)

    def prompt(self, messages: list[dict[str, Any]], tools: list | None = None) -> list[int]:
        """The ids that generation of the next turn starts from."""
        return filled_where_refused(lambda given: self._prompt(given, tools), messages)

    def _prompt(self, messages: list[dict[str, Any]], tools: list | None) -> list[int]:
        conversation = read_conversation(messages, tools)
        template, _, labeller = self._set_for(conversation.tools)
        text = template.render(conversation.messages, conversation.tools, True)
        return labeller.prompt(text)

    def encode(
        self, messages: list[dict[str, Any]], tools: list | None = None
    ) -> list[ChatSequence]:
        """The row's training sequences; empty when the row is dropped.

        Raises ChatError for a row that the settings do not allow to drop or keep.
        """
        batch = ChatBatch()
        self._finish([self._planned(None, {"messages": messages, "tools": tools})], batch)
        return batch.rows[0]

    def encode_batch(self, conversations: Iterable[dict[str, Any]]) -> ChatBatch:
        """The sequences of many rows, with counts of what was dropped or cut, and why.

        Each conversation is a dict with `messages` and perhaps `tools`. Raises ChatError, with the
        row's number, for a row that the settings do not allow to drop or keep.
        """
        batch = ChatBatch()
        rows = iter(enumerate(conversations))
        waiting: Future[None] | None = None
        with ThreadPoolExecutor(1) as worker, _no_collection():
            try:
                while chunk := list(islice(rows, _CHUNK)):
                    planned = [self._planned(n, row) for n, row in chunk]
                    if waiting is not None:
                        waiting.result()
                    # While the tokenizer is at work on this chunk, the next one is rendered.
                    waiting = worker.submit(self._finish, planned, batch)
            finally:
                # An error in an earlier chunk comes before one in a later chunk.
                if waiting is not None:
                    waiting.result()
        return batch

    def _planned(self, number: int | None, row: dict[str, Any]) -> Planned | ChatError:
        """A row as the texts of its sequences, or what is wrong with it."""
        try:
            return self._plan_row(row)
        except ChatError as error:
            named = error if number is None else error.in_row(number)
            if self._stops_at(named):
                raise named from None
            return named

    def settings(self) -> dict[str, Any]:
        """Everything that decides the ids, the template's text included, for JSON."""
        return {
            "template": self._sources if len(self._sources) > 1 else self._sources["default"],
            "train_on": self.train_on,
            "boundaries": self.boundaries,
            "on_lost": self.on_lost,
            "max_length": self.max_length,
            "on_long": self.on_long,
            "date": self.date,
            "variables": self.variables,
            "eos_token_ids": self.eos_token_ids,
        }

    @classmethod
    def from_settings(cls, tokenizer: Any, settings: dict[str, Any]) -> ChatEncoder:
        """The encoder that `settings()` describes."""
        return cls(tokenizer, **settings)

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a reply: generation stops at any of them."""
        return list(self._set_for(None)[1].stop_token_ids)

    def _stops_at(self, error: ChatError) -> bool:
        if error.reason in ("nothing to train", "too long"):
            return error.reason == "too long" and self.on_long == "error"
        return self.on_lost != "drop"

    def _set_for(self, tools: list | None) -> tuple[ChatTemplate, Controls, Labeller]:
        """The template for a row with or without tools, and what is known about it."""
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sets:
            variables = {**self.tokenizer.special_tokens_map, **self.variables}
            template = ChatTemplate(self._sources[name], variables, self.date)
            controls = Controls(template, self._tokens, self.eos_token_ids)
            labeller = Labeller(self._tokens, controls, self.boundaries)
            self._sets[name] = (template, controls, labeller)
        return self._sets[name]

    def _plan_row(self, row: dict[str, Any]) -> Planned:
        if not isinstance(row, dict):
            raise ChatError(
                f"a row must be a dict with `messages`; found {type(row).__name__}",
                reason="malformed row",
            )
        tools = row.get("tools")
        return filled_where_refused(
            lambda given: self._plan_given(given, tools), row.get("messages")
        )

    def _plan_given(self, messages: Any, tools: Any) -> Planned:
        conversation = read_conversation(messages, tools)
        trained = trained_messages(conversation, self.train_on)
        if not trained:
            raise ChatError("no turn of the row trains", reason="nothing to train")
        sequences = self._plan(conversation, trained)
        template, controls, _ = self._set_for(conversation.tools)
        lost = lost_fields(conversation, sequences, template)
        if lost and self.on_lost != "keep":
            raise lost[0]
        suspect = controls.has_suspects(conversation.texts)
        return Planned(conversation, sequences, suspect, lost)

    def _plan(self, conversation: Conversation, trained: list[int]) -> list[Sequence]:
        """The texts of the row's sequences and where their replies stand."""
        template, controls, _ = self._set_for(conversation.tools)
        messages, tools = conversation.messages, conversation.tools

        whole = template.follow(messages, tools, False)
        asked = None if template.ends else template.follow(messages, tools, True)
        shared = Shared(whole, asked, template.ends)
        if all(conversation.role(place) == "assistant" for place in trained):
            sequence = shared.sequence(conversation, trained, controls.find_stop)
            if sequence is not None:
                return [sequence]
        return grouped(self._own_turns(conversation, trained), whole.text)

    def _own_turns(self, conversation: Conversation, trained: list[int]) -> list[Turn]:
        """Each trained turn in its own context, rendered for itself."""
        template, controls, _ = self._set_for(conversation.tools)
        messages, tools = conversation.messages, conversation.tools

        @lru_cache
        def render(count: int, generation: bool) -> Text:
            return template.render(messages[:count], tools, generation)

        def find_following(place: int, shown: Text) -> tuple[Text, str] | None:
            more = messages[: place + 2] if place + 1 < len(messages) else [*messages, _ANYONE]
            text = template.render(more, tools, False)
            return controls.following_stop(text[len(shown) :]) if text.startswith(shown) else None

        return [
            own_turn(render, controls.find_stop, find_following, conversation, place)
            for place in trained
        ]

    def _finish(self, planned: list[Planned | ChatError], batch: ChatBatch) -> None:
        """Encode what was planned, all rows of one template in one go, and keep account."""
        encoded = self._encoded([row for row in planned if isinstance(row, Planned)])
        for row in planned:
            if isinstance(row, ChatError):
                batch.drop(row)
                continue
            number = len(batch.rows)
            try:
                items = self._fitted(row.conversation, next(encoded), batch)
            except ChatError as error:
                if self.on_long == "error":
                    raise error.in_row(number) from None
                batch.drop(error.in_row(number))
                continue
            if row.lost:
                batch.kept_lost += 1
                batch.reports.append(row.lost[0].in_row(number))
            batch.rows.append([item.sequence() for item in items])

    def _encoded(self, planned: list[Planned]) -> Iterator[list[Encoded]]:
        """The sequences of each row, in order."""
        groups: dict[int, list[Planned]] = {}
        labellers: dict[int, Labeller] = {}
        for row in planned:
            labeller = self._set_for(row.conversation.tools)[2]
            labellers[id(labeller)] = labeller
            groups.setdefault(id(labeller), []).append(row)
        found: dict[int, list[Encoded]] = {id(row): [] for row in planned}
        for key, rows in groups.items():
            plans = [(sequence, row.suspect) for row in rows for sequence in row.sequences]
            owners = [row for row in rows for _ in row.sequences]
            for owner, items in zip(owners, labellers[key].encode(plans), strict=True):
                found[id(owner)] += items
        return iter([found[id(row)] for row in planned])

    def _fitted(
        self, conversation: Conversation, encoded: list[Encoded], batch: ChatBatch
    ) -> list[Encoded]:
        """The sequences, the longer ones cut or refused as configured."""
        limit = self.max_length
        if limit is None or all(len(item.ids) <= limit for item in encoded):
            return encoded
        longest = max(len(item.ids) for item in encoded)
        if self.on_long != "turns":
            raise _too_long(longest, limit)
        fitted: list[Encoded] = []
        for item in encoded:
            fitted += [item] if len(item.ids) <= limit else self._cut(conversation, item, limit)
        if not fitted:
            raise _too_long(longest, limit)
        batch.cut_rows += 1
        kept = sum(len(item.trained) for item in fitted)
        batch.cut_turns += sum(len(item.trained) for item in encoded) - kept
        return fitted

    def _cut(self, conversation: Conversation, item: Encoded, limit: int) -> list[Encoded]:
        """The sequence with as few turns removed from its front as make it fit, or nothing."""
        wanted = set(item.trained)
        starts = front_turns(conversation, max(wanted))
        low, high = 0, len(starts)
        found: list[Encoded] = []
        while low < high:
            middle = (low + high) // 2
            tried = self._from_turn(conversation, starts[middle], wanted)
            if all(len(part.ids) <= limit for part in tried):
                found, high = tried, middle
            else:
                low = middle + 1
        return found

    def _from_turn(self, conversation: Conversation, start: int, wanted: set[int]) -> list[Encoded]:
        shorter = without_front(conversation, start)
        trained = [place for place, number in enumerate(shorter.numbers) if number in wanted]
        plans = self._plan(shorter, trained)
        encoded = self._set_for(shorter.tools)[2].encode([(plan, True) for plan in plans])
        return [item for items in encoded for item in items]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out for a chunk of rows.

    Rendering makes many small objects and no cycles; a full collection walks all of transformers
    each time, which takes longer than the rows do.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _too_long(length: int, limit: int) -> ChatError:
    return ChatError(
        f"the row makes {length} tokens, and no whole turns can go to make it fit the {limit} "
        "of `max_length`",
        reason="too long",
    )


def _template_sources(tokenizer: Any, template: str | dict[str, str] | None) -> dict[str, str]:
    """The text of each template by its name; `default` is always there."""
    if isinstance(template, str):
        return {"default": template_text(template)}
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
