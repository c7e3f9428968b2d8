"""Sequences of text -> ids and labels, with a token boundary between each prompt and its reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.provenance import FieldOrigin, TracedStr
from luthier.chat.tokens import PieceKind, TextPiece, TokenEncoder, origin_spans
from luthier.chat.turns import RenderedSequence, TrainedSpan
from luthier.chat.types import IGNORED, ChatSequence, Reply, Segment

# Where each token of a sequence came from, for people to look at.


def make_segments(
    plan: RenderedSequence, blocks: list[list[TextPiece]], labels: list[int], tokens: TokenEncoder
) -> list[Segment]:
    """The sequence as runs of tokens of one origin; a token counts to where it starts."""
    origins = _token_origins(plan, [piece for block in blocks for piece in block], tokens)
    found: list[Segment] = []
    start = 0
    for place in range(1, len(labels) + 1):
        same = place < len(labels) and origins[place] is origins[start]
        if same and (labels[place] == IGNORED) == (labels[start] == IGNORED):
            continue
        found.append(_make_segment(start, place, origins[start], labels[start] != IGNORED))
        start = place
    return found


def _make_segment(start: int, end: int, origin: FieldOrigin | None, trained: bool) -> Segment:
    if origin is None:
        return Segment(start, end, None, None, None, trained)
    return Segment(start, end, origin.role, origin.message, origin.field, trained)


def _token_origins(
    plan: RenderedSequence, pieces: list[TextPiece], tokens: TokenEncoder
) -> list[FieldOrigin | None]:
    """The origin of each token's first character."""
    found: list[FieldOrigin | None] = []
    runs = iter(plan.text._runs)
    end = 0
    origin: FieldOrigin | None = None
    position = 0
    for piece in pieces:
        for offset in tokens.starts(piece):
            while position + offset >= end:
                run = next(runs, None)
                if run is None:
                    break
                end += run[0]
                origin = run[1]
            found.append(origin)
        position += len(piece.text)
    return found


LiteralSpans = list[tuple[int, int]]
"""Where control tokens stand that messages wrote: they are encoded as text."""
BoundaryContext = tuple[str, str, tuple[tuple[int, int], ...]]
"""The text before a boundary, what matters of the text behind it, and the cuts in both."""
BoundaryPieces = tuple[list[TextPiece], list[TextPiece], list[TextPiece]]
"""Header and reply alone, and both together."""
_CONTEXT_CHARS = 6
_HEADER_WINDOW = 48


@dataclass(slots=True)
class SequenceDraft:
    """A sequence of text on its way to ids: blocks of pieces, one more than trained replies."""

    plan: RenderedSequence
    cuts: LiteralSpans
    boundaries: list[BoundaryContext] = field(default_factory=list)
    """What is around each boundary in front of a reply but the last."""
    blocks: list[list[TextPiece]] = field(default_factory=list)


@dataclass(slots=True)
class EncodedSequence:
    """A sequence with its ids and labels."""

    draft: SequenceDraft
    ids: list[int]
    replies: list[Reply]
    tokens: TokenEncoder

    @property
    def trained(self) -> list[int]:
        """The messages that train in it."""
        return [span.message for span in self.draft.plan.trained]

    def sequence(self) -> ChatSequence:
        """What the caller gets."""
        return ChatSequence(self.ids, self.replies, self._segments)

    def _segments(self) -> list:
        labels = self.sequence().labels
        return make_segments(self.draft.plan, self.draft.blocks, labels, self.tokens)


