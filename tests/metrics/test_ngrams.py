"""ROUGE, BLEU and chrF: the libraries give what the papers' formulas give by hand."""

import math

import pytest

from luthier.metrics import Prediction, parse_metrics, prepare_metrics
from luthier.metrics.bootstrap import bootstrap_interval

pytest.importorskip("sacrebleu", reason="needs the extra `metrics`")
pytest.importorskip("rouge_score", reason="needs the extra `metrics`")


def measured(entry, pairs):
    metrics = parse_metrics([entry])
    prepare_metrics(metrics, [reference for _, reference in pairs])
    return metrics[0].measure([Prediction(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("entry", "said", "wanted", "value"),
    [
        ("rouge1", "the cat sat on the mat", "the cat was on the mat", 5 / 6),
        ("rouge2", "the cat sat on the mat", "the cat was on the mat", 3 / 5),
        ("rougeL", "the cat sat on the mat", "the cat was on the mat", 5 / 6),
        ("rougeL", "mat the on sat", "the cat sat on the mat", 2 * (2 / 4) * (2 / 6) / (5 / 6)),
        ("rouge1", "The cat!", "the cat was on the mat", 0.5),
        ("rouge2", "The cat!", "the cat was on the mat", 1 / 3),
        ("rouge1", "cats", "cat", 0),
        ({"rouge1": {"stemmer": True}}, "running cats", "run cat", 1),
        ("rougeLsum", "a b\nc d", "c d\na b", 1),
        ("rougeL", "a b\nc d", "c d\na b", 0.5),
        ("rouge1", "", "cat", 0),
    ],
    ids=["1", "2", "L", "L in order", "1 short", "2 short", "no stems", "stems", "Lsum of lines",
         "L of lines", "nothing"],
)  # fmt: skip
def test_rouge(entry, said, wanted, value):
    (found,) = measured(entry, [(said, wanted)]).values.values()
    assert found == pytest.approx(value)


ONE = ("the cat sat on the mat", "the cat sat on a mat")
"""5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; as long as the reference."""
SHORT = ("the cat sat on", "the cat sat on the mat")
"""All that is there is right; 4 words of 6."""


@pytest.mark.parametrize(
    ("pairs", "value"),
    [
        ([ONE], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ([SHORT], 100 * math.exp(1 - 6 / 4)),
        ([ONE, SHORT], 100 * math.exp(1 - 12 / 10) * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25),
        ([("", "the cat")], 0),
    ],
    ids=["precisions", "brevity", "the counts of both", "nothing"],
)
def test_bleu(pairs, value):
    found = measured("bleu", pairs)
    assert found.values == {"bleu": pytest.approx(value)}


def test_bleu_of_one_short_reply_goes_up_to_the_longest_n_gram_there_is():
    assert measured("bleu", [("a cat", "a cat")]).rows == {"bleu": [pytest.approx(100)]}


def test_bleu_in_lower_case_and_by_characters():
    assert measured({"bleu": {"lowercase": True}}, [("A B C D", "a b c d")]).values["bleu"] > 99
    assert measured({"bleu": {"tokenize": "char"}}, [("abcd", "abcd")]).values["bleu"] > 99


@pytest.mark.parametrize(
    ("settings", "pairs", "value"),
    [
        # Characters: 2 of 2 said and 3 wanted; pairs: 1 of 1 and 2. Precision 1, recall 7/12.
        ({"char_order": 2}, [("ab", "abc")], 100 * 5 * (7 / 12) / (4 + 7 / 12)),
        ({"char_order": 2, "beta": 1}, [("ab", "abc")], 100 * 2 * (7 / 12) / (1 + 7 / 12)),
        ({"char_order": 1}, [("a b", "ab")], 100),
        # 2 right of 2 and of 3, then 1 right of 2 and of 1: 3 of 4 and of 4 over both.
        ({"char_order": 1}, [("ab", "abc"), ("cd", "c")], 75),
        # chrF++: characters 3 of 3; words 0 of 1 ("xyz" against "xy", "z").
        ({"char_order": 1, "word_order": 1}, [("xyz", "xy z")], 50),
    ],
    ids=["recall counts twice", "both alike", "no white space", "the counts of both", "words"],
)
def test_chrf(settings, pairs, value):
    assert measured({"chrf": settings}, pairs).values == {"chrf": pytest.approx(value)}


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_whole_is_sacrebleus_own_and_a_bootstrap_takes_it_of_each_draw(name):
    import sacrebleu

    pairs = [ONE, SHORT, ("a dog ran", "a dog ran away"), ("xx", "yy zz")] * 3
    found = measured(name, pairs)
    said, wanted = zip(*pairs, strict=True)
    theirs = getattr(sacrebleu, f"corpus_{name}")(said, [wanted]).score
    assert found.values[name] == pytest.approx(theirs)
    around = bootstrap_interval(found.sample(name), draws=500)
    assert around.low < theirs < around.high
    alone = measured(name, [ONE]).sample(name)
    assert bootstrap_interval(alone, draws=20).low == pytest.approx(
        bootstrap_interval(alone, draws=20).high
    )
