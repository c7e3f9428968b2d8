"""Sequences of text -> ids and labels, with a token boundary between each prompt and its reply.

The text is cut at the start of each trained reply and the blocks are encoded apart, as when a model
generates. A server encodes earlier replies as history, together with the header in front of them:
where that would give other ids, `LabelBuilder` gives the reply a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.images import ImageExpander, ImageRun, find_image_runs
from luthier.chat.provenance import FieldOrigin, TracedStr, origin_spans
from luthier.chat.tokens import PieceKind, TextPiece, TokenEncoder
from luthier.chat.turns import RenderedSequence, TrainedSpan
from luthier.chat.types import (
    BYTES_PER_ID,
    IGNORED,
    ChatSequence,
    ImageSpan,
    Reply,
    Segment,
    pack_ids,
)

LiteralSpans = list[tuple[int, int]]
"""Where control tokens stand that messages wrote: they are encoded as text."""
BoundaryContext = tuple[str, str, tuple[tuple[int, int], ...]]
"""The text before a boundary, what matters of the text behind it, and the literal spans in both."""
BoundaryPieces = tuple[list[TextPiece], list[TextPiece], list[TextPiece]]
"""Header and reply alone, and both together."""
_CONTEXT_CHARS = 6
"""Characters behind a boundary that decide where a local tokenizer splits the first words."""
_HEADER_WINDOW = 48
"""Characters in front of a boundary in which a header is looked for first."""
_MAX_CORES = 4096
"""Texts of images whose ids are kept."""


@dataclass(slots=True)
class SequenceDraft:
    """A sequence of text on its way to ids: blocks of pieces, one more than trained replies."""

    rendered: RenderedSequence
    literal_spans: LiteralSpans
    boundaries: list[BoundaryContext] = field(default_factory=list)
    """What is around each boundary in front of a reply but the last."""
    blocks: list[list[TextPiece]] = field(default_factory=list)
    images: list[ImageRun] = field(default_factory=list)


@dataclass(slots=True)
class EncodedSequence:
    """A sequence with its ids and the tokens of its replies."""

    draft: SequenceDraft
    ids: list[int]
    replies: list[Reply]
    tokens: TokenEncoder
    images: list[ImageSpan] = field(default_factory=list)
    prefix_length: int = 0
    """How many ids stand in front of those of the text."""

    @property
    def trained_messages(self) -> list[int]:
        """The messages that train in it."""
        return [span.message for span in self.draft.rendered.spans]

    def put_in_front(self, prefix: list[int]) -> None:
        """Put ids in front of those of the text."""
        shift = self.prefix_length = len(prefix)
        self.ids[:0] = prefix
        self.replies = [Reply(m, start + shift, stop + shift) for m, start, stop in self.replies]
        self.images = [ImageSpan(n, start + shift, stop + shift) for n, start, stop in self.images]

    def to_chat_sequence(self) -> ChatSequence:
        """Return the sequence as the caller gets it."""
        return ChatSequence(self.ids, self.replies, self._segments, self.images)

    def _segments(self) -> list[Segment]:
        draft = self.draft
        starts = _token_starts(draft.blocks, self.tokens)
        origins = _token_origins(draft.rendered.text, starts)
        origins[:0] = [None] * self.prefix_length
        for run, (_, start, stop) in zip(draft.images, self.images, strict=True):
            origins[start:stop] = [run.origin] * (stop - start)
        return _make_segments(origins, self.to_chat_sequence().labels)


class LabelBuilder:
    """Encodes the sequences of one template."""

    def __init__(
        self,
        tokens: TokenEncoder,
        controls: ControlTokens,
        boundaries: Literal["served", "segments"],
        images: ImageExpander | None = None,
    ) -> None:
        """`images`: what the model's processor makes of images; None for rows of text alone."""
        self._tokens = tokens
        self._images = images
        self._image_locator = ImageLocator(tokens)
        self._controls = controls
        self._boundaries = boundaries
        # Boundaries and headers repeat from row to row, so what was learnt of them is kept.
        self._keeps_ids: dict[BoundaryContext, bool] = {}
        self._header_lengths: dict[str, int] = {}

    @property
    def is_splittable(self) -> bool:
        """Whether a text's ids are those of its parts, taken apart at its tokens."""
        return self._boundaries == "served" and self._tokens.is_splittable

    def encode_prompt(self, text: TracedStr) -> list[int]:
        """Return the ids of a prompt."""
        literal_spans = self._controls.literal_spans(text)
        pieces = self._pieces(RenderedSequence(text), 0, len(text), literal_spans)
        ids = [index for ids in self._tokens.encode(pieces) for index in ids]
        return [*self.find_prefix(ids), *ids]

    def _find_images(self, text: TracedStr) -> list[ImageRun]:
        return [] if self._images is None else find_image_runs(text)

    def find_prefix(self, ids: list[int]) -> list[int]:
        """Return what the processor's own call puts in front of a text with these ids.

        It is nothing for a model of text alone, whose servers call the tokenizer without it.
        """
        if self._images is None:
            return []
        is_begun = ids[:1] == [self._tokens.tokenizer.bos_token_id]
        return [] if is_begun else list(self._images.prefix_ids)

    def encode(self, sequences: list[tuple[RenderedSequence, bool]]) -> list[list[EncodedSequence]]:
        """Return each text's sequences; `True` stands where a message may hold a control token.

        A text makes one sequence, and one more for each reply whose boundary would change the ids
        of later prompts.
        """
        drafts = [
            SequenceDraft(rendered, self._controls.literal_spans(rendered.text) if suspect else [])
            for rendered, suspect in sequences
        ]
        self._find_boundaries(drafts)
        split = [self._split(draft) for draft in drafts]
        encoded = iter(self._encode_drafts([draft for group in split for draft in group]))
        return [[next(encoded) for _ in group] for group in split]

    def _find_boundaries(self, drafts: list[SequenceDraft]) -> None:
        """Note each draft's boundaries, and learn which of them leave the ids around them alone.

        A server encodes a reply, once it is history, together with the header in front of it; where
        that gives other ids, the turns behind it need another sequence than the reply.
        """
        if self._boundaries == "segments":
            return
        unseen: dict[BoundaryContext, BoundaryPieces] = {}
        for draft in drafts:
            earlier_spans = draft.rendered.spans[:-1]
            draft.boundaries = [self._span_boundary(draft, span) for span in earlier_spans]
            for boundary, span in zip(draft.boundaries, earlier_spans, strict=True):
                if boundary not in self._keeps_ids and boundary not in unseen:
                    unseen[boundary] = self._span_pieces(draft, span, boundary)
        self._learn_boundaries(unseen)

    def _learn_boundaries(self, boundaries: dict[BoundaryContext, BoundaryPieces]) -> None:
        """Note for each boundary whether both sides are encoded alone as they are together."""
        encoded = iter(
            self._tokens.encode(p for sides in boundaries.values() for side in sides for p in side)
        )
        for boundary, sides in boundaries.items():
            head, tail, both = ([index for _ in side for index in next(encoded)] for side in sides)
            self._keeps_ids[boundary] = head + tail == both

    def boundary(self, head: str, text: str, token: str) -> BoundaryContext:
        """Return a boundary between a header and a reply, both without control tokens of messages.

        `text`: the reply up to its first token, which is `token`.
        """
        tail = text[:_CONTEXT_CHARS]
        is_word = len(tail) == _CONTEXT_CHARS and tail.isalnum()
        if not (is_word and self._tokens.splits_words_locally):
            reply = text + token
            tail = self._reply_start(reply, [], 0, len(reply))
        return head, tail, ()

    def check_boundaries(
        self, boundaries: Iterable[BoundaryContext]
    ) -> Mapping[BoundaryContext, bool]:
        """Return whether each boundary leaves the ids around it alone; others may be there too."""
        unseen = {boundary for boundary in boundaries if boundary not in self._keeps_ids}
        if unseen:
            self._learn_boundaries({each: self._boundary_pieces(*each[:2]) for each in unseen})
        return self._keeps_ids

    def _span_boundary(self, draft: SequenceDraft, span: TrainedSpan) -> BoundaryContext:
        """Return the text before a boundary from its last token on, and what matters behind it."""
        plain, literal_spans = draft.rendered.plain, draft.literal_spans
        head = self._header(plain, span.start)
        tail = self._reply_start(plain, literal_spans, span.start, span.stop)
        if not literal_spans:
            return head, tail, ()
        begin, end = span.start - len(head), span.start + len(tail)
        return (
            head,
            tail,
            tuple((a - begin, b - begin) for a, b in literal_spans if begin <= a < end),
        )

    def _header(self, plain: str, stop: int) -> str:
        """Return the text up to `stop` from the last control token on."""
        # Headers are short: a small window nearly always holds the token, and repeats.
        size = _HEADER_WINDOW
        while True:
            window = plain[max(stop - size, 0) : stop]
            length = self._header_lengths.get(window)
            if length is None:
                begin = len(window)
                for match in self._tokens.pattern.finditer(window):
                    begin = match.start()
                length = len(window) - begin
                if size == _HEADER_WINDOW:
                    self._header_lengths[window] = length
            if length or size >= stop:
                return window[len(window) - (length or stop) :]
            size *= 4

    def _reply_start(self, plain: str, literal_spans: LiteralSpans, start: int, stop: int) -> str:
        """Return so much of a reply as decides whether its boundary is one.

        Where text is first split into words by a pattern that looks no further than a few
        characters ahead and never back, the first few characters behind the white space decide;
        with other tokenizers the whole reply is compared.
        """
        has_literal = literal_spans and any(span[0] < stop for span in literal_spans)
        if has_literal or not self._tokens.splits_words_locally:
            return plain[start:stop]
        first = plain[start : min(start + _CONTEXT_CHARS, stop)]
        if first.isalnum():
            return first
        end = start
        while end < stop and plain[end].isspace():
            end += 1
        end = min(end + _CONTEXT_CHARS, stop)
        # A control token that begins there is not cut in two.
        match = self._tokens.pattern.search(plain, start, min(end + 64, stop))
        if match is not None and match.start() < end:
            end = match.end()
        return plain[start:end]

    def _span_pieces(
        self, draft: SequenceDraft, span: TrainedSpan, boundary: BoundaryContext
    ) -> BoundaryPieces:
        """Header and reply alone, and both together."""
        head, tail, _ = boundary
        rendered, literal_spans = draft.rendered, draft.literal_spans
        if not literal_spans:
            return self._boundary_pieces(head, tail)
        begin, end = span.start - len(head), span.start + len(tail)
        return (
            self._pieces(rendered, begin, span.start, literal_spans),
            self._pieces(rendered, span.start, end, literal_spans),
            self._pieces(rendered, begin, end, literal_spans),
        )

    def _boundary_pieces(self, head: str, tail: str) -> BoundaryPieces:
        before = self._tokens.header_before_reply(head)
        return (
            [TextPiece(head, "start")],
            [TextPiece(tail, "reply", before)],
            [TextPiece(head + tail, "start")],
        )

    def _split(self, draft: SequenceDraft) -> list[SequenceDraft]:
        """Return the shared sequence, behind one of its own for each reply that cannot share it."""
        rendered, literal_spans = draft.rendered, draft.literal_spans
        *earlier, last = rendered.spans
        if self._boundaries == "segments" or all(map(self._keeps_ids.get, draft.boundaries)):
            return [draft]
        shared: list[TrainedSpan] = []
        alone: list[TrainedSpan] = []
        for span, boundary in zip(earlier, draft.boundaries, strict=True):
            (shared if self._keeps_ids[boundary] else alone).append(span)
        sequences = [RenderedSequence(rendered.text[: span.stop], [span]) for span in alone]
        sequences.append(RenderedSequence(rendered.text, [*shared, last]))
        return [SequenceDraft(sequence, literal_spans) for sequence in sequences]

    def _encode_drafts(self, drafts: list[SequenceDraft]) -> list[EncodedSequence]:
        for draft in drafts:
            rendered = draft.rendered
            cuts = [0, *(span.start for span in rendered.spans), len(rendered.text)]
            draft.images = self._find_images(rendered.text)
            draft.blocks = [
                self._pieces(rendered, start, stop, draft.literal_spans)
                for start, stop in pairwise(cuts)
            ]
        pieces = (piece for draft in drafts for block in draft.blocks for piece in block)
        piece_ids = iter(self._tokens.encode(pieces))
        return [self._label(draft, piece_ids) for draft in drafts]

    def _label(self, draft: SequenceDraft, piece_ids: Iterator[list[int]]) -> EncodedSequence:
        """Return the draft with its ids, the next of `piece_ids`, and its replies' tokens."""
        ids: list[int] = []
        replies: list[Reply] = []
        for number, block in enumerate(draft.blocks):
            block_ids = next(piece_ids) if len(block) == 1 else []
            if len(block) != 1:
                block_ids = [index for _ in block for index in next(piece_ids)]
            if number:
                span = draft.rendered.spans[number - 1]
                count = self._count_reply_tokens(draft, span, block_ids)
                replies.append(Reply(span.message, len(ids), len(ids) + count))
            ids += block_ids
        encoded = EncodedSequence(draft, ids, replies, self._tokens)
        if draft.images:
            encoded.images = self._image_locator.locate(draft, encoded.ids)
            encoded.replies = [
                part for reply in replies for part in _cut_reply(reply, encoded.images)
            ]
        prefix = self.find_prefix(ids)
        if prefix:
            encoded.put_in_front(prefix)
        return encoded

    def _count_reply_tokens(self, draft: SequenceDraft, span: TrainedSpan, ids: list[int]) -> int:
        """Return how many of the ids, which begin with a reply, are the reply and its stop."""
        plain = draft.rendered.plain
        # The reply's own text may hold the stop token; where it is literal text it makes no id.
        count = plain.count(span.stop_token, span.start, span.stop)
        for start, stop in draft.literal_spans:
            count -= span.start <= start < span.stop and plain[start:stop] == span.stop_token
        index = self._tokens.added[span.stop_token]
        last = -1
        for _ in range(count):
            last = ids.index(index, last + 1)
        return last + 1

    def _pieces(
        self, rendered: RenderedSequence, start: int, stop: int, literal_spans: LiteralSpans
    ) -> list[TextPiece]:
        """Return a block of text as pieces: one, but for the control tokens that messages wrote."""
        if self._boundaries == "segments":
            return _segment_pieces(rendered.text, start, stop, literal_spans)
        plain = rendered.plain
        piece_kind: PieceKind = "reply" if start else "start"
        before = self._tokens.header_before_reply(self._header(plain, start)) if start else ""
        if not literal_spans:
            return [TextPiece(plain[start:stop], piece_kind, before)] if start < stop else []
        pieces = []
        position = start
        for begin, end in [span for span in literal_spans if start <= span[0] < stop]:
            if begin > position:
                pieces.append(TextPiece(plain[position:begin], piece_kind, before))
            pieces.append(TextPiece(plain[begin:end], "literal"))
            piece_kind, position, before = "continuation", end, ""
        if position < stop:
            pieces.append(TextPiece(plain[position:stop], piece_kind, before))
        return pieces


