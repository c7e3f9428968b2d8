"""Rows whose form was met before: planned and encoded without running the template.

A row's form is the roles of its messages and the names of their texts. `FormCache` finds the plan
of a form when it is first met, and matches rows against its conditions. `FastPathEncoder` turns
matched rows into ids: what the template writes is encoded once per form, the rows' own texts in
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import MAX_CHARACTERS
from luthier.chat.fast_path.symbolic import (
    TEXT_FIELDS,
    FormPlan,
    NeedsConcreteText,
    RowForm,
    SequencePlan,
    StripChain,
    SymbolicTemplate,
    TextConditions,
    make_form_plan,
    need_concrete_text,
    symbolic_conversation,
)
from luthier.chat.labels import BoundaryContext, LabelBuilder
from luthier.chat.provenance import FieldOrigin, OriginRun, slice_runs, with_runs
from luthier.chat.template import ChatTemplate
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import (
    RenderedSequence,
    SequencePlanner,
    TrainedSpan,
    select_trained_messages,
)
from luthier.chat.types import (
    BYTES_PER_ID,
    ChatError,
    ChatSequence,
    Reply,
    Segment,
    pack_ids,
    unpack_ids,
)

FormKey = tuple[Any, ...]
"""A form as it is looked up: a role for a message of role and content alone, else all it has."""
TextTemplate = tuple[str | int, ...]
"""A stretch of text between two tokens: text of the template, and numbers of fields."""


@dataclass(slots=True)
class FastPathRow:
    """A row with the plan of its form, whose texts meet the plan's conditions."""

    messages: list[dict[str, Any]]
    plan: FormPlan
    texts: list[str]
    """The texts of its messages, one after the other."""
    joined_texts: str
    """All of these in one, with a character between them that ends every token."""
    field_values: list[str]
    """What stands in the plan's fields."""

    def render(self) -> list[RenderedSequence]:
        """Return the sequences as the planner would give them, each character with its origin."""
        return [self._render_sequence(plan) for plan in self.plan.sequences]

    def _render_sequence(self, plan: SequencePlan) -> RenderedSequence:
        texts = [self.field_values[p] if isinstance(p, int) else p for p in plan.pieces]
        starts = [0, *accumulate(map(len, texts))]
        runs: list[OriginRun] = []
        for piece, text in zip(plan.pieces, texts, strict=True):
            runs += self._field_runs(piece) if isinstance(piece, int) else [(len(text), None, 0)]
        spans = [
            TrainedSpan(
                span.message,
                starts[span.start[0]] + span.start[1],
                starts[span.stop[0]] + span.stop[1],
                span.stop_token,
            )
            for span in plan.spans
        ]
        return RenderedSequence(with_runs("".join(texts), tuple(runs)), spans)

    def _field_runs(self, number: int) -> tuple[OriginRun, ...]:
        index, key, _ = self.plan.fields[number]
        text, value = self.messages[index][key], self.field_values[number]
        start = text.index(value)
        origin = FieldOrigin(index, self.messages[index]["role"], key, text)
        return slice_runs(((len(text), origin, 0),), start, start + len(value))


class FormMatcher:
    """Matches rows of one form against the conditions of its plan."""

    def __init__(self, form: RowForm, plan: FormPlan) -> None:
        self._plan = plan
        self._text_keys = [(index, key) for index, (_, keys, _) in enumerate(form) for key in keys]
        self._fields = [
            (self._text_keys.index((index, key)), _make_stripper(chain))
            for index, key, chain in plan.fields
        ]
        conditions = plan.conditions
        edges = (conditions.starts, conditions.ends, conditions.equals)
        self._forbidden = conditions.contains.union(
            *(texts for edge in edges for texts in edge.values())
        )

    def match(self, messages: list[Any]) -> FastPathRow | None:
        """Return the row with the form's plan; None if one of its texts fails the conditions."""
        texts: list[str] = [messages[index][key] for index, key in self._text_keys]
        joined = "\0".join(texts)
        if not _is_valid_text(joined):
            return None
        # A text that starts with another, ends with it or equals it contains it: most rows contain
        # none, and need no closer look.
        if any(text in joined for text in self._forbidden) and not self._are_met(texts, joined):
            return None
        values = [
            strip(texts[number]) if strip else texts[number] for number, strip in self._fields
        ]
        return FastPathRow(messages, self._plan, texts, joined, values)

    def _are_met(self, texts: list[str], joined: str) -> bool:
        """Return whether the conditions hold, each looked at for itself."""
        conditions = self._plan.conditions
        if any(text in joined for text in conditions.contains):
            return False
        for is_at, edges in (
            (str.startswith, conditions.starts),
            (str.endswith, conditions.ends),
        ):
            for chain, edge in edges.items():
                if any(is_at(_apply_strips(chain, text), tuple(edge)) for text in texts):
                    return False
        return not any(
            _apply_strips(chain, text) in equals
            for chain, equals in conditions.equals.items()
            for text in texts
        )


