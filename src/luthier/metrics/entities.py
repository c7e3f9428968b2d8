"""Entities in tagged words, and their F1 as CoNLL counts it.

An entity is right if its type, its first and its last word are (Tjong Kim Sang and De Meulder 2003,
CoNLL-2003, and its script conlleval; seqeval without `mode` follows the same rules). Tags are `O`
and B, I, E, S with a type (`B-PER`). An entity also begins without a B, where an I or E stands
behind O, behind the end of another entity, or behind another type.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

OUTSIDE = "O"
_TAG = re.compile(r"[BIES]-.+", re.DOTALL)
Entity = tuple[str, int, int]
"""Its type, and its first and last word."""


def are_entity_tags(tags: Iterable[str]) -> bool:
    """Whether these are tags of entities, and not, say, parts of speech."""
    others = [tag for tag in tags if tag != OUTSIDE]
    return bool(others) and all(map(_TAG.fullmatch, others))


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sentence, in order."""
    begin = 0
    around = [OUTSIDE, *tags, OUTSIDE]
    for place, (before, tag) in enumerate(pairwise(around)):
        if _ends(before, tag):
            yield before[2:], begin, place - 1
        if _begins(before, tag):
            begin = place


def _ends(tag: str, behind: str) -> bool:
    """Whether an entity ends with a tag."""
    if tag == OUTSIDE:
        return False
    return tag[0] in "ES" or behind == OUTSIDE or behind[0] in "BS" or tag[2:] != behind[2:]


def _begins(before: str, tag: str) -> bool:
    """Whether an entity begins with a tag."""
    if tag == OUTSIDE:
        return False
    return tag[0] in "BS" or before == OUTSIDE or before[0] in "ES" or before[2:] != tag[2:]


def entity_counts(predicted: Sequence[str], right: Sequence[str]) -> tuple[int, int, int]:
    """Of one sentence: right entities, those predicted, and those there are."""
    said, wanted = set(entities(predicted)), set(entities(right))
    return len(said & wanted), len(said), len(wanted)


def entity_scores(
    predicted: Iterable[Sequence[str]], right: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences; 0 where there is nothing to count.

    P = right entities / predicted ones, R = right entities / those there are, F1 = 2PR / (P + R).
    """
    hits = found = there = 0
    for one, other in zip(predicted, right, strict=True):
        own = entity_counts(one, other)
        hits, found, there = hits + own[0], found + own[1], there + own[2]
    return {
        "entity_precision": hits / max(found, 1),
        "entity_recall": hits / max(there, 1),
        "entity_f1": 2 * hits / max(found + there, 1),
    }
