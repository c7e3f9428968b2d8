"""All that works on the rows of one template, and rows made shorter by whole turns."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.chat.content_forms import ContentConverter
from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import Conversation, read_conversation
from luthier.chat.fast_path import FastPath
from luthier.chat.images import ImageExpander
from luthier.chat.labels import EncodedSequence, LabelBuilder
from luthier.chat.roles import RoleChecker
from luthier.chat.template import TEMPLATE_INPUTS, ChatTemplate
from luthier.chat.template_file import read_template
from luthier.chat.tokens import TokenEncoder
from luthier.chat.tool_arguments import ArgumentConverter
from luthier.chat.turns import SequencePlanner
from luthier.chat.types import ChatError

KWARGS = "chat_template_kwargs"
"""The key of a row that has its own variables for the template, over those of all rows."""
UNREAD_VARIABLE = "unread template variable"
"""The reason of an error about a variable that a template never reads."""
MAX_VARIABLE_SETS = 64
"""Sets of rows' own variables whose pipelines are remembered."""
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class TemplatePipeline:
    """How the rows of one template are rendered, planned and labelled."""

    template: ChatTemplate
    controls: ControlTokens
    planner: SequencePlanner
    label_builder: LabelBuilder
    fast_path: FastPath
    roles: RoleChecker
    arguments: ArgumentConverter
    content: ContentConverter | None
    """None for a model that takes text alone."""

    def read(self, messages: Any, tools: Any) -> Conversation:
        """Return a row as the template takes it; ChatError for a row that is no conversation."""
        messages = self.arguments.convert(messages)
        if self.content is None:
            conversation = read_conversation(messages, tools)
        else:
            image_part = self.content.find_image_part(messages)
            conversation = read_conversation(self.content.convert(messages), tools, image_part)
        self.roles.check(conversation)
        return conversation

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """The ids from which the turn behind the conversation is generated."""
        text = self.template.render(conversation.messages, conversation.tools, True)
        return self.label_builder.encode_prompt(text)