def _is_valid_text(joined: str) -> bool:
    """Return whether the texts are Unicode of a size that can be held."""
    if len(joined) > MAX_CHARACTERS:
        return False
    if joined.isascii():
        return True
    try:
        joined.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make_stripper(chain: StripChain) -> Callable[[str], str] | None:
    """Return what strips a text so; None for a chain that leaves it as it is."""
    if not chain:
        return None
    if chain == (("lstrip", None), ("rstrip", None)):
        return str.strip
    return partial(_apply_strips, chain)


def _apply_strips(chain: StripChain, text: str) -> str:
    for method, chars in chain:
        text = getattr(text, method)(chars)
    return text


class FormCache:
    """The plans of one template, each found when a row of its form is first met."""

    def __init__(
        self,
        template: ChatTemplate,
        controls: ControlTokens,
        train_on: str | list[str],
        allows_roles: Callable[[Iterable[str]], bool],
    ) -> None:
        self._template = template
        self._controls = controls
        self._train_on = train_on
        self._allows_roles = allows_roles
        self._matchers: dict[FormKey, FormMatcher | None] = {}

    @cached_property
    def symbolic_template(self) -> SymbolicTemplate:
        """The template as it runs on symbolic texts."""
        template = self._template
        return SymbolicTemplate(template.source, template.variables, template.date)

    def match(self, row: dict[str, Any]) -> FastPathRow | None:
        """Return the row with the plan of its form; None where it must be planned for itself."""
        messages = row.get("messages")
        if type(messages) is not list or row.get("tools") is not None:
            return None
        key = _form_key(messages)
        if key is None:
            return None
        if key not in self._matchers:
            self._matchers[key] = self._make_matcher(key)
        matcher = self._matchers[key]
        return None if matcher is None else matcher.match(messages)

    def _make_matcher(self, key: FormKey) -> FormMatcher | None:
        """Return what matches rows of the form; None where the template reads the texts."""
        try:
            form = self._form(key)
            # A row with another role is refused, with words, on the plain way.
            if not self._allows_roles([role for role, _, _ in form]):
                return None
            return FormMatcher(form, self._make_plan(form))
        except (NeedsConcreteText, ChatError):
            return None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # A filter that reads a text by another way than symbolic text allows finds none there.
            return None

    def _form(self, key: FormKey) -> RowForm:
        messages = [(m, ("content",), None) if isinstance(m, str) else m for m in key]
        conversation = symbolic_conversation(
            tuple((role, keys, True) for role, keys, _ in messages), TextConditions()
        )
        conversation.train = [train for _, _, train in messages]
        trained = set(select_trained_messages(conversation, self._train_on))
        return tuple((role, keys, i in trained) for i, (role, keys, _) in enumerate(messages))

    def _make_plan(self, form: RowForm) -> FormPlan:
        """Plan a row of symbolic texts, as rows of concrete texts are planned."""
        trained = [index for index, (_, _, trains) in enumerate(form) if trains]
        if not trained:
            raise NeedsConcreteText
        template, conditions = self.symbolic_template, TextConditions()
        template.placeholders.clear()
        planner = SequencePlanner(template, self._controls, need_concrete_text)
        sequences = planner.plan(symbolic_conversation(form, conditions), trained)
        return make_form_plan(form, sequences, template.placeholders, conditions)


def _form_key(messages: list[Any]) -> FormKey | None:
    """Return the row's form as a key; None for a row that has more than texts, or blank ones."""
    key: list[Any] = []
    for message in messages:
        if type(message) is not dict:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str or not role:
            return None
        if not content or content.isspace():
            return None
        key.append(role if len(message) == 2 else _message_key(role, message))
        if key[-1] is None:
            return None
    return tuple(key) or None


def _message_key(
    role: str, message: dict[str, Any]
) -> tuple[str, tuple[str, ...], bool | None] | None:
    """Return a message's role, the names of its texts in their order, and its own `train` flag.

    None for a message that has more than texts, or blank ones.
    """
    names: list[str] = []
    for name, value in message.items():
        if name == "train":
            continue
        if name == "role":
            # Where it is not the first, a template that lists a message's fields sees that.
            if names:
                return None
        elif name not in TEXT_FIELDS or type(value) is not str or not value or value.isspace():
            return None
        else:
            names.append(name)
    train = message.get("train")
    return role, tuple(names), None if train is None else bool(train)