class ImageCore(NamedTuple):
    """The ids from the first added token of an image's text to the last one, packed.

    The tokenizer cuts at added tokens first, so these are the same wherever the text stands. Only
    tokens of white space (Gemma has them) may become longer ones with what stands beside them.
    """

    ids: bytes
    is_whole: bool
    """Whether no text stands around it, which may become one token with its neighbours."""


class ImageLocator:
    """Finds the tokens of images in the ids of a sequence."""

    def __init__(self, tokens: TokenEncoder) -> None:
        self._tokens = tokens
        self._edges = frozenset(i for token, i in tokens.added.items() if not token.isspace())
        self._cores: dict[str, ImageCore] = {}
        """By the text of an image; images of one size share one."""

    def locate(self, draft: SequenceDraft, ids: list[int]) -> list[ImageSpan]:
        """Return the tokens of each image of a draft in its ids."""
        packed = pack_ids(ids)
        starts: list[int] = []
        spans: list[ImageSpan] = []
        position = 0
        for run in draft.images:
            core = self._core(draft.rendered.plain[run.start : run.stop])
            start = _find_ids(packed, core.ids, position)
            stop = start + len(core.ids) // BYTES_PER_ID
            if start < 0 or not core.is_whole:
                # Tokens at the edges count as in segments: to where they start.
                starts = starts or _token_starts(draft.blocks, self._tokens)
                own = [n for n, at in enumerate(starts) if run.start <= at < run.stop]
                own += range(start, stop) if start >= 0 else ()
                start, stop = min(own, default=position), max(own, default=position - 1) + 1
            spans.append(ImageSpan(run.origin.number, start, stop))
            position = stop
        return spans

    def _core(self, text: str) -> ImageCore:
        if text not in self._cores:
            if len(self._cores) >= _MAX_CORES:
                self._cores.clear()
            (ids,) = self._tokens.encode([TextPiece(text, "start")])
            edges = [number for number, index in enumerate(ids) if index in self._edges]
            core = ids[edges[0] : edges[-1] + 1] if edges else []
            self._cores[text] = ImageCore(pack_ids(core), len(core) == len(ids))
        return self._cores[text]


