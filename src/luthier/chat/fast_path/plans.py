"""Rows of a form that was met before: planned by its skeleton, without running the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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
from luthier.chat.provenance import FieldOrigin, slice_runs, with_runs
from luthier.chat.template import ChatTemplate
from luthier.chat.tokens import TokenEncoder
from luthier.chat.turns import (
    RenderedSequence,
    SequencePlanner,
    TrainedSpan,
    select_trained_messages,
)
from luthier.chat.types import BYTES_PER_ID, ChatError, ChatSequence, Reply, Segment

Stripper = Callable[[str], str]
FormKey = tuple[Any, ...]
"""A form as it is looked up: a role for a message of role and content alone, else all it has."""


@dataclass(slots=True)
class FastPathRow:
    """A row whose skeleton is known."""

    messages: list[dict[str, Any]]
    reading: FormMatcher
    texts: list[str]
    """The texts of its messages, one after the other."""
    joined: str
    """All of these in one, with a character between them that ends every token."""
    values: list[str]
    """What stands in the skeleton's fields."""

    @property
    def skeleton(self) -> FormPlan:
        """What the template makes of rows of its form."""
        return self.reading.skeleton

    def sequences(self) -> list[RenderedSequence]:
        """The sequences as the planner would give them, each character with its origin."""
        return [self._sequence(plan) for plan in self.skeleton.sequences]

    def _sequence(self, plan: SequencePlan) -> RenderedSequence:
        values = self.values
        parts: list[str] = [values[part] if isinstance(part, int) else part for part in plan.parts]
        starts = [0]
        for text in parts:
            starts.append(starts[-1] + len(text))
        runs: list[Any] = []
        for part, text in zip(plan.parts, parts, strict=True):
            runs += self._runs(part) if isinstance(part, int) else [(len(text), None, 0)]
        spans = [
            TrainedSpan(
                span.message,
                starts[span.start[0]] + span.start[1],
                starts[span.stop[0]] + span.stop[1],
                span.token,
            )
            for span in plan.spans
        ]
        return RenderedSequence(with_runs("".join(parts), tuple(runs)), spans)

    def _runs(self, number: int) -> Any:
        index, key, _ = self.skeleton.fields[number]
        whole, value = self.messages[index][key], self.values[number]
        start = whole.index(value)
        origin = FieldOrigin(index, self.messages[index]["role"], key, whole)
        return slice_runs(((len(whole), origin, 0),), start, start + len(value))


class FormMatcher:
    """Reads rows of one form."""

    def __init__(self, form: RowForm, skeleton: FormPlan) -> None:
        self.skeleton = skeleton
        self._places = [(index, key) for index, (_, keys, _) in enumerate(form) for key in keys]
        self._fields = [
            (self._places.index((index, key)), _make_stripper(chain))
            for index, key, chain in skeleton.fields
        ]
        asked = skeleton.conditions
        found = (asked.starts, asked.ends, asked.equals)
        self._doubts = asked.contains.union(*(texts for each in found for texts in each.values()))

    def known(self, messages: list[Any]) -> FastPathRow | None:
        """The row, unless one of its texts does not meet the conditions."""
        texts: list[str] = [messages[index][key] for index, key in self._places]
        joined = "\0".join(texts)
        if not _is_valid_text(joined):
            return None
        # Whoever starts with a text, ends with it or equals it contains it.
        if any(doubt in joined for doubt in self._doubts) and not self._are_met(texts, joined):
            return None
        values = [strip(texts[place]) if strip else texts[place] for place, strip in self._fields]
        return FastPathRow(messages, self, texts, joined, values)

    def _are_met(self, texts: list[str], joined: str) -> bool:
        """Whether the conditions hold, each looked at."""
        asked = self.skeleton.conditions
        edges = [(str.startswith, asked.starts), (str.endswith, asked.ends)]
        if any(text in joined for text in asked.contains):
            return False
        for is_at, found in edges:
            for chain, edge in found.items():
                if any(is_at(_apply_strips(chain, text), tuple(edge)) for text in texts):
                    return False
        return not any(
            _apply_strips(chain, text) in equals
            for chain, equals in asked.equals.items()
            for text in texts
        )


