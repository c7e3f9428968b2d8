"""Rows of known form to ids and labels: what the template writes is encoded once for all rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

from luthier.chat.forms import Known
from luthier.chat.labels import Around, Labeller
from luthier.chat.packed import BYTES
from luthier.chat.sequences import ChatSequence, Reply, Segment
from luthier.chat.skeleton import SequencePlan
from luthier.chat.tokens import TokenEncoder

Recipe = tuple[str | int, ...]
"""A stretch of text between two tokens: text of the template, and numbers of fields."""


@dataclass(slots=True)
class TrackReply:
    """A trained reply of a track."""

    message: int
    start: int
    """Items before it."""
    head: str
    """The text in front of it from the last token on; empty where that holds a field."""
    stop: int = 0
    """The item behind its last one."""
    first: Recipe = ()
    """Its text up to the first token."""
    token: str = ""
    """That token, if there is one."""


@dataclass(slots=True)
class Track:
    """A sequence as ids, and texts that are still to be encoded."""

    items: list[bytes | int] = field(default_factory=list)
    """Packed ids as they stand, or the number of a text."""
    replies: list[TrackReply] = field(default_factory=list)


@dataclass(slots=True)
class Layout:
    """What all rows of one form are made of."""

    recipes: dict[Recipe, int] = field(default_factory=dict)
    """The recipe of each text, by which it has its number."""
    tracks: list[Track] = field(default_factory=list)


@dataclass(slots=True)
class Draft:
    """A row on its way: its texts, and what decides where they may be parted."""

    row: Known
    layout: Layout
    texts: list[str]
    boundaries: list[Around]


class Tracks:
    """Encodes rows of known form, for one tokenizer and one template."""

    def __init__(self, tokens: TokenEncoder, labeller: Labeller) -> None:
        self._tokens = tokens
        self._labeller = labeller
        self._layouts: dict[int, Layout | None] = {}

    def encode(self, rows: list[Known]) -> list[list[ChatSequence] | None]:
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

    def _draft(self, row: Known) -> Draft | None:
        """The row's texts; None where one may hold a token, or the boundaries cannot be told."""
        key = id(row.skeleton)
        if key not in self._layouts:
            self._layouts[key] = self._layout(row.skeleton.sequences)
        layout = self._layouts[key]
        if layout is None or self._tokens.holds_token(row.joined):
            return None
        values = row.values
        boundaries = [
            self._labeller.around(reply.head, _text(reply.first, values), reply.token)
            for track in layout.tracks
            for reply in track.replies[:-1]
        ]
        return Draft(row, layout, [_text(recipe, values) for recipe in layout.recipes], boundaries)

    def _sequences(self, draft: Draft, known: Mapping[str, bytes]) -> list[ChatSequence]:
        texts = [known[text] for text in draft.texts]
        return [
            self._sequence(draft.row, number, track, texts)
            for number, track in enumerate(draft.layout.tracks)
        ]

    def _sequence(self, row: Known, number: int, track: Track, texts: list[bytes]) -> ChatSequence:
        ids = [item if isinstance(item, bytes) else texts[item] for item in track.items]
        ends = [0, *accumulate(map(len, ids))]
        replies = [
            Reply(reply.message, ends[reply.start] // BYTES, ends[reply.stop] // BYTES)
            for reply in track.replies
        ]
        return ChatSequence(b"".join(ids), replies, partial(self._segments, row, number))

    def _segments(self, row: Known, number: int) -> list[Segment]:
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

    def _layout(self, plans: list[SequencePlan]) -> Layout | None:
        """The tracks of sequences; None where it takes the text to tell their parts."""
        layout = Layout()
        if not all(self._is_apart(plan.parts) for plan in plans):
            return None
        for plan in plans:
            track = self._track(plan, layout.recipes)
            if not all(reply.head and reply.token for reply in track.replies[:-1]):
                return None
            layout.tracks.append(track)
        return layout

    def _track(self, plan: SequencePlan, recipes: dict[Recipe, int]) -> Track:
        """Take a sequence apart at its tokens and at the ends of its replies."""
        builder = _Builder(self._tokens, recipes)
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


class _Builder:
    """Builds a track from left to right."""

    def __init__(self, tokens: TokenEncoder, recipes: dict[Recipe, int]) -> None:
        self.track = Track()
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
        self.track.replies.append(TrackReply(message, len(self.track.items), head))

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


def _text(recipe: Recipe, values: list[str]) -> str:
    parts = [values[part] if isinstance(part, int) else part for part in recipe]
    return parts[0] if len(parts) == 1 else "".join(parts)