def _find_ids(packed: bytes, part: bytes, start: int) -> int:
    """Return the number of the first id from `start` on where `part` stands, -1 where it does not.

    Both are packed ids; an empty part stands nowhere.
    """
    position = packed.find(part, start * BYTES_PER_ID) if part else -1
    while position % BYTES_PER_ID and position >= 0:
        position = packed.find(part, position + 1)
    return position // BYTES_PER_ID


def _cut_reply(reply: Reply, images: list[ImageSpan]) -> list[Reply]:
    """Return the stretches of a reply between the images in it."""
    message, position, end = reply
    stretches = []
    for _, start, stop in [image for image in images if reply.start <= image.start < end]:
        stretches.append(Reply(message, position, start))
        position = stop
    stretches.append(Reply(message, position, end))
    return [stretch for stretch in stretches if stretch.start < stretch.stop]


def _token_starts(blocks: list[list[TextPiece]], tokens: TokenEncoder) -> list[int]:
    """Return where in the text of the blocks each of their tokens starts."""
    starts: list[int] = []
    position = 0
    for piece in (piece for block in blocks for piece in block):
        starts += [position + start for start in tokens.token_starts(piece)]
        position += len(piece.text)
    return starts


def _segment_pieces(
    text: TracedStr, start: int, stop: int, literal_spans: LiteralSpans
) -> list[TextPiece]:
    """Return each segment of a block alone; in one with a literal span, nothing is a token."""
    plain = str.__str__(text)
    pieces = []
    for first, last, _ in origin_spans(text._runs):
        begin, end = max(first, start), min(last, stop)
        if begin < end:
            has_literal = any(begin <= span[0] < end for span in literal_spans)
            pieces.append(TextPiece(plain[begin:end], "plain text" if has_literal else "start"))
    return pieces


def _make_segments(origins: list[FieldOrigin | None], labels: list[int]) -> list[Segment]:
    """Return a sequence as runs of tokens of one origin; both arguments have an entry a token."""
    segments: list[Segment] = []
    start = 0
    for stop in range(1, len(labels) + 1):
        is_same = stop < len(labels) and origins[stop] is origins[start]
        if is_same and (labels[stop] == IGNORED) == (labels[start] == IGNORED):
            continue
        origin, is_trained = origins[start], labels[start] != IGNORED
        if origin is None:
            segments.append(Segment(start, stop, None, None, None, is_trained))
        else:
            source = origin.role, origin.message, origin.field
            segments.append(Segment(start, stop, *source, is_trained))
        start = stop
    return segments


def _token_origins(text: TracedStr, starts: list[int]) -> list[FieldOrigin | None]:
    """Return the origin of each token's first character; None where the template wrote it."""
    origins: list[FieldOrigin | None] = []
    runs = iter(text._runs)
    run_end = 0
    origin: FieldOrigin | None = None
    for start in starts:
        while start >= run_end:
            run = next(runs, None)
            if run is None:
                break
            run_end += run[0]
            origin = run[1]
        origins.append(origin)
    return origins