class FormCache:
    """The skeletons of one template, found when a form is first met."""

    def __init__(
        self, template: ChatTemplate, controls: ControlTokens, train_on: str | list[str]
    ) -> None:
        self._template = template
        self._controls = controls
        self._train_on = train_on
        self._opaque: SymbolicTemplate | None = None
        self._found: dict[FormKey, FormMatcher | None] = {}

    def known(self, row: dict[str, Any]) -> FastPathRow | None:
        """The row with its skeleton; None where it must be planned for itself."""
        messages = row.get("messages")
        if type(messages) is not list or row.get("tools") is not None:
            return None
        key = _form_key(messages)
        if key is None:
            return None
        if key not in self._found:
            self._found[key] = self._learn(key)
        reading = self._found[key]
        return None if reading is None else reading.known(messages)

    def _learn(self, key: FormKey) -> FormMatcher | None:
        """How to read rows of the form; None where the template looks at more than the form."""
        try:
            form = self._form(key)
            return FormMatcher(form, self._skeleton(form))
        except (NeedsConcreteText, ChatError):
            return None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # What reads a text otherwise than asked for finds no text there.
            return None

    def _skeleton(self, form: RowForm) -> FormPlan:
        template, conditions = self._template, TextConditions()
        if self._opaque is None:
            self._opaque = SymbolicTemplate(template.source, template.variables, template.date)
        self._opaque.places.clear()
        trained = [place for place, (_, _, trains) in enumerate(form) if trains]
        if not trained:
            raise NeedsConcreteText
        planner = SequencePlanner(self._opaque, self._controls, need_concrete_text)
        sequences = planner.plan(symbolic_conversation(form, conditions), trained)
        return make_form_plan(form, sequences, self._opaque.places, conditions)

    def _form(self, key: FormKey) -> RowForm:
        plain = [(part, ("content",), None) if isinstance(part, str) else part for part in key]
        conversation = symbolic_conversation(
            tuple((role, keys, True) for role, keys, _ in plain), TextConditions()
        )
        conversation.train = [train for _, _, train in plain]
        trained = set(select_trained_messages(conversation, self._train_on))
        return tuple((role, keys, place in trained) for place, (role, keys, _) in enumerate(plain))


def _form_key(messages: list[Any]) -> FormKey | None:
    """The row's form as a key; None for a row that has more than texts, or blank ones."""
    found: list[Any] = []
    for message in messages:
        if type(message) is not dict:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str or not role:
            return None
        if not content or content.isspace():
            return None
        found.append(role if len(message) == 2 else _message_key(role, message))
        if found[-1] is None:
            return None
    return tuple(found) or None


def _message_key(
    role: str, message: dict[str, Any]
) -> tuple[str, tuple[str, ...], bool | None] | None:
    """A message's role, its texts in their order, and its own `train` flag."""
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


def _is_valid_text(joined: str) -> bool:
    """Whether the texts are Unicode of a size that can be held."""
    if len(joined) > MAX_CHARACTERS:
        return False
    if joined.isascii():
        return True
    try:
        joined.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make_stripper(chain: StripChain) -> Stripper | None:
    """What strips a text so; None for a chain that leaves it as it is."""
    if not chain:
        return None
    if chain == (("lstrip", None), ("rstrip", None)):
        return str.strip
    return partial(_apply_strips, chain)


def _apply_strips(chain: StripChain, text: str) -> str:
    for method, chars in chain:
        text = getattr(text, method)(chars)
    return text


# Rows of known form to ids and labels: what the template writes is encoded once for all rows.

TextTemplate = tuple[str | int, ...]
"""A stretch of text between two tokens: text of the template, and numbers of fields."""