@dataclass(slots=True)
class ReplySlot:
    """A trained reply of a token template."""

    message: int
    start: int
    """How many items stand before it."""
    header: str
    """The text in front of it from the last token on; empty where that holds a field."""
    stop: int = 0
    """The item behind its last one."""
    first_text: TextTemplate = ()
    """Its text up to the first token."""
    first_token: str = ""
    """That token, if there is one."""


@dataclass(slots=True)
class TokenTemplate:
    """A sequence as ids of the template's text, and texts that each row fills for itself."""

    items: list[bytes | int] = field(default_factory=list)
    """Packed ids as they stand, or the number of a text."""
    replies: list[ReplySlot] = field(default_factory=list)


@dataclass(slots=True)
class FormTokens:
    """The token templates of one form."""

    text_numbers: dict[TextTemplate, int] = field(default_factory=dict)
    """The texts that rows fill, each with the number by which items name it."""
    sequences: list[TokenTemplate] = field(default_factory=list)


@dataclass(slots=True)
class FastPathDraft:
    """A row on its way to ids: its texts, and the boundaries of its replies."""

    row: FastPathRow
    form_tokens: FormTokens
    texts: list[str]
    boundaries: list[BoundaryContext]


class FastPathEncoder:
    """Encodes rows with a plan, for one tokenizer and one template."""

    def __init__(self, tokens: TokenEncoder, label_builder: LabelBuilder) -> None:
        self._tokens = tokens
        self._label_builder = label_builder
        # By the plan's id: plans live as long as the form cache beside this encoder.
        self._form_tokens: dict[int, FormTokens | None] = {}

    def encode(self, rows: Sequence[FastPathRow]) -> list[list[ChatSequence] | None]:
        """Return the sequences of each row; None for a row that the label builder must see to."""
        if not self._label_builder.is_splittable:
            return [None] * len(rows)
        drafts = [self._draft(row) for row in rows]
        keeps_ids = self._label_builder.check_boundaries(
            boundary for draft in drafts if draft for boundary in draft.boundaries
        )
        drafts = [
            draft if draft and all(map(keeps_ids.__getitem__, draft.boundaries)) else None
            for draft in drafts
        ]
        ids = self._tokens.encode_plain([text for draft in drafts if draft for text in draft.texts])
        return [self._sequences(draft, ids) if draft else None for draft in drafts]

    def _draft(self, row: FastPathRow) -> FastPathDraft | None:
        """Return the row's texts; None where one may hold a token or a boundary is unknown."""
        key = id(row.plan)
        if key not in self._form_tokens:
            self._form_tokens[key] = self._make_form_tokens(row.plan.sequences)
        form_tokens = self._form_tokens[key]
        if form_tokens is None or self._tokens.holds_token(row.joined_texts):
            return None
        values = row.field_values
        boundaries = [
            self._label_builder.boundary(
                reply.header, _fill(reply.first_text, values), reply.first_token
            )
            for sequence in form_tokens.sequences
            for reply in sequence.replies[:-1]
        ]
        texts = [_fill(text, values) for text in form_tokens.text_numbers]
        return FastPathDraft(row, form_tokens, texts, boundaries)

    def _sequences(self, draft: FastPathDraft, ids: Mapping[str, bytes]) -> list[ChatSequence]:
        text_ids = [ids[text] for text in draft.texts]
        return [
            self._sequence(draft.row, number, template, text_ids)
            for number, template in enumerate(draft.form_tokens.sequences)
        ]

    def _sequence(
        self, row: FastPathRow, number: int, template: TokenTemplate, text_ids: list[bytes]
    ) -> ChatSequence:
        ids = [item if isinstance(item, bytes) else text_ids[item] for item in template.items]
        ends = [0, *accumulate(map(len, ids))]
        replies = [
            Reply(r.message, ends[r.start] // BYTES_PER_ID, ends[r.stop] // BYTES_PER_ID)
            for r in template.replies
        ]
        return ChatSequence(b"".join(ids), replies, partial(self._segments, row, number))

    def _segments(self, row: FastPathRow, number: int) -> list[Segment]:
        """Return the segments, worked out the plain way, for they are seldom asked for."""
        (encoded,) = self._label_builder.encode([(row.render()[number], False)])
        return encoded[-1].to_chat_sequence().segments

    def _make_form_tokens(self, plans: list[SequencePlan]) -> FormTokens | None:
        """Return the token templates of sequences; None where they depend on the texts."""
        form_tokens = FormTokens()
        if not all(self._are_fields_apart(plan.pieces) for plan in plans):
            return None
        for plan in plans:
            template = self._make_template(plan, form_tokens.text_numbers)
            self._add_prefix(template)
            if not all(reply.header and reply.first_token for reply in template.replies[:-1]):
                return None
            form_tokens.sequences.append(template)
        return form_tokens

    def _add_prefix(self, template: TokenTemplate) -> None:
        """Put in front what the label builder would; a row's own texts hold no token."""
        first = template.items[0] if template.items else b""
        ids = unpack_ids(first) if isinstance(first, bytes) else []
        prefix = self._label_builder.find_prefix(ids)
        if prefix:
            template.items.insert(0, pack_ids(prefix))
            for reply in template.replies:
                reply.start, reply.stop = reply.start + 1, reply.stop + 1

    def _are_fields_apart(self, pieces: list[str | int]) -> bool:
        """Return whether no token can arise where a field meets what stands beside it."""
        pairs = list(pairwise(pieces))
        if any(isinstance(left, int) and isinstance(right, int) for left, right in pairs):
            return False
        before = {left for left, right in pairs if isinstance(left, str)}
        behind = {right for left, right in pairs if isinstance(right, str)}
        return not any(map(self._tokens.may_end_in_token, before)) and not any(
            map(self._tokens.may_begin_in_token, behind)
        )

    def _make_template(
        self, plan: SequencePlan, text_numbers: dict[TextTemplate, int]
    ) -> TokenTemplate:
        """Take a sequence apart at its tokens and at the ends of its replies."""
        builder = _TokenTemplateBuilder(self._tokens, text_numbers)
        starts = {span.start: span.message for span in plan.spans}
        stops = {span.stop for span in plan.spans}
        cuts: dict[int, set[int]] = {}
        for number, offset in (*starts, *stops):
            cuts.setdefault(number, set()).add(offset)
        for number, piece in enumerate([*plan.pieces, ""]):
            size = len(piece) if isinstance(piece, str) else 1
            for begin, end in pairwise([*sorted({0, *cuts.get(number, ())}), size]):
                if (number, begin) in stops:
                    builder.stop_reply()
                if (number, begin) in starts:
                    builder.start_reply(starts[number, begin])
                builder.add(piece[begin:end] if isinstance(piece, str) else piece)
        builder.flush()
        return builder.template


class _TokenTemplateBuilder:
    """Builds a token template from left to right."""

    def __init__(self, tokens: TokenEncoder, text_numbers: dict[TextTemplate, int]) -> None:
        self.template = TokenTemplate()
        self._tokens = tokens
        self._text_numbers = text_numbers
        self._text: list[str | int] = []
        """The text that is not yet an item."""
        self._since_token: list[str | int] = []
        """What came since the last token, the token included."""
        self._is_apart = True
        """Whether ids that follow must not be joined to the item before."""

    def start_reply(self, message: int) -> None:
        """The reply of `message` begins here."""
        self._cut()
        plain = [piece for piece in self._since_token if isinstance(piece, str)]
        header = "".join(plain) if len(plain) == len(self._since_token) else ""
        self.template.replies.append(ReplySlot(message, len(self.template.items), header))

    def stop_reply(self) -> None:
        """The last reply ends here."""
        self._cut()
        self.template.replies[-1].stop = len(self.template.items)

    def add(self, piece: str | int) -> None:
        """Add text of the template, or the number of a field."""
        if isinstance(piece, int):
            self._text.append(piece)
            self._since_token.append(piece)
            return
        for number, text in enumerate(self._tokens.split_at_tokens(piece)):
            if number % 2:
                self._add_token(text)
            elif text:
                self._text.append(text)
                self._since_token.append(text)

    def flush(self) -> None:
        """Make an item of the text so far: ids where the template wrote all of it."""
        for reply in self.template.replies[-1:]:
            if not reply.first_token:
                reply.first_text = reply.first_text or tuple(self._text)
        plain = [piece for piece in self._text if isinstance(piece, str)]
        if plain and len(plain) == len(self._text):
            text = "".join(plain)
            self._add_ids(self._tokens.encode_plain([text])[text])
        elif self._text:
            number = self._text_numbers.setdefault(tuple(self._text), len(self._text_numbers))
            self.template.items.append(number)
            self._is_apart = True
        self._text = []

    def _add_token(self, token: str) -> None:
        self.flush()
        self._add_ids(self._tokens.token_ids[token])
        self._since_token = [token]
        for reply in self.template.replies[-1:]:
            reply.first_token = reply.first_token or token

    def _add_ids(self, ids: bytes) -> None:
        items = self.template.items
        last = items[-1] if items and not self._is_apart else None
        if isinstance(last, bytes):
            items[-1] = last + ids
        else:
            items.append(ids)
        self._is_apart = False

    def _cut(self) -> None:
        self.flush()
        self._is_apart = True


def _fill(template: TextTemplate, values: list[str]) -> str:
    texts = [values[piece] if isinstance(piece, int) else piece for piece in template]
    return texts[0] if len(texts) == 1 else "".join(texts)
