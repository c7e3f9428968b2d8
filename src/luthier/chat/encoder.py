"""ChatEncoder: conversations to prompts, and to sequences with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date as Date
from functools import partial
from typing import Any, Literal

from luthier.chat.conversation import Conversation, filled_where_refused, read_conversation
from luthier.chat.fast_path.plans import Known
from luthier.chat.labels import Encoded
from luthier.chat.lost_text import lost_fields
from luthier.chat.pipeline import Fitter, Kit, Kits, front_turns, without_front
from luthier.chat.turns import Sequence, trained_messages
from luthier.chat.types import ChatBatch, ChatError, ChatSequence
from luthier.gc_pause import no_collection

_CHUNK = 2048
"""Messages that are rendered while those before them are encoded."""


@dataclass(slots=True)
class Planned:
    """A row as the texts of its sequences."""

    kit: Kit
    conversation: Callable[[], Conversation]
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
        self._kits = Kits(
            tokenizer, template, self.variables, self.date, self.eos_token_ids, boundaries, train_on
        )

    def prompt(self, messages: list[dict[str, Any]], tools: list | None = None) -> list[int]:
        """The ids that generation of the next turn starts from."""
        return filled_where_refused(lambda given: self._prompt(given, tools), messages)

    def _prompt(self, messages: list[dict[str, Any]], tools: list | None) -> list[int]:
        conversation = read_conversation(messages, tools)
        kit = self._kits.of(conversation.tools)
        return kit.labeller.prompt(
            kit.template.render(conversation.messages, conversation.tools, True)
        )

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
        waiting: Future[None] | None = None
        with ThreadPoolExecutor(1) as worker, no_collection():
            try:
                for chunk in _chunks(enumerate(conversations)):
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

    def _planned(self, number: int | None, row: dict[str, Any]) -> Known | Planned | ChatError:
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
        sources = self._kits.sources
        return {
            "template": sources if len(sources) > 1 else sources["default"],
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
        return list(self._kits.default.controls.stop_token_ids)

    def _stops_at(self, error: ChatError) -> bool:
        if error.reason in ("nothing to train", "too long"):
            return error.reason == "too long" and self.on_long == "error"
        return self.on_lost != "drop"

    def _plan_row(self, row: dict[str, Any]) -> Known | Planned:
        if not isinstance(row, dict):
            raise ChatError(
                f"a row must be a dict with `messages`; found {type(row).__name__}",
                reason="malformed row",
            )
        known = self._kits.default.forms.known(row)
        if known is not None:
            return known
        tools = row.get("tools")
        return filled_where_refused(
            lambda given: self._plan_given(given, tools), row.get("messages")
        )

    def _plan_given(self, messages: Any, tools: Any) -> Planned:
        conversation = read_conversation(messages, tools)
        trained = trained_messages(conversation, self.train_on)
        if not trained:
            raise ChatError("no turn of the row trains", reason="nothing to train")
        kit = self._kits.of(conversation.tools)
        sequences = kit.planner.plan(conversation, trained)
        lost = lost_fields(conversation, sequences, kit.template)
        if lost and self.on_lost != "keep":
            raise lost[0]
        suspect = kit.controls.has_suspects(conversation.texts)
        return Planned(kit, lambda: conversation, sequences, suspect, lost)

    def _finish(self, planned: list[Known | Planned | ChatError], batch: ChatBatch) -> None:
        """Encode what was planned, all rows of one template in one go, and keep account."""
        quick = self._quick([row for row in planned if isinstance(row, Known)])
        made = [next(quick) if isinstance(row, Known) else row for row in planned]
        encoded = _encoded([row for row in made if isinstance(row, Planned)])
        for row in made:
            if isinstance(row, Planned):
                self._finish_row(row, next(encoded), batch)
            elif isinstance(row, ChatError):
                batch.drop(row)
            else:
                batch.rows.append(row)

    def _quick(self, rows: list[Known]) -> Iterator[list[ChatSequence] | Planned]:
        """The sequences of rows of known form; a plan for those that need a closer look."""
        kit, limit = self._kits.default, self.max_length
        for row, sequences in zip(rows, kit.tracks.encode(rows), strict=True):
            fits = limit is None or all(len(one) <= limit for one in sequences or ())
            if sequences is not None and fits:
                yield sequences
            else:
                read = partial(read_conversation, row.messages)
                suspect = kit.controls.has_suspects(row.texts)
                yield Planned(kit, read, row.sequences(), suspect, [])

    def _finish_row(
        self, row: Planned, encoded: list[Encoded] | ChatError, batch: ChatBatch
    ) -> None:
        """Add a row to the batch, cut or dropped as configured."""
        number = len(batch.rows)
        if isinstance(encoded, ChatError):
            if self._stops_at(encoded):
                raise encoded.in_row(number) from None
            batch.drop(encoded.in_row(number))
            return
        limit = self.max_length
        if limit is not None and any(len(item.ids) > limit for item in encoded):
            fitter = Fitter(limit, self.on_long == "turns")
            try:
                encoded, cut_turns = fitter.fitted(row.kit, row.conversation(), encoded)
            except ChatError as error:
                if self.on_long == "error":
                    raise error.in_row(number) from None
                batch.drop(error.in_row(number))
                return
            batch.cut[number] = cut_turns
        if row.lost:
            batch.kept_lost += 1
            batch.reports.append(row.lost[0].in_row(number))
        batch.rows.append([item.sequence() for item in encoded])


def _chunks(rows: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """The rows in parts of about as many messages."""
    chunk: list[tuple[int, Any]] = []
    size = 0
    for number, row in rows:
        chunk.append((number, row))
        messages = row.get("messages") if isinstance(row, dict) else None
        size += len(messages) if isinstance(messages, list | tuple) else 1
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(planned: list[Planned]) -> Iterator[list[Encoded] | ChatError]:
    """The sequences of each row, in order; rows of one template are encoded in one go."""
    groups: dict[int, list[Planned]] = {}
    for row in planned:
        groups.setdefault(id(row.kit), []).append(row)
    found: dict[int, list[Encoded] | ChatError] = {}
    for rows in groups.values():
        found |= zip(map(id, rows), _together(rows), strict=True)
    return iter([found[id(row)] for row in planned])


def _together(rows: list[Planned]) -> list[list[Encoded] | ChatError]:
    """The sequences of rows of one template, or what is wrong with a row's text."""
    plans = [(sequence, row.suspect) for row in rows for sequence in row.sequences]
    try:
        encoded = iter(rows[0].kit.labeller.encode(plans))
    except ChatError as error:
        if len(rows) == 1:
            return [error]
        return [made for row in rows for made in _together([row])]
    return [[item for _ in row.sequences for item in next(encoded)] for row in rows]