@dataclass(slots=True)
class ReplySlot:
    """A trained reply of a track."""

    message: int
    start: int
    """Items before it."""
    head: str
    """The text in front of it from the last token on; empty where that holds a field."""
    stop: int = 0
    """The item behind its last one."""
    first: TextTemplate = ()
    """Its text up to the first token."""
    token: str = ""
    """That token, if there is one."""


@dataclass(slots=True)
class TokenTemplate:
    """A sequence as ids, and texts that are still to be encoded."""

    items: list[bytes | int] = field(default_factory=list)
    """Packed ids as they stand, or the number of a text."""
    replies: list[ReplySlot] = field(default_factory=list)


@dataclass(slots=True)
class FormTokens:
    """What all rows of one form are made of."""

    recipes: dict[TextTemplate, int] = field(default_factory=dict)
    """The recipe of each text, by which it has its number."""
    tracks: list[TokenTemplate] = field(default_factory=list)


@dataclass(slots=True)
class FastPathDraft:
    """A row on its way: its texts, and what decides where they may be parted."""

    row: FastPathRow
    layout: FormTokens
    texts: list[str]
    boundaries: list[BoundaryContext]


class FastPathEncoder:
    """Encodes rows of known form, for one tokenizer and one template."""

    def __init__(self, tokens: TokenEncoder, labeller: LabelBuilder) -> None:
        self._tokens = tokens
        self._labeller = labeller
        self._layouts: dict[int, FormTokens | None] = {}

    def encode(self, rows: list[FastPathRow]) -> list[list[ChatSequence] | None]:
        """The sequences of each row; None for a row that the labeller must see to."""
        if not self._labeller.splits:
            return [None] * len(rows)
        drafts = [self._draft(row) for row in rows]
        fits = self._labeller.leaves_alone(
            around for draft in drafts if draft for around in draft.boundaries
        )
        kept = [
            draft if draft and all(map(fits.__getitem__, draft.boundaries)) else None
            for draft in drafts
        ]
        ids = self._tokens.known([text for draft in kept if draft for text in draft.texts])
        return [self._sequences(draft, ids) if draft else None for draft in kept]

    def _draft(self, row: FastPathRow) -> FastPathDraft | None:
        """The row's texts; None where one may hold a token, or the boundaries cannot be told."""
        key = id(row.skeleton)
        if key not in self._layouts:
            self._layouts[key] = self._layout(row.skeleton.sequences)
        layout = self._layouts[key]
        if layout is None or self._tokens.holds_token(row.joined):
            return None
        values = row.values
        boundaries = [
            self._labeller.around(reply.head, _fill_template(reply.first, values), reply.token)
            for track in layout.tracks
            for reply in track.replies[:-1]
        ]
        return FastPathDraft(
            row, layout, [_fill_template(recipe, values) for recipe in layout.recipes], boundaries
        )

    def _sequences(self, draft: FastPathDraft, known: Mapping[str, bytes]) -> list[ChatSequence]:
        texts = [known[text] for text in draft.texts]
        return [
            self._sequence(draft.row, number, track, texts)
            for number, track in enumerate(draft.layout.tracks)
        ]

    def _sequence(
        self, row: FastPathRow, number: int, track: TokenTemplate, texts: list[bytes]
    ) -> ChatSequence:
        ids = [item if isinstance(item, bytes) else texts[item] for item in track.items]
        ends = [0, *accumulate(map(len, ids))]
        replies = [
            Reply(
                reply.message, ends[reply.start] // BYTES_PER_ID, ends[reply.stop] // BYTES_PER_ID
            )
            for reply in track.replies
        ]
        return ChatSequence(b"".join(ids), replies, partial(self._segments, row, number))

    def _segments(self, row: FastPathRow, number: int) -> list[Segment]:
        (encoded,) = self._labeller.encode([(row.sequences()[number], False)])
        return encoded[-1].sequence().segments

    def _is_apart(self, parts: list[str | int]) -> bool:
        """Whether no token can arise where a field meets what stands beside it."""
        pairs = list(pairwise(parts))
        if any(isinstance(left, int) and isinstance(right, int) for left, right in pairs):
            return False
        before = {left for left, right in pairs if isinstance(left, str)}
        behind = {right for left, right in pairs if isinstance(right, str)}
        ends = any(map(self._tokens.may_end_in_token, before))
        return not (ends or any(map(self._tokens.may_begin_in_token, behind)))

    def _layout(self, plans: list[SequencePlan]) -> FormTokens | None:
        """The tracks of sequences; None where it takes the text to tell their parts."""
        layout = FormTokens()
        if not all(self._is_apart(plan.parts) for plan in plans):
            return None
        for plan in plans:
            track = self._track(plan, layout.recipes)
            if not all(reply.head and reply.token for reply in track.replies[:-1]):
                return None
            layout.tracks.append(track)
        return layout

    def _track(self, plan: SequencePlan, recipes: dict[TextTemplate, int]) -> TokenTemplate:
        """Take a sequence apart at its tokens and at the ends of its replies."""
        builder = _TokenTemplateBuilder(self._tokens, recipes)
        starts = {span.start: span.message for span in plan.spans}
        stops = {span.stop for span in plan.spans}
        marks: dict[int, set[int]] = {}
        for place, at in (*starts, *stops):
            marks.setdefault(place, set()).add(at)
        for number, part in enumerate([*plan.parts, ""]):
            size = len(part) if isinstance(part, str) else 1
            for begin, end in pairwise([*sorted({0, *marks.get(number, ())}), size]):
                if (number, begin) in stops:
                    builder.stop()
                if (number, begin) in starts:
                    builder.start(starts[number, begin])
                builder.add(part[begin:end] if isinstance(part, str) else part)
        builder.flush()
        return builder.track


