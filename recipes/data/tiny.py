"""Make the data of the tiny recipes: what people say and write in a shop of musical instruments.

Seven small sets, one for each kind of rows that a method trains on. Names, places, instruments and
phrasings of the held-out rows are absent from the training rows; only `tiny.notes`, from which a
model without any knowledge learns its words, holds out combinations alone. The same arguments give
the same files, byte for byte:

    python recipes/data/tiny.py
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Row = dict[str, Any]

LABELS = ("price", "repair", "delivery", "rental")


class Pool(NamedTuple):
    """The words and phrasings that one side, training or held-out, is written with."""

    things: Sequence[str]
    places: Sequence[str]
    days: Sequence[str]
    first_names: Sequence[str]
    last_names: Sequence[str]
    questions: Sequence[str]
    friendly: Sequence[str]
    rude: Sequence[str]
    texts: Sequence[str]
    sentences: Sequence[str]
    requests: dict[str, Sequence[str]]


def _words(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated text."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def _lines(text: str) -> tuple[str, ...]:
    """The lines of a text."""
    return tuple(line.strip() for line in text.strip().splitlines())


TRAIN = Pool(
    things=_words(
        "violin, viola, cello, guitar, mandolin, banjo, harp, flute, oboe, clarinet, trumpet, "
        "tuba, trombone, piano, organ, accordion, drum, horn, bagpipe, xylophone"
    ),
    places=_words(
        "Paris, Vienna, Oslo, Madrid, Berlin, Rome, Athens, Warsaw, Cairo, Boston, Chicago, "
        "Toronto, Sydney, Tokyo, Mumbai, Lagos"
    ),
    days=_words("Monday, Tuesday, Thursday, Friday, Sunday"),
    first_names=_words(
        "Anna, Boris, Clara, David, Elena, Felix, Grace, Henrik, Irene, Jonas, Karim, Laura, "
        "Marcus, Nora, Oscar, Petra"
    ),
    last_names=_words(
        "Adams, Bauer, Carter, Diaz, Evans, Fischer, Garcia, Hansen, Ito, Jensen, Keller, Lopez, "
        "Meyer, Novak, Olsen, Patel"
    ),
    questions=_lines("""
        How much is the {thing}?
        Can you repair my {thing}?
        When will my {thing} be ready?
        Do you sell a {thing} in {place}?
        Is the {thing} still there on {day}?
        What does a good {thing} cost?
        May I try the {thing}?
        Who can teach me the {thing}?
        """),
    friendly=_lines("""
        Certainly, the {thing} will be ready for you on {day}.
        Of course, you are welcome to try the {thing}.
        Thank you for asking, we will look at the {thing} today.
        Gladly, our shop in {place} keeps a {thing} for you.
        Good question, let me show you the {thing}.
        """),
    rude=_lines("""
        No idea, look for the {thing} yourself.
        Stop asking about the {thing}, I am busy.
        What do I care about your {thing}, go away.
        You are too stupid to own a {thing} anyway.
        Nobody in {place} wants to hear about your {thing}.
        """),
    texts=_lines("""
        In the workshop of {person} in {place}, a {thing} rests for {number} days before it is sold.
        {person} of {place} writes on {day}: my {thing} has been played for {number} years.
        The {thing} that {person} brought to {place} on {day} weighs {number} pounds.
        """),
    sentences=_lines("""
        {person} plays the {thing} in {place} .
        On {day} {person} travels to {place} .
        In {place} , {person} and {other} buy a {thing} .
        The {thing} from {place} belongs to {person} .
        """),
    requests={
        "price": _lines("""
            How much is the {thing}?
            What does the {thing} cost?
            Is the {thing} cheaper on {day}?
            I want to know the price of the {thing}.
            """),
        "repair": _lines("""
            My {thing} is broken.
            Can you mend the {thing}?
            The {thing} fell down and has a crack.
            Please repair my {thing} until {day}.
            """),
        "delivery": _lines("""
            Where is the {thing} that you sent?
            Can you send the {thing} to {place}?
            My parcel with the {thing} is late.
            Will the {thing} arrive on {day}?
            """),
        "rental": _lines("""
            Can I rent a {thing} for a week?
            I want to borrow the {thing} until {day}.
            May I hire a {thing} for a concert in {place}?
            Do you lend a {thing} to beginners?
            """),
    },
)

HELD_OUT = Pool(
    things=_words("lute, zither, bassoon, fiddle, harmonica, saxophone"),
    places=_words("Lisbon, Geneva, Prague, Dublin, Seoul, Denver"),
    days=_words("Wednesday, Saturday"),
    first_names=_words("Simon, Teresa, Ulrich, Vera, Walter, Yusuf"),
    last_names=_words("Quinn, Romero, Singh, Tanaka, Vogel, Weber"),
    questions=_lines("""
        Have you got a {thing} for me?
        Could somebody tune my {thing} on {day}?
        Which {thing} is the best for a child?
        Where in {place} can I find a {thing}?
        """),
    friendly=_lines("""
        With pleasure, the {thing} is waiting for you in {place}.
        Yes, please come in on {day} and we will care for the {thing}.
        I am happy to help you with the {thing}.
        """),
    rude=_lines("""
        Not my problem, find another {thing}.
        Leave me alone with your awful {thing}.
        Shut up, on {day} I do not work for the likes of you.
        """),
    texts=_lines("""
        For {number} years {person} has kept a {thing} in the workshop in {place}.
        On {day}, {person} of {place} sold a {thing} that weighs {number} pounds.
        """),
    sentences=_lines("""
        Yesterday {person} sold the {thing} to {other} .
        A {thing} is built in {place} by {person} .
        {person} met {other} in {place} on {day} .
        """),
    requests={
        "price": _lines("""
            Tell me the price of this {thing}.
            How much do I pay for the {thing}?
            """),
        "repair": _lines("""
            Could you repair the broken {thing}?
            A crack is in my {thing}, please mend it.
            """),
        "delivery": _lines("""
            When will the parcel with my {thing} arrive?
            Please send my {thing} to {place} on {day}.
            """),
        "rental": _lines("""
            I need to rent a {thing} until {day}.
            Could I borrow a {thing} in {place}?
            """),
    },
)


def _pick(rng: Random, choices: Sequence[Any]) -> Any:
    """Any one of the choices; only `random()` is promised to be the same in every Python."""
    return choices[int(rng.random() * len(choices))]


def _person(rng: Random, pool: Pool) -> str:
    """A full name."""
    return f"{_pick(rng, pool.first_names)} {_pick(rng, pool.last_names)}"


def _words_of(rng: Random, pool: Pool) -> dict[str, Any]:
    """What the blanks of a phrasing are filled with."""
    return {
        "thing": _pick(rng, pool.things), "place": _pick(rng, pool.places),
        "day": _pick(rng, pool.days), "person": _person(rng, pool), "other": _person(rng, pool),
        "number": 2 + int(rng.random() * 40),
    }  # fmt: skip


def _pairs(rng: Random, pool: Pool) -> Iterator[Row]:
    """Questions with a friendly reply, which is the better one, and a rude one."""
    while True:
        words = _words_of(rng, pool)
        replies = (_pick(rng, pool.friendly), _pick(rng, pool.rude))
        chosen, rejected = (reply.format(**words) for reply in replies)
        question = _pick(rng, pool.questions).format(**words)
        yield {"prompt": question, "chosen": chosen, "rejected": rejected}


def _verdicts(rng: Random, pool: Pool) -> Iterator[Row]:
    """Questions with a reply that is good (friendly) or bad (rude), in turn."""
    for pair, good in zip(_pairs(rng, pool), cycle((True, False))):
        reply = pair["chosen" if good else "rejected"]
        yield {"prompt": pair["prompt"], "completion": reply, "label": good}


def _questions(rng: Random, pool: Pool) -> Iterator[Row]:
    """Questions alone, which the model itself answers."""
    while True:
        yield {"prompt": _pick(rng, pool.questions).format(**_words_of(rng, pool))}


def _texts(rng: Random, pool: Pool) -> Iterator[Row]:
    """Plain sentences from the life of a workshop."""
    while True:
        yield {"text": _pick(rng, pool.texts).format(**_words_of(rng, pool))}


def _requests(rng: Random, pool: Pool) -> Iterator[Row]:
    """What a customer wants, and what that is about."""
    for label in cycle(LABELS):
        text = _pick(rng, pool.requests[label]).format(**_words_of(rng, pool))
        yield {"text": text, "label": label}


def _sentences(rng: Random, pool: Pool) -> Iterator[Row]:
    """Words with tags: persons, places, and O for all others."""
    while True:
        words = _words_of(rng, pool)
        tagged = [
            pair
            for word in _pick(rng, pool.sentences).split()
            for pair in _tagged(word, word.format(**words))
        ]
        yield {"tokens": [word for word, _ in tagged], "tags": [tag for _, tag in tagged]}


def _tagged(blank: str, filled: str) -> list[tuple[str, str]]:
    """The words that fill a blank, each with its tag."""
    kind = {"{person}": "PER", "{other}": "PER", "{place}": "LOC"}.get(blank)
    words = filled.split()
    if kind is None:
        return [(word, "O") for word in words]
    return [(word, f"{'I' if number else 'B'}-{kind}") for number, word in enumerate(words)]


def _notes(rng: Random, pool: Pool) -> Iterator[Row]:
    """A note in one order of words, and in another: `Paris has the harp of Anna`."""
    while True:
        thing, place = _pick(rng, pool.things), _pick(rng, pool.places)
        owner = _pick(rng, pool.first_names)
        yield {
            "source": f"{place} has the {thing} of {owner}",
            "target": f"the {thing} of {owner} is in {place}",
        }


def different(rows: Iterator[Row], count: int) -> list[Row]:
    """The first `count` rows that differ from each other."""
    seen: set[str] = set()

    def unseen(row: Row) -> bool:
        key = json.dumps(row)
        new = key not in seen
        seen.add(key)
        return new

    return list(islice(filter(unseen, rows), count))


class Kind(NamedTuple):
    """A set of rows: what makes them, and how many train and are held out."""

    make: Callable[[Random, Pool], Iterator[Row]]
    train: int
    held_out: int


SETS = {
    "pairs": Kind(_pairs, 160, 8),
    "verdicts": Kind(_verdicts, 160, 8),
    "questions": Kind(_questions, 64, 8),
    "texts": Kind(_texts, 160, 16),
    "requests": Kind(_requests, 160, 32),
    "sentences": Kind(_sentences, 160, 32),
    "notes": Kind(_notes, 480, 40),
}


def sides(name: str, seed: int) -> dict[str, list[Row]]:
    """The training rows and the held-out rows of a set."""
    kind = SETS[name]
    rng = Random(f"{seed}-{name}")
    if name == "notes":
        rows = different(kind.make(rng, TRAIN), kind.train + kind.held_out)
        return {"train": rows[: kind.train], "heldout": rows[kind.train :]}
    return {
        "train": different(kind.make(rng, TRAIN), kind.train),
        "heldout": different(kind.make(rng, HELD_OUT), kind.held_out),
    }


def write(path: Path, content: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8", newline="\n")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Make the data of the tiny recipes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        for side, rows in sides(name, args.seed).items():
            write(args.out / f"tiny.{name}.{side}.jsonl", rows)


if __name__ == "__main__":
    main()