class TemplatePipelines:
    """The pipelines of a tokenizer's templates; each is made when it is first asked for."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | dict[str, str] | None,
        variables: dict[str, Any],
        date: str,
        eos_token_ids: Iterable[int],
        boundaries: Literal["served", "segments"],
        train_on: str | list[str],
        roles: Collection[str] = (),
        images: ImageExpander | None = None,
    ) -> None:
        """`roles`: further roles of messages, beside those that all templates know.

        `images`: what the model's processor makes of images; None for a model of text alone.
        """
        self.sources = _template_sources(tokenizer, template)
        """The text of each template by its name."""
        self.tokens = TokenEncoder(tokenizer)
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._date = date
        self._eos_token_ids = list(eos_token_ids)
        self._boundaries = boundaries
        self._train_on = train_on
        self._roles = tuple(roles)
        self._images = images
        self._origin = _describe_origin(tokenizer, template)
        self._pipelines: dict[str, TemplatePipeline] = {}
        self._selected: OrderedDict[tuple[str, str], tuple[TemplatePipeline, ChatError | None]] = (
            OrderedDict()
        )
        """By a template's name and a row's variables, those used last at the end."""
        self.default = self.for_tools(None)

    def for_tools(self, tools: list | None) -> TemplatePipeline:
        """Return the pipeline for rows with these tools, or without any."""
        return self._pipeline(self._name(tools))

    def select(
        self, tools: list | None, variables: Any
    ) -> tuple[TemplatePipeline, ChatError | None]:
        """Return the pipeline for rows with these tools and these variables of their own.

        `variables` stand over those of all rows; None for no own ones. Beside it stands what is
        wrong where the template never reads some of them. Raises ChatError for what is no mapping
        of names to JSON values, for names that are not free, and for a value that holds a control
        token: a variable is the template's own text.
        """
        if not variables:
            return self.for_tools(tools), None
        name = self._name(tools)
        key = name, _variables_key(variables)
        selected = self._selected.get(key)
        if selected is None:
            base = self._pipeline(name)
            self._check_variables(variables, base.controls)
            problem = _describe_unread(variables, base.template)
            unread = problem and ChatError(problem, reason=UNREAD_VARIABLE, field=KWARGS)
            selected = self._selected[key] = self._derive(base, variables), unread or None
            if len(self._selected) > MAX_VARIABLE_SETS:
                self._selected.popitem(last=False)
        self._selected.move_to_end(key)
        return selected

    def find_unread_variables(self, variables: Mapping[str, Any]) -> str | None:
        """Return what is wrong with variables that none of the templates reads, or None."""
        problem = None
        for name in self.sources:
            # A template that cannot be used is an error where a row needs it.
            with suppress(ChatError):
                template = self._pipeline(name).template
                variables = {key: variables[key] for key in variables.keys() - template.read_names}
                problem = _describe_unread(variables, template)
        return problem

    def _derive(self, base: TemplatePipeline, variables: Mapping[str, Any]) -> TemplatePipeline:
        """Return the pipeline of a template with a row's variables over those of all rows.

        What depends on the template's text alone is shared; stops are looked for again.
        """
        template = base.template.with_variables({**base.template.variables, **variables})
        controls = ControlTokens(template, self.tokens, self._eos_token_ids, base.content)
        label_builder = LabelBuilder(self.tokens, controls, self._boundaries, self._images)
        return replace(
            base,
            template=template,
            controls=controls,
            planner=SequencePlanner(template, controls),
            label_builder=label_builder,
            fast_path=base.fast_path.with_template(template, controls, label_builder),
        )

    def _name(self, tools: list | None) -> str:
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def _check_variables(self, variables: Mapping[str, Any], controls: ControlTokens) -> None:
        fixed = {*TEMPLATE_INPUTS, *self.tokens.tokenizer.special_tokens_map}
        for name, value in variables.items():
            if name in fixed or not name.isidentifier():
                raise _variable_error(f"a row cannot set {name[:80]!r}")
            if controls.has_suspects(_texts(value)):
                raise _variable_error(
                    f"the value of {name!r} holds a control token, or a part of one at its edge"
                )

    def stop_token_ids(self) -> list[int]:
        """Return what ends the replies of all templates, the default one's first."""
        pipelines = [self.default]
        if "tool_use" in self.sources:
            # A template that cannot be used is an error where a row with tools needs it.
            with suppress(ChatError):
                pipelines.append(self._pipeline("tool_use"))
        ids = [index for each in pipelines for index in each.controls.stop_token_ids]
        return list(dict.fromkeys(ids))

    def _pipeline(self, name: str) -> TemplatePipeline:
        if name not in self._pipelines:
            self._pipelines[name] = self._make(self.sources[name])
        return self._pipelines[name]

    def _make(self, source: str) -> TemplatePipeline:
        images = self._images
        template = ChatTemplate(source, self._variables, self._date, self._origin, images)
        content = ContentConverter(template, images) if images is not None else None
        controls = ControlTokens(template, self.tokens, self._eos_token_ids, content)
        label_builder = LabelBuilder(self.tokens, controls, self._boundaries, images)
        roles = RoleChecker(template.tree, controls.pattern, self._roles)
        fast_path = FastPath(
            template, controls, self.tokens, label_builder, self._train_on, roles.allows
        )
        planner = SequencePlanner(template, controls)
        arguments = ArgumentConverter(template)
        return TemplatePipeline(
            template, controls, planner, label_builder, fast_path, roles, arguments, content
        )


def _template_sources(tokenizer: Any, template: str | dict[str, str] | None) -> dict[str, str]:
    """Return the text of each template by its name; `default` is always there."""
    if isinstance(template, str):
        return {"default": read_template(template)}
    sources = template if template is not None else tokenizer.chat_template
    if sources is None:
        raise ChatError(
            "the tokenizer has no chat template; give one as Jinja text or a file "
            "(`chat.template=path/to/template.jinja`)",
            reason="no template",
        )
    if isinstance(sources, str):
        return {"default": sources}
    return {"default": sources.get("default", next(iter(sources.values()))), **sources}


def _describe_origin(tokenizer: Any, template: str | dict[str, str] | None) -> str:
    """Return where the templates come from, as it follows `the chat template`."""
    if template is None:
        folder = getattr(tokenizer, "name_or_path", "")
        return f" of {folder}" if folder else " of the tokenizer"
    is_text = not isinstance(template, str) or "{" in template or "\n" in template
    return " of the settings" if is_text else f" `{template}`"