class _TokenTemplateBuilder:
    """Builds a track from left to right."""

    def __init__(self, tokens: TokenEncoder, recipes: dict[TextTemplate, int]) -> None:
        self.track = TokenTemplate()
        self._tokens = tokens
        self._recipes = recipes
        self._recipe: list[str | int] = []
        self._since: list[str | int] = []
        """What came since the last token, the token included."""
        self._apart = True
        """Whether ids that follow must not be joined to the item before."""

    def start(self, message: int) -> None:
        self._cut()
        plain = [part for part in self._since if isinstance(part, str)]
        head = "".join(plain) if len(plain) == len(self._since) else ""
        self.track.replies.append(ReplySlot(message, len(self.track.items), head))

    def stop(self) -> None:
        self._cut()
        self.track.replies[-1].stop = len(self.track.items)

    def add(self, part: str | int) -> None:
        if isinstance(part, int):
            self._recipe.append(part)
            self._since.append(part)
            return
        for number, piece in enumerate(self._tokens.parted(part)):
            if number % 2:
                self._token(piece)
            elif piece:
                self._recipe.append(piece)
                self._since.append(piece)

    def flush(self) -> None:
        for reply in self.track.replies[-1:]:
            if not reply.token:
                reply.first = reply.first or tuple(self._recipe)
        plain = [part for part in self._recipe if isinstance(part, str)]
        if plain and len(plain) == len(self._recipe):
            text = "".join(plain)
            self._ids(self._tokens.known([text])[text])
        elif self._recipe:
            recipe = tuple(self._recipe)
            self.track.items.append(self._recipes.setdefault(recipe, len(self._recipes)))
            self._apart = True
        self._recipe = []

    def _token(self, token: str) -> None:
        self.flush()
        self._ids(self._tokens.token(token))
        self._since = [token]
        for reply in self.track.replies[-1:]:
            reply.token = reply.token or token

    def _ids(self, ids: bytes) -> None:
        last = self.track.items[-1] if self.track.items and not self._apart else None
        if isinstance(last, bytes):
            self.track.items[-1] = last + ids
        else:
            self.track.items.append(ids)
        self._apart = False

    def _cut(self) -> None:
        self.flush()
        self._apart = True


def _fill_template(recipe: TextTemplate, values: list[str]) -> str:
    parts = [values[part] if isinstance(part, int) else part for part in recipe]
    return parts[0] if len(parts) == 1 else "".join(parts)
