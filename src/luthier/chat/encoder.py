"""ChatEncoder: conversations to prompts, and to sequences with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date as Date
from functools import partial
from typing import Any, Literal, NamedTuple

from luthier.chat.conversation import (
    Conversation,
    is_empty_reply,
    read_conversation,
    retry_with_empty_content,
)
from luthier.chat.fast_path.plans import FastPathRow
from luthier.chat.images import ImageExpander
from luthier.chat.labels import EncodedSequence
from luthier.chat.lost_text import find_lost_field_of_turn, find_lost_fields
from luthier.chat.pipeline import (
    KWARGS,
    MAX_VARIABLE_SETS,
    UNREAD_VARIABLE,
    TemplatePipeline,
    TemplatePipelines,
    Truncator,
    drop_front,
    turn_starts,
)
from luthier.chat.reply_grammar import ReplyGrammar
from luthier.chat.reply_parser import ParsedReply, ReplyParser, ReplyStream
from luthier.chat.turns import RenderedSequence, select_trained_messages
from luthier.chat.types import ChatBatch, ChatError, ChatSequence
from luthier.gc_pause import pause_gc

LOSSY_REASONS = ("lost", UNREAD_VARIABLE)
"""The reasons of errors with which `on_lost: keep` keeps a row."""
IMAGES = "images"
"""The setting that describes `ChatEncoder.images`; encoders without images do not have it."""
_CHUNK_MESSAGES = 2048
"""Messages that are rendered while those before them are encoded."""


class MatchedRow(NamedTuple):
    """A row whose form is known, and the pipeline whose plan it has."""

    pipeline: TemplatePipeline
    row: FastPathRow


@dataclass(slots=True)
class PlannedRow:
    """A row as the texts of its sequences."""

    pipeline: TemplatePipeline
    conversation: Callable[[], Conversation]
    sequences: list[RenderedSequence]
    suspect: bool
    """Whether a text of the row may hold a control token."""
    lost: list[ChatError]
    """Fields that no sequence shows."""


OnLost = Literal["error", "drop", "keep"]
OnLong = Literal["turns", "drop", "error"]
OnEmpty = Literal["error", "drop", "train"]


class ChatEncoder:
    """Turns conversations into prompts and into training sequences, for one template.

    tokenizer: a fast tokenizer of transformers. template: Jinja text or a file, instead of the
    tokenizer's own. train_on: `all` assistant turns, the `last`, or the turns of the given roles.
    boundaries: `served` encodes as a server encodes the rendered text; `segments` encodes every
    segment alone. on_lost: what to do with a row whose text the template does not show, or that it
    refuses. max_length (tokens) and on_long: a longer row loses whole turns from its front, is
    dropped, or is an error. date: YYYY-MM-DD for templates that write today's date. variables:
    more variables for the template. eos_token_ids: the generation config's, where they are known.
    empty_replies: what to do with a row in which a turn that trains says nothing; `train` teaches
    the model to stop at once. roles: further roles of messages, for templates that take any.
    images: what the model's processor makes of images; None for a model that takes text alone.
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
        empty_replies: OnEmpty = "error",
        roles: Iterable[str] = (),
        images: ImageExpander | None = None,
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
        self.empty_replies = empty_replies
        self.roles = list(roles)
        self.images = images
        self._pipelines = TemplatePipelines(
            tokenizer, template, self.variables, self.date, self.eos_token_ids, boundaries,
            train_on, self.roles, images,
        )  # fmt: skip
        self._reply_parsers: dict[int, ReplyParser] = {}

    def prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids that generation of the next turn starts from.

        `chat_template_kwargs`: the row's own variables, over those of all rows. Raises ChatError
        for a conversation that the template refuses, and for variables that it never reads.
        """
        pipeline, _ = self._select(tools, chat_template_kwargs)

        def encode(filled: list[dict[str, Any]]) -> list[int]:
            return pipeline.encode_prompt(pipeline.read(filled, tools))

        return retry_with_empty_content(encode, messages)

    def parse(
        self,
        reply: str | Sequence[int],
        messages: list[dict[str, Any]] | None = None,
        tools: list | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ParsedReply:
        """Return a model's reply as a message: its reasoning, its content and its tool calls.

        `reply`: the ids that the model wrote, or their text with its control tokens, with the stop
        token or without. `messages`, `tools`, `chat_template_kwargs`: what it replies to, as
        `prompt` got them; a question alone where they are left out. The message counts if it
        renders behind that prompt to the same ids (of a text: to the same text); a reply that was
        cut counts if the message's begin with it, and it is not cut within its calls. Every other
        reply is plain content, with the reason. Where a template writes arguments as text, their
        types are those of the tools' schemas, and strings without any.
        """
        return self._reply_parser(tools, chat_template_kwargs).parse(reply, messages, tools)

    def stream_parser(
        self,
        messages: list[dict[str, Any]] | None = None,
        tools: list | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ReplyStream:
        """Return what takes one reply apart while it comes; its arguments are those of `parse`.

        It holds back what may yet be a marker of the template, and calls until the reply's end.
        """
        return ReplyStream(self._reply_parser(tools, chat_template_kwargs), messages, tools)

    def reply_grammar(self, tools: list | None = None) -> ReplyGrammar:
        """Return what the template writes around the fields of a reply to a question."""
        return self._reply_parser(tools, None).usual_grammar(None, tools)

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Return the text of ids that stand behind a prompt, control tokens and all."""
        return self._pipelines.tokens.decode_reply(list(ids))

    def _reply_parser(self, tools: list | None, variables: Any) -> ReplyParser:
        pipeline, _ = self._select(tools, variables)
        if id(pipeline) not in self._reply_parsers:
            # Parsers keep their pipelines alive, so no id comes back; sets of variables are many.
            if len(self._reply_parsers) > MAX_VARIABLE_SETS:
                self._reply_parsers.clear()
            self._reply_parsers[id(pipeline)] = ReplyParser(pipeline, self._pipelines.tokens)
        return self._reply_parsers[id(pipeline)]

    def encode(
        self,
        messages: list[dict[str, Any]],
        tools: list | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[ChatSequence]:
        """Return the row's training sequences; empty when the row is dropped.

        Raises ChatError for a row that the settings do not allow to drop or keep.
        """
        batch = ChatBatch()
        row = {"messages": messages, "tools": tools, KWARGS: chat_template_kwargs}
        self._finish([self._plan(None, row)], batch)
        return batch.rows[0]

    def encode_batch(self, conversations: Iterable[dict[str, Any]]) -> ChatBatch:
        """Return the sequences of many rows, with counts of what was dropped or cut, and why.

        Each conversation is a dict with `messages` and perhaps `tools` and `chat_template_kwargs`,
        its own variables for the template. Raises ChatError, with the row's number, for a row that
        the settings do not allow to drop or keep.
        """
        batch = ChatBatch()
        encoding: Future[None] | None = None
        # The tokenizer gives up the interpreter lock: one thread encodes while this one renders.
        with ThreadPoolExecutor(1) as worker, pause_gc():
            try:
                for chunk in _chunks(enumerate(conversations)):
                    planned = [self._plan(number, row) for number, row in chunk]
                    if encoding is not None:
                        encoding.result()
                    # While the tokenizer is at work on this chunk, the next one is rendered.
                    encoding = worker.submit(self._finish, planned, batch)
            finally:
                # An error in an earlier chunk comes before one in a later chunk.
                if encoding is not None:
                    encoding.result()
        return batch

    def convert_arguments(self, messages: Any, tools: list | None = None) -> Any:
        """Return the messages with the arguments of calls in the form that the template takes."""
        return self._pipelines.for_tools(tools).arguments.convert(messages)

    def convert_content(self, messages: Any, tools: list | None = None) -> Any:
        """Return the messages with each content in a form that the template shows."""
        content = self._pipelines.for_tools(tools).content
        return messages if content is None else content.convert(messages)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the ids, the template's text included, for JSON."""
        sources = self._pipelines.sources
        settings = {
            "template": sources if len(sources) > 1 else sources["default"],
            "train_on": self.train_on,
            "boundaries": self.boundaries,
            "on_lost": self.on_lost,
            "max_length": self.max_length,
            "on_long": self.on_long,
            "date": self.date,
            "variables": self.variables,
            "eos_token_ids": self.eos_token_ids,
            "empty_replies": self.empty_replies,
            "roles": self.roles,
        }
        return settings if self.images is None else settings | {IMAGES: self.images.settings()}

    @classmethod
    def from_settings(
        cls, tokenizer: Any, settings: dict[str, Any], images: ImageExpander | None = None
    ) -> ChatEncoder:
        """Return the encoder that `settings()` describes.

        `images`: what the model's processor makes of images, which settings only describe.
        """
        settings = {name: value for name, value in settings.items() if name != IMAGES}
        return cls(tokenizer, **settings, images=images)

    def with_settings(self, changes: dict[str, Any]) -> ChatEncoder:
        """Return the same encoder with some settings changed."""
        return self.from_settings(self.tokenizer, self.settings() | changes, self.images)

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a reply: generation stops at any of them.

        Replies to rows with tools may end otherwise, where these have a template of their own.
        """
        return self._pipelines.stop_token_ids()

    def holds_control_tokens(self, texts: Iterable[str]) -> bool:
        """Return whether a text holds a control token, or at its edge a part of one."""
        return self._pipelines.default.controls.has_suspects(texts)

    def check_variables(self) -> None:
        """Raise ChatError for a variable of the encoder's own that no template of the model reads.

        It is no part of making an encoder: models whose training had such a variable are served.
        """
        unread = self.find_unread_variables(self.variables)
        if unread is not None:
            raise ChatError(f"chat.variables: {unread}", reason=UNREAD_VARIABLE)

    def find_unread_variables(self, variables: Mapping[str, Any]) -> str | None:
        """Return what is wrong with variables that no template reads; None where all are read."""
        return self._pipelines.find_unread_variables(variables)

    def _select(self, tools: Any, variables: Any) -> tuple[TemplatePipeline, ChatError | None]:
        """Return the pipeline for a row, and what is wrong with variables that it never reads.

        Raises the second unless rows are kept that are not shown whole.
        """
        pipeline, unread = self._pipelines.select(tools, variables)
        if unread is not None and self.on_lost != "keep":
            raise unread
        return pipeline, unread

    def _plan(self, number: int | None, row: dict[str, Any]) -> MatchedRow | PlannedRow | ChatError:
        """Return the texts of a row's sequences, or the error for which it is dropped.

        `number`: the row's number in its batch; None for a row alone, whose errors name no row.
        """
        try:
            if not isinstance(row, dict):
                raise ChatError(
                    f"a row must be a dict with `messages`; found {type(row).__name__}",
                    reason="malformed row",
                )
            tools, variables = row.get("tools"), row.get(KWARGS)
            pipeline, unread = self._pipelines.default, None
            if variables:
                pipeline, unread = self._select(tools, variables)
            # Rows with tools never match, so the template for tools has no fast path.
            matched = pipeline.fast_path.match(row) if unread is None else None
            if matched is not None:
                return MatchedRow(pipeline, matched)
            if not variables:
                pipeline = self._pipelines.for_tools(tools)
            planned = retry_with_empty_content(
                lambda messages: self._plan_row(pipeline, messages, tools), row.get("messages")
            )
            planned.lost += [] if unread is None else [unread]
            return planned
        except ChatError as error:
            in_row = error if number is None else error.in_row(number)
            if self._is_fatal(in_row):
                raise in_row from None
            return in_row

    def _plan_row(self, pipeline: TemplatePipeline, messages: Any, tools: Any) -> PlannedRow:
        conversation = pipeline.read(messages, tools)
        trained = select_trained_messages(conversation, self.train_on)
        if not trained:
            raise ChatError("no turn of the row trains", reason="nothing to train")
        if self.empty_replies != "train":
            _refuse_empty_replies(conversation, trained)
        try:
            sequences = pipeline.planner.plan(conversation, trained)
        except ChatError as error:
            raise _find_cause(error, conversation, pipeline) from None
        lost = find_lost_fields(conversation, sequences, pipeline.template)
        if lost and self.on_lost != "keep":
            raise lost[0]
        suspect = pipeline.controls.has_suspects(conversation.texts)
        return PlannedRow(pipeline, lambda: conversation, sequences, suspect, lost)

    def _is_fatal(self, error: ChatError) -> bool:
        """Return whether a row with this error stops the run, by the settings, or is dropped."""
        if error.reason in ("nothing to train", "too long"):
            return error.reason == "too long" and self.on_long == "error"
        if error.reason == "empty reply":
            return self.empty_replies == "error"
        return self.on_lost != "drop"

    def _finish(self, planned: list[MatchedRow | PlannedRow | ChatError], batch: ChatBatch) -> None:
        """Encode what was planned, all rows of one template in one go, and keep account."""
        matched = self._encode_matched([row for row in planned if isinstance(row, MatchedRow)])
        rows = [next(matched) if isinstance(row, MatchedRow) else row for row in planned]
        encoded = _encode_rows([row for row in rows if isinstance(row, PlannedRow)])
        for row in rows:
            if isinstance(row, PlannedRow):
                self._finish_row(row, next(encoded), batch)
            elif isinstance(row, ChatError):
                batch.drop(row)
            else:
                batch.rows.append(row)

    def _encode_matched(
        self, matched: list[MatchedRow]
    ) -> Iterator[list[ChatSequence] | PlannedRow]:
        """Yield the sequences of matched rows in order; a plan where a closer look is needed."""
        limit = self.max_length
        groups: dict[int, list[MatchedRow]] = {}
        for each in matched:
            groups.setdefault(id(each.pipeline), []).append(each)
        encoded = {
            key: iter(rows[0].pipeline.fast_path.encode([each.row for each in rows]))
            for key, rows in groups.items()
        }
        for pipeline, row in matched:
            sequences = next(encoded[id(pipeline)])
            if sequences is not None and (
                limit is None or all(len(sequence) <= limit for sequence in sequences)
            ):
                yield sequences
            else:
                read = partial(read_conversation, row.messages)  # its form's roles are known
                suspect = pipeline.controls.has_suspects(row.texts)
                yield PlannedRow(pipeline, read, row.render(), suspect, [])

    def _finish_row(
        self, row: PlannedRow, encoded: list[EncodedSequence] | ChatError, batch: ChatBatch
    ) -> None:
        """Add a row to the batch, cut or dropped as configured."""
        number = len(batch.rows)
        if isinstance(encoded, ChatError):
            if self._is_fatal(encoded):
                raise encoded.in_row(number) from None
            batch.drop(encoded.in_row(number))
            return
        limit = self.max_length
        if limit is not None and any(len(sequence.ids) > limit for sequence in encoded):
            truncator = Truncator(limit, self.on_long == "turns")
            try:
                encoded, cut_turns = truncator.truncate(row.pipeline, row.conversation(), encoded)
            except ChatError as error:
                if self.on_long == "error":
                    raise error.in_row(number) from None
                batch.drop(error.in_row(number))
                return
            batch.cut[number] = cut_turns
        if row.lost:
            batch.lossy_rows += 1
            batch.reports.append(row.lost[0].in_row(number))
        batch.rows.append([sequence.to_chat_sequence() for sequence in encoded])


def _refuse_empty_replies(conversation: Conversation, trained: list[int]) -> None:
    """Raise ChatError for the first turn that trains and says nothing."""
    for index in trained:
        message = conversation.messages[index]
        if is_empty_reply(message):
            state = "blank" if message.get("content") else "empty"
            raise ChatError(
                f"the {message['role']}'s reply is {state}, so the model would learn to stop at "
                "once; fill it in, or set chat.empty_replies=drop to leave such rows out, or "
                "=train if that is meant",
                reason="empty reply",
                message=conversation.numbers[index],
                field="content",
            )


def _find_cause(
    error: ChatError, conversation: Conversation, pipeline: TemplatePipeline
) -> ChatError:
    """Return the error for a turn whose reply is not known, or why it is not: its text is lost."""
    if error.reason not in ("no stop token", "no prefix") or error.message is None:
        return error
    lost = find_lost_field_of_turn(conversation, error.message, pipeline.template)
    return lost or error


def _chunks(rows: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Return the rows in chunks of about as many messages."""
    chunk: list[tuple[int, Any]] = []
    size = 0
    for number, row in rows:
        chunk.append((number, row))
        messages = row.get("messages") if isinstance(row, dict) else None
        size += len(messages) if isinstance(messages, list | tuple) else 1
        if size >= _CHUNK_MESSAGES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_rows(planned: list[PlannedRow]) -> Iterator[list[EncodedSequence] | ChatError]:
    """Return the sequences of each row, in order; rows of one template are encoded in one go."""
    groups: dict[int, list[PlannedRow]] = {}
    for row in planned:
        groups.setdefault(id(row.pipeline), []).append(row)
    encoded: dict[int, list[EncodedSequence] | ChatError] = {}
    for rows in groups.values():
        encoded |= zip(map(id, rows), _encode_together(rows), strict=True)
    return iter([encoded[id(row)] for row in planned])


def _encode_together(rows: list[PlannedRow]) -> list[list[EncodedSequence] | ChatError]:
    """Return the sequences of rows of one template, or what is wrong with a row's text."""
    sequences = [(sequence, row.suspect) for row in rows for sequence in row.sequences]
    try:
        encoded = iter(rows[0].pipeline.label_builder.encode(sequences))
    except ChatError as error:
        if len(rows) == 1:
            return [error]
        # Each alone, to learn which of them it is.
        return [outcome for row in rows for outcome in _encode_together([row])]
    return [[sequence for _ in row.sequences for sequence in next(encoded)] for row in rows]


class ChatPromptEncoder:
    """Makes the prompts of conversations that end where the model is to answer.

    A prompt's ids are those of `ChatEncoder.prompt`. What the template does not show, and what is
    too long, is treated as `on_lost` and `on_long` say.
    """

    def __init__(self, encoder: ChatEncoder, limit: int | None = None) -> None:
        """`limit`: the longest prompt, in tokens."""
        self._encoder = encoder
        self._limit = limit

    def encode(
        self,
        messages: list[dict[str, Any]],
        tools: list | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[int], int, ChatError | None]:
        """Return the prompt's ids, how many messages went from its front, and what it lacks.

        Raises ChatError for a row that makes no prompt; `is_fatal` says whether it stops the run.
        """
        pipeline, unread = self._encoder._select(tools, chat_template_kwargs)
        ids, dropped_messages, lost = retry_with_empty_content(
            lambda filled: self._encode(pipeline, filled, tools), messages
        )
        return ids, dropped_messages, lost or unread

    def is_fatal(self, error: ChatError) -> bool:
        """Return whether a row with this error stops the run, by the settings, or is dropped."""
        return self._encoder._is_fatal(error)

    def _encode(
        self, pipeline: TemplatePipeline, messages: list[dict[str, Any]], tools: list | None
    ) -> tuple[list[int], int, ChatError | None]:
        conversation = pipeline.read(messages, tools)
        text = pipeline.template.render(conversation.messages, conversation.tools, True)
        lost = find_lost_fields(conversation, [RenderedSequence(text)], pipeline.template)
        if lost and self._encoder.on_lost != "keep":
            raise lost[0]
        ids = pipeline.label_builder.encode_prompt(text)
        dropped_messages = 0
        if self._limit is not None and len(ids) > self._limit:
            ids, dropped_messages = self._truncate(pipeline, conversation, len(ids))
        return ids, dropped_messages, lost[0] if lost else None

    def _truncate(
        self, pipeline: TemplatePipeline, conversation: Conversation, length: int
    ) -> tuple[list[int], int]:
        """Return the prompt without as few turns of its front as make it fit."""
        starts = turn_starts(conversation, max(conversation.numbers) + 1)
        for start in starts if self._encoder.on_long == "turns" else []:
            shorter = drop_front(conversation, start)
            ids = pipeline.encode_prompt(shorter)
            if len(ids) <= (self._limit or 0):
                return ids, len(conversation.messages) - len(shorter.messages)
        raise ChatError(
            f"the prompt has {length} tokens, and no whole turns can be removed to make it fit the "
            f"{self._limit} that chat.max_length leaves for it besides the longest completion",
            reason="too long",
        )
