"""Where each token of a sequence came from, for people to look at."""

from __future__ import annotations

from luthier.chat.origin import Origin
from luthier.chat.sequences import IGNORED, Segment
from luthier.chat.tokens import Piece, TokenEncoder
from luthier.chat.turns import Sequence


def segments_of(
    plan: Sequence, blocks: list[list[Piece]], labels: list[int], tokens: TokenEncoder
) -> list[Segment]:
    """The sequence as runs of tokens of one origin; a token counts to where it starts."""
    origins = _origins(plan, [piece for block in blocks for piece in block], tokens)
    found: list[Segment] = []
    start = 0
    for place in range(1, len(labels) + 1):
        same = place < len(labels) and origins[place] is origins[start]
        if same and (labels[place] == IGNORED) == (labels[start] == IGNORED):
            continue
        found.append(_segment(start, place, origins[start], labels[start] != IGNORED))
        start = place
    return found


def _segment(start: int, end: int, origin: Origin | None, trained: bool) -> Segment:
    if origin is None:
        return Segment(start, end, None, None, None, trained)
    return Segment(start, end, origin.role, origin.message, origin.field, trained)


def _origins(plan: Sequence, pieces: list[Piece], tokens: TokenEncoder) -> list[Origin | None]:
    """The origin of each token's first character."""
    found: list[Origin | None] = []
    runs = iter(plan.text._runs)
    end = 0
    origin: Origin | None = None
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