def _variables_key(variables: Any) -> str:
    """Return a row's variables as a text that is the same for equal ones."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise _variable_error(f"it must map names to values; found {type(variables).__name__}")
    try:
        return json.dumps(dict(variables), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _variable_error(f"a value is not JSON ({error})") from None


def _variable_error(problem: str) -> ChatError:
    return ChatError(problem, reason="bad template variable", field=KWARGS)


def _describe_unread(variables: Mapping[str, Any], template: ChatTemplate) -> str | None:
    """Return what is wrong with variables that a template never reads; None where it reads all."""
    unread = sorted(variables.keys() - template.read_names)
    if not unread:
        return None
    verb, them = ("is", "it") if len(unread) == 1 else ("are", "them")
    readable = ", ".join(template.list_variables()) or "none"
    return (
        f"{' and '.join(map(repr, unread))} {verb} set, and the chat template never reads {them}; "
        f"variables that it reads: {readable}"
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text and key in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def turn_starts(conversation: Conversation, last: int) -> list[int]:
    """Return positions where a shorter row may start: users' turns behind the first, up to `last`.

    `last` is a message's number in the row as it was given.
    """
    starts = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "user"
        and conversation.numbers[index] < last
        and (index == 0 or conversation.messages[index - 1]["role"] != "user")
    ]
    return [start for start in starts if start > _count_system_messages(conversation)]


def drop_front(conversation: Conversation, start: int) -> Conversation:
    """Return the row from message `start` on, behind its system messages, with its numbers."""
    system = range(_count_system_messages(conversation))
    indices = [*system, *range(start, len(conversation.messages))]
    return replace(
        conversation,
        messages=[conversation.messages[index] for index in indices],
        train=[conversation.train[index] for index in indices],
        numbers=[conversation.numbers[index] for index in indices],
    )


def _count_system_messages(conversation: Conversation) -> int:
    """Return how many system messages the row begins with."""
    count = 0
    while count < len(conversation.messages) and conversation.role(count) in _SYSTEM_ROLES:
        count += 1
    return count


class Truncator:
    """Makes rows fit a length in tokens."""

    def __init__(self, limit: int, drops_turns: bool) -> None:
        """`drops_turns`: whether whole turns may go from the front; else a long row is an error."""
        self._limit = limit
        self._drops_turns = drops_turns

    def truncate(
        self,
        pipeline: TemplatePipeline,
        conversation: Conversation,
        sequences: list[EncodedSequence],
    ) -> tuple[list[EncodedSequence], int]:
        """Return the sequences, the longer ones cut, and how many trained turns that cost.

        Raises ChatError for a row that cannot be made to fit.
        """
        short: list[EncodedSequence] = []
        for sequence in sequences if self._drops_turns else ():
            fits = len(sequence.ids) <= self._limit
            short += [sequence] if fits else self._drop_turns(pipeline, conversation, sequence)
        if not short:
            raise self._too_long_error(sequences)
        before, after = (
            sum(len(sequence.trained_messages) for sequence in each) for each in (sequences, short)
        )
        return short, before - after

    def _too_long_error(self, sequences: list[EncodedSequence]) -> ChatError:
        images = [image for sequence in sequences for image in sequence.images]
        largest = max(images, key=lambda image: image.stop - image.start, default=None)
        size = 0 if largest is None else largest.stop - largest.start
        if largest is not None and size > self._limit:
            return ChatError(
                f"image {largest.number} of the row has {size} tokens by itself, more than "
                f"chat.max_length={self._limit}, and an image is never cut; make it smaller, or "
                "raise chat.max_length",
                reason="too long",
            )
        return ChatError(
            f"the row has {max(len(sequence.ids) for sequence in sequences)} tokens, more than "
            f"chat.max_length={self._limit}, and no whole turns can be removed to make it fit",
            reason="too long",
        )

    def _drop_turns(
        self, pipeline: TemplatePipeline, conversation: Conversation, sequence: EncodedSequence
    ) -> list[EncodedSequence]:
        """Return the sequence without as few turns of its front as make it fit, or nothing."""
        trained = set(sequence.trained_messages)
        starts = turn_starts(conversation, max(trained))
        # Bisection: a row that starts later is shorter.
        low, high = 0, len(starts)
        shortened: list[EncodedSequence] = []
        while low < high:
            middle = (low + high) // 2
            shorter_row = drop_front(conversation, starts[middle])
            attempt = _encode_row(pipeline, shorter_row, trained)
            if all(len(each.ids) <= self._limit for each in attempt):
                shortened, high = attempt, middle
            else:
                low = middle + 1
        return shortened


def _encode_row(
    pipeline: TemplatePipeline, conversation: Conversation, trained: set[int]
) -> list[EncodedSequence]:
    """Return the row's sequences; `trained`: the numbers of the messages that train."""
    indices = [index for index, number in enumerate(conversation.numbers) if number in trained]
    rendered = pipeline.planner.plan(conversation, indices)
    encoded = pipeline.label_builder.encode([(sequence, True) for sequence in rendered])
    return [sequence for group in encoded for sequence in group]