class LabelBuilder:
    """Encodes the sequences of one template."""

    def __init__(
        self,
        tokens: TokenEncoder,
        controls: ControlTokens,
        boundaries: Literal["served", "segments"],
    ) -> None:
        self._tokens = tokens
        self._controls = controls
        self._boundaries = boundaries
        self._known: dict[BoundaryContext, bool] = {}
        self._headers: dict[str, int] = {}

    @property
    def splits(self) -> bool:
        """Whether a text's ids are those of its parts, taken apart at its tokens."""
        return self._boundaries == "served" and self._tokens.splits

    def prompt(self, text: TracedStr) -> list[int]:
        """The ids of a prompt."""
        cuts = self._controls.neutral_spans(text)
        return self._flat(self._pieces(RenderedSequence(text), 0, len(text), cuts))

    def encode(self, plans: list[tuple[RenderedSequence, bool]]) -> list[list[EncodedSequence]]:
        """Each text's sequences, all encoded in one go; `True` where a message may hold control.

        A text makes one sequence, and one more for each reply whose boundary would change the ids
        of later prompts.
        """
        drafts = [
            SequenceDraft(plan, self._controls.neutral_spans(plan.text) if suspect else [])
            for plan, suspect in plans
        ]
        self._judge(drafts)
        split = [self._split(draft) for draft in drafts]
        encoded = iter(self._encoded([draft for group in split for draft in group]))
        return [[next(encoded) for _ in group] for group in split]

    def _split(self, draft: SequenceDraft) -> list[SequenceDraft]:
        """The shared sequence, behind one of its own for each reply that cannot share it."""
        plan = draft.plan
        *earlier, last = plan.trained
        if self._boundaries == "segments" or all(map(self._known.get, draft.boundaries)):
            return [draft]
        kept = [self._known[around] for around in draft.boundaries]
        shared = [span for span, keep in zip(earlier, kept, strict=True) if keep]
        alone = [span for span, keep in zip(earlier, kept, strict=True) if not keep]
        own = [
            SequenceDraft(RenderedSequence(plan.text[: span.stop], [span]), draft.cuts)
            for span in alone
        ]
        return [*own, SequenceDraft(RenderedSequence(plan.text, [*shared, last]), draft.cuts)]

    def _encoded(self, drafts: list[SequenceDraft]) -> list[EncodedSequence]:
        for draft in drafts:
            bounds = [0, *(span.start for span in draft.plan.trained), len(draft.plan.text)]
            draft.blocks = [
                self._pieces(draft.plan, start, stop, draft.cuts)
                for start, stop in pairwise(bounds)
            ]
        pieces = (piece for draft in drafts for block in draft.blocks for piece in block)
        ids = iter(self._tokens.encode(pieces))
        return [self._labelled(draft, ids) for draft in drafts]

    def _labelled(self, draft: SequenceDraft, encoded: Iterable[list[int]]) -> EncodedSequence:
        source = iter(encoded)
        ids: list[int] = []
        replies: list[Reply] = []
        for number, block in enumerate(draft.blocks):
            new = list(next(source)) if len(block) == 1 else []
            if len(block) != 1:
                new = [index for _ in block for index in next(source)]
            if number:
                span = draft.plan.trained[number - 1]
                trained = self._trained(draft, span, new)
                replies.append(Reply(span.message, len(ids), len(ids) + trained))
            ids += new
        return EncodedSequence(draft, ids, replies, self._tokens)

    def _trained(self, draft: SequenceDraft, span: TrainedSpan, ids: list[int]) -> int:
        """How many of the ids from the start of a reply are the reply: up to its stop token."""
        plain = draft.plan.plain
        count = plain.count(span.token, span.start, span.stop)
        for start, stop in draft.cuts:
            count -= span.start <= start < span.stop and plain[start:stop] == span.token
        index = self._tokens.added[span.token]
        place = -1
        for _ in range(count):
            place = ids.index(index, place + 1)
        return place + 1

    def _pieces(
        self, plan: RenderedSequence, start: int, stop: int, cuts: LiteralSpans
    ) -> list[TextPiece]:
        """A block of text as pieces: whole but for the control tokens that messages wrote."""
        if self._boundaries == "segments":
            return self._segment_pieces(plan.text, start, stop, cuts)
        plain = plan.plain
        kind: PieceKind = "reply" if start else "start"
        if not cuts:
            return [TextPiece(plain[start:stop], kind)] if start < stop else []
        pieces = []
        position = start
        for begin, end in [cut for cut in cuts if start <= cut[0] < stop]:
            if begin > position:
                pieces.append(TextPiece(plain[position:begin], kind))
            pieces.append(TextPiece(plain[begin:end], "literal"))
            kind, position = "continuation", end
        if position < stop:
            pieces.append(TextPiece(plain[position:stop], kind))
        return pieces

    def _segment_pieces(
        self, text: TracedStr, start: int, stop: int, cuts: LiteralSpans
    ) -> list[TextPiece]:
        """Every segment of a block alone; text that holds a control token has none of its own."""
        plain = str.__str__(text)
        pieces = []
        for first, last, _ in origin_spans(text._runs):
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                forged = any(begin <= cut[0] < end for cut in cuts)
                pieces.append(TextPiece(plain[begin:end], "words" if forged else "start"))
        return pieces

    def _judge(self, drafts: list[SequenceDraft]) -> None:
        """Find out which boundaries leave the ids around them alone.

        A server encodes a reply, once it is history, together with the header in front of it; where
        that gives other ids, the turns behind it need another sequence than the reply.
        """
        if self._boundaries == "segments":
            return
        asked = {}
        for draft in drafts:
            spans_before = draft.plan.trained[:-1]
            draft.boundaries = [self._around(draft, span) for span in spans_before]
            for around, span in zip(draft.boundaries, spans_before, strict=True):
                if around not in self._known and around not in asked:
                    asked[around] = self._sides(draft, span, around)
        self._learn(asked)

    def _learn(self, asked: dict[BoundaryContext, BoundaryPieces]) -> None:
        """Note for each boundary whether both sides are encoded alone as they are together."""
        encoded = iter(
            self._tokens.encode(p for sides in asked.values() for side in sides for p in side)
        )
        for key, sides in asked.items():
            head, tail, whole = ([index for _ in side for index in next(encoded)] for side in sides)
            self._known[key] = head + tail == whole

    def around(self, head: str, text: str, token: str) -> BoundaryContext:
        """A boundary between a header and a reply, both without control tokens of messages.

        `text`: the reply up to its first token.
        """
        near = text[:_CONTEXT_CHARS]
        if len(near) < _CONTEXT_CHARS or not near.isalnum() or not self._tokens.local:
            reply = text + token
            near = self._near(reply, [], 0, len(reply))
        return head, near, ()

    def leaves_alone(self, boundaries: Iterable[BoundaryContext]) -> Mapping[BoundaryContext, bool]:
        """Whether each boundary leaves the ids around it alone."""
        new = {around for around in boundaries if around not in self._known}
        if new:
            self._learn({around: _boundary_pieces(*around[:2]) for around in new})
        return self._known

    def _around(self, draft: SequenceDraft, span: TrainedSpan) -> BoundaryContext:
        """The text before a boundary from the last control token on, and what matters behind it."""
        plain = draft.plan.plain
        head = self._header(plain, span.start)
        tail = self._near(plain, draft.cuts, span.start, span.stop)
        if not draft.cuts:
            return head, tail, ()
        begin, end = span.start - len(head), span.start + len(tail)
        cuts = [(a - begin, b - begin) for a, b in draft.cuts if begin <= a < end]
        return head, tail, tuple(cuts)

    def _header(self, plain: str, stop: int) -> str:
        """The text up to `stop` from the last control token on."""
        size = _HEADER_WINDOW
        while True:
            window = plain[max(stop - size, 0) : stop]
            length = self._headers.get(window)
            if length is None:
                length = self._header_length(window)
                if size == _HEADER_WINDOW:
                    self._headers[window] = length
            if length or size >= stop:
                return window[len(window) - (length or stop) :]
            size *= 4

    def _header_length(self, text: str) -> int:
        begin = len(text)
        for match in self._tokens.pattern.finditer(text):
            begin = match.start()
        return len(text) - begin

    def _near(self, plain: str, cuts: LiteralSpans, start: int, stop: int) -> str:
        """So much of a reply as decides whether its boundary is one.

        Where text is first split into words by a pattern that looks no further than a few
        characters ahead and never back, the first few characters behind the white space decide;
        with other tokenizers the whole reply is compared.
        """
        if not self._tokens.local or (cuts and any(cut[0] < stop for cut in cuts)):
            return plain[start:stop]
        near = plain[start : min(start + _CONTEXT_CHARS, stop)]
        if near.isalnum():
            return near
        end = start
        while end < stop and plain[end].isspace():
            end += 1
        end = min(end + _CONTEXT_CHARS, stop)
        match = self._tokens.pattern.search(plain, start, min(end + 64, stop))
        if match is not None and match.start() < end:
            end = match.end()
        return plain[start:end]

    def _sides(
        self, draft: SequenceDraft, span: TrainedSpan, around: BoundaryContext
    ) -> BoundaryPieces:
        """Header and reply alone, and both together."""
        head, tail, _ = around
        begin = span.start - len(head)
        stop = span.start + len(tail)
        plan, cuts = draft.plan, draft.cuts
        if not cuts:
            return _boundary_pieces(head, tail)
        return (
            self._pieces(plan, begin, span.start, cuts),
            self._pieces(plan, span.start, stop, cuts),
            self._pieces(plan, begin, stop, cuts),
        )

    def _flat(self, pieces: list[TextPiece]) -> list[int]:
        return [index for ids in self._tokens.encode(pieces) for index in ids]


def _boundary_pieces(head: str, tail: str) -> BoundaryPieces:
    return [TextPiece(head, "start")], [TextPiece(tail, "reply")], [TextPiece(head + tail, "start")]