# Conversations that end where the model is to answer: their prompts, checked as rows are.


class Prompts:
    """Makes the prompts of conversations with an encoder's settings.

    A prompt's ids are those of `ChatEncoder.prompt`. What the template does not show, and what is
    too long, is treated as `on_lost` and `on_long` say.
    """

    def __init__(self, encoder: ChatEncoder, limit: int | None = None) -> None:
        """`limit`: the longest prompt, in tokens."""
        self._encoder = encoder
        self._limit = limit

    def of(
        self, messages: list[dict[str, Any]], tools: list | None = None
    ) -> tuple[list[int], int, ChatError | None]:
        """The prompt's ids, how many messages went from its front, and what it does not show.

        Raises ChatError for a row that makes no prompt; `stops` says whether it is to be dropped.
        """
        return filled_where_refused(lambda given: self._of(given, tools), messages)

    def stops(self, error: ChatError) -> bool:
        """Whether the settings have a row with this error stop the run, rather than drop it."""
        if error.reason == "too long":
            return self._encoder.on_long == "error"
        return self._encoder.on_lost != "drop"

    def _of(
        self, messages: list[dict[str, Any]], tools: list | None
    ) -> tuple[list[int], int, ChatError | None]:
        conversation = read_conversation(messages, tools)
        kit = self._encoder._kits.of(conversation.tools)
        text = kit.template.render(conversation.messages, conversation.tools, True)
        lost = lost_fields(conversation, [Sequence(text)], kit.template)
        if lost and self._encoder.on_lost != "keep":
            raise lost[0]
        ids = kit.labeller.prompt(text)
        gone = 0
        if self._limit is not None and len(ids) > self._limit:
            ids, gone = self._cut(kit, conversation, len(ids))
        return ids, gone, lost[0] if lost else None

    def _cut(self, kit: Kit, conversation: Conversation, length: int) -> tuple[list[int], int]:
        """The prompt without as few turns of its front as make it fit."""
        starts = front_turns(conversation, max(conversation.numbers) + 1)
        for start in starts if self._encoder.on_long == "turns" else []:
            shorter = without_front(conversation, start)
            ids = kit.labeller.prompt(kit.template.render(shorter.messages, shorter.tools, True))
            if len(ids) <= (self._limit or 0):
                return ids, len(conversation.messages) - len(shorter.messages)
        raise ChatError(
            f"the prompt has {length} tokens, and no whole turns can go to make it fit the "
            f"{self._limit} that `max_length` leaves for it beside the longest completion",
            reason="too long",
        )
