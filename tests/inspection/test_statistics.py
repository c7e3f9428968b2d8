"""`luthier check` on datasets of several sources: mixture, equal rows, sides, texts, pictures."""

import json
import re

import numpy as np
import pytest

from helpers.outcome_rows import LUTE, ROWS, STRINGS, TRIMMING

BASE = ["model=smollm2_135m", "dataset.eval.share=null", "trainer.args.eval_strategy=no"]
ONE = [*BASE, "dataset=jsonl", "dataset.path=a.jsonl"]
TWO = [*BASE, "dataset=mixture", "dataset.deduplicate=none"]
TWO += ["dataset.sources.a.path=a.jsonl", "dataset.sources.b.path=b.jsonl"]


def said(number, reply="A plucked instrument."):
    """A row that no other number equals."""
    return [{"role": "user", "content": f"What is {number}?"}, {**STRINGS, "content": reply}]


def shouted(row):
    """The row, equal but for case and space."""
    return [{**message, "content": f" {message['content'].upper()}"} for message in row]


A = [said(number) for number in range(8)]
B = [said(number, "No idea.") for number in range(20, 24)]
TURNS = [LUTE, STRINGS, LUTE, STRINGS]
EMPTY = [{"role": "assistant", "content": text} for text in ("", " ", "\n", "")]


@pytest.fixture
def check(luthier, write):
    """Check rows `a.jsonl`, `b.jsonl`, ... for machines; the exit code and what was found."""

    def check(files, *words):
        for name, rows in files.items():
            write(rows, f"{name}.jsonl")
        code, out, err = luthier("check", "--json", *words)
        assert out, err
        return code, json.loads(out)

    return check


def test_what_is_said_of_a_source(check):
    rows = [{"messages": row, "id": n, "lang": "en"} for n, row in enumerate(A)]
    code, found = check({"a": rows}, *ONE, "dataset.filter='id < 6'", "dataset.train_on=last")
    source = found["sources"]["dataset"]
    assert code == 0 and found["sides"]["train"]["rows"] == 6
    del source["findings"]
    assert source == {
        "label": "a.jsonl",
        "type": "messages",
        "kind": "conversation",
        "rows": 6,
        "unused_columns": ["id", "lang"],
        "map": None,
        "left_out_by_map": 0,
        "filter": "id < 6",
        "filtered_out": 2,
        "bad_rows": 0,
        "different_images": 0,
        "train_on": "last",
        "labels": {},
        "unread_keys": {},
    }


@pytest.mark.parametrize("on_bad_row, code, fate", [("error", 1, "stops"), ("drop", 0, "dropped")])
def test_rows_that_cannot_be_read(on_bad_row, code, fate, check):
    rows = [*A, {"messages": "none"}, {"messages": []}]
    ended, found = check({"a": rows}, *ONE, f"dataset.on_bad_row={on_bad_row}")
    (finding,) = found["sources"]["dataset"]["findings"]
    assert (ended, found["sources"]["dataset"]["bad_rows"]) == (code, 2)
    assert (finding["fate"], finding["reason"], finding["rows"]) == (fate, "cannot be read", 2)
    assert finding["examples"][0]["place"] == "a.jsonl:9"
    assert found["rules"][0]["broken"] == 2 * (fate == "stops")
    assert found["sides"]["train"]["rows"] == 8


MIXTURES = {
    "concatenate": (
        ["dataset.sources.b.repeats=2.5"],
        {"a": (8, 8, 1.0, 0.4444), "b": (4, 10, 2.5, 0.5556)},
    ),
    "interleave": (
        ["dataset.mix=interleave", "dataset.sources.a.weight=1", "dataset.sources.b.weight=3"],
        {"a": (1, 1, 1.0, 0.2), "b": (4, 4, 1.0, 0.8)},
    ),
}


@pytest.mark.parametrize("words, shares", MIXTURES.values(), ids=MIXTURES)
def test_the_mixture_of_an_epoch(words, shares, check):
    _, found = check({"a": A, "b": B}, *TWO, *words)
    names = ("rows", "epoch", "repeats", "share")
    sources = found["mixture"]["sources"]
    assert {key: tuple(part[name] for name in names) for key, part in sources.items()} == shares
    assert sum(part["tokens"] for part in sources.values()) == found["sides"]["train"]["tokens"]
    assert found["sides"]["train"]["sequences"] == found["mixture"]["rows"]


def test_each_source_says_which_turns_train(check):
    _, found = check({"a": [TURNS], "b": [TURNS]}, *TWO, "dataset.sources.b.train_on=last")
    tokens = {name: s["trained_tokens"] for name, s in found["mixture"]["sources"].items()}
    assert tokens["a"] == 2 * tokens["b"] > 0


EQUAL = [*A, A[2], A[2], shouted(A[3])]
POLICIES = {"none": (11, 0), "exact": (9, 2), "normalised": (8, 3)}


@pytest.mark.parametrize("policy, counts", POLICIES.items(), ids=POLICIES)
def test_equal_rows_are_found_under_each_policy(policy, counts, check):
    _, found = check({"a": EQUAL}, *ONE, f"dataset.deduplicate={policy}")
    equal = found["duplicates"]
    assert (found["sides"]["train"]["rows"], equal["left_out"]) == counts
    assert [equal[name]["rows"] for name in ("exact", "normalised")] == [2, 1]
    assert equal["exact"]["examples"][1]["place"] == "a.jsonl:10"
    assert equal["exact"]["examples"][1]["words"] == "equals a.jsonl:3"
    assert equal["normalised"]["examples"][0]["words"] == "equals a.jsonl:4"


def test_evaluation_sets_have_counts_of_their_own(check):
    sets = ["dataset.eval.sets.code.path=code.jsonl", "dataset.eval.sets.maths.path=maths.jsonl"]
    files = {"a": A, "code": [A[0], B[0]], "maths": [*B, shouted(A[5])]}
    code, found = check(files, *ONE, *sets, "dataset.eval.count=2")
    assert code == 0 and set(found["sides"]) == {"train", "held_out"}
    assert {name: side["rows"] for name, side in found["sets"].items()} == {"code": 2, "maths": 5}
    assert found["sides"]["held_out"]["rows"] == 2
    held = found["held_out"]
    assert held["how"] == "2 of the different rows, drawn with seed 42"
    # The row that `code` holds is drawn, or left out of training.
    equal = held["sets"]["code"]["equal"]
    assert held["sets"]["code"] == {"rows": 2, "equal": equal, "similar": 0} and equal in (0, 1)
    assert found["sides"]["train"]["rows"] == 6 - equal
    assert held["sets"]["maths"]["equal"] == 0 and held["sets"]["maths"]["similar"] in (0, 1)


def test_rows_of_a_held_out_file_are_told_apart(check):
    files = {"a": A, "held": [A[0], shouted(A[1]), B[0]]}
    _, found = check(files, *ONE, "dataset.eval.path=held.jsonl")
    assert found["held_out"]["sets"] == {"held out": {"rows": 3, "equal": 1, "similar": 1}}
    assert found["sides"]["train"]["left_out"] == {"equal to a held-out row": 1}


LONG = [LUTE, {**STRINGS, "content": "long " * 30}, LUTE]
PAIRS = [
    *({"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)),
    {"prompt": LONG, "chosen": "Strings.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "word " * 90, "rejected": "No."},
    {"prompt": "Why?", "chosen": "", "rejected": "No."},
]
SHORT = ["chat.max_length=60", "chat.empty_replies=drop"]
VERDICTS = [
    {"prompt": f"What is {n}?", "completion": "word " * (5 * n), "label": n % 3 > 0}
    for n in range(6)
]
CLASSES = [{"text": "lute " * n, "label": ("good", "bad", "so-so")[n % 3]} for n in range(12)]
TAGS = [{"tokens": ["Ana"] + ["sings"] * n, "tags": ["B-PER"] + ["O"] * n} for n in range(12)]
TARGETS = [{"source": "lute " * n, "target": "lyre " * n} for n in range(1, 12)]
COUNTED = {
    "one source": ([*ONE, "chat.max_length=60", "chat.on_lost=drop"], {"a": [*ROWS.values()]}),
    "held out, equal rows": (
        [*ONE, "dataset.eval.share=0.3", "dataset.deduplicate=normalised", "chat.on_lost=drop"],
        {"a": [*EQUAL, *ROWS.values()]},
    ),
    "sources and sets": (
        [*TWO, "dataset.sources.a.repeats=1.5", "dataset.eval.sets.c.path=c.jsonl"],
        {"a": [*A, ROWS["nothing trains"]], "b": B, "c": [A[1], TURNS]},
    ),
    "texts": (
        [
            *ONE,
            "dataset.type=text",
            "chat.max_length=8",
            "dataset.stride=2",
            "chat.empty_replies=drop",
        ],
        {"a": [{"text": "a lute " * n} for n in range(12)]},
    ),
    "pairs": ([*ONE, "trainer=dpo", *SHORT], {"a": PAIRS}),
    "pairs, each reply by itself": ([*ONE, "trainer=kto", *SHORT], {"a": PAIRS}),
    "pairs, a score": ([*ONE, "trainer=reward", *SHORT], {"a": PAIRS}),
    "verdicts": ([*ONE, "trainer=kto", *SHORT, "dataset.eval.count=2"], {"a": VERDICTS}),
    "labels": ([*ONE, "trainer=classify", "chat.max_length=8"], {"a": CLASSES}),
    "tags": ([*ONE, "trainer=tag", "chat.max_length=8", "chat.on_long=drop"], {"a": TAGS}),
    "targets": ([*ONE, "trainer=seq2seq", "chat.max_length=8"], {"a": TARGETS}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_counts_are_those_of_training(name, check, tmp_path):
    from luthier.config import load_config
    from luthier.data.prepare import prepare
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train.methods import make_row_encoders

    words, files = COUNTED[name]
    found = check(files, *words)[1]
    config = load_config([*words, f"dataset.cache={tmp_path / 'cache'}"]).config
    tokenizer = load_tokenizer(config.model)
    made = prepare(config.dataset, make_row_encoders(config, tokenizer), tokenizer, config.seed)
    sides = {"train": made.train_counts}
    sides |= {name or "held_out": counts for name, counts in made.eval_counts.items()}
    assert set(sides) == set(found["sides"] | found["sets"])
    for name, counts in sides.items():
        side = (found["sides"] | found["sets"])[name]
        numbers = ("rows", "sequences", "tokens", "trained_tokens", "cut_rows", "cut_turns")
        for field in (*numbers, "images"):
            assert side[field] == getattr(counts, field), field
        assert side["lengths"]["max"] == counts.longest
        lost = {reason: n for reason, n in counts.dropped.items() if reason not in side["left_out"]}
        assert side["dropped"] == sum(lost.values())
    assert sum(found["sides"]["train"]["left_out"].values()) + found["sides"]["train"][
        "dropped"
    ] == sum(made.train_counts.dropped.values())


def test_how_full_the_batches_are(check):
    rows = [said(n, "word " * (30 * (n % 3) + 1)) for n in range(30)]
    words = [*ONE, "chat.max_length=256", "trainer.args.per_device_train_batch_size=4"]
    batches = {
        name: check({"a": rows}, *words, *more)[1]["batches"]
        for name, more in {
            "random": [],
            "grouped": ["trainer.args.train_sampling_strategy=group_by_length"],
            "constant": ["trainer.padding=max_length"],
            "packed": ["trainer.args.packing=true"],
        }.items()
    }
    tokens = check({"a": rows}, *words)[1]["sides"]["train"]["tokens"]
    padded = {name: found["padded"] for name, found in batches.items()}
    assert [padded["random"][name] for name in ("rows", "batches", "length")] == [30, 8, None]
    assert padded["constant"]["efficiency"] == pytest.approx(tokens / (30 * 256))
    assert padded["random"]["efficiency"] < padded["grouped"]["efficiency"] < 1
    assert [found["packing"] for found in batches.values()] == [False, False, False, True]
    packed = batches["packed"]["packed"]
    assert packed["efficiency"] == pytest.approx(tokens / (packed["rows"] * 256))
    assert packed["rows"] < 15


def test_texts_are_counted_in_windows(check, luthier):
    texts = [{"text": "a lute " * 12}, {"text": "short"}, {"text": ""}]
    words = [*ONE, "dataset.type=text", "chat.max_length=10", "chat.empty_replies=drop"]
    code, found = check({"a": texts}, *words)
    side = found["sides"]["train"]
    assert code == 0 and found["sources"]["dataset"]["kind"] == "text"
    assert side["windows"] == 1 and side["sequences"] >= 4 and side["lengths"]["max"] == 10
    assert side["trained_tokens"] == side["tokens"] and found["prompts"]["turns"] == 0
    assert [rule["text"] for rule in found["rules"]] == ["no row stops the training"]
    out = luthier("check", *words)[1]
    assert "documents" in out and "cut into windows: 1 row of dataset" in out
    assert "boundaries" not in out and "apply_chat_template" not in out


@pytest.mark.parametrize("command", ["check", "preview"])
def test_rows_of_another_method_are_refused_as_in_training(command, luthier, write):
    write(PAIRS[:2], "a.jsonl")
    code, out, err = luthier(command, *ONE)
    assert (code, out) == (2, "")
    assert "dataset: these rows are preference pairs (a chosen and a rejected reply), and " in err
    assert "trainer=sft needs conversations or plain texts. Use trainer=dpo, kto," in err


FINDINGS = {
    "pairs": (
        ["trainer=dpo", *SHORT],
        PAIRS,
        {("cut", "longer than chat.max_length"), ("dropped", "too long"),
         ("dropped", "empty reply")},
        {},
    ),
    "a pair without a preference": (
        ["trainer=dpo", "chat.template=trim.jinja"],
        [*PAIRS[:2], {"prompt": "Why?", "chosen": "Because.", "rejected": " Because."}],
        {("tied", "chosen and rejected are the same tokens")},
        {},
    ),
    "verdicts": (["trainer=kto", "chat.empty_replies=drop"], VERDICTS,
                 {("dropped", "empty reply")}, {"good": 4, "bad": 1}),
    "pairs, each reply by itself": (["trainer=kto"], PAIRS[:4], set(), {"good": 4, "bad": 4}),
    "a score": (["trainer=reward"], PAIRS[:4], set(), {}),
    "labels": (
        ["trainer=classify", "chat.max_length=8"],
        CLASSES,
        {("dropped", "empty text"), ("cut", "longer than chat.max_length")},
        {"bad": 4, "so-so": 4, "good": 3},
    ),
    "tags": (["trainer=tag"], TAGS[:3], set(), {"B-PER": 3, "O": 3}),
    "targets": (["trainer=seq2seq"], TARGETS[:3], set(), {}),
}  # fmt: skip
REPLY_RULES = [
    "no row stops the training",
    "labels are the token ids or -100",
    "a sequence begins with at most one BOS",
    "trained tokens end with a stop token",
    "prompts are those of apply_chat_template",
]
RULES = {
    "a score": [REPLY_RULES[0], REPLY_RULES[2], REPLY_RULES[4]],
    **dict.fromkeys(("labels", "tags", "targets"), REPLY_RULES[:1]),
}
"""The rules of rows that are not replies whose tokens train."""


@pytest.mark.parametrize("name", FINDINGS)
def test_what_is_found_in_rows_of_other_methods(name, check, tmp_path):
    (tmp_path / "trim.jinja").write_text(TRIMMING)
    words, rows, findings, labels = FINDINGS[name]
    code, found = check({"a": rows}, *ONE, *words)
    source = found["sources"]["dataset"]
    assert (code, found["holds"]) == (0, True)
    assert {(each["fate"], each["reason"]) for each in source["findings"]} == findings
    assert source["labels"] == labels
    rules = {rule["text"]: rule["checked"] for rule in found["rules"]}
    assert [*rules] == RULES.get(name, REPLY_RULES) and all(rules.values())


def test_the_report_says_what_does_not_apply(check, luthier):
    words = [*ONE, "trainer=classify", "chat.max_length=8"]
    check({"a": CLASSES}, *words)
    out = luthier("check", *words)[1]
    assert "BOS, stop tokens and prompts are checked in conversations; these rows are texts" in out
    assert "    bad: 4 (36.4%)\n" in out and re.search(r"\nlabels +11\n", out)
    assert "a.jsonl:9: the end of its text was removed" in out
    assert "packing" not in out and "boundaries" not in out


def test_both_replies_of_a_pair_fill_the_batch(check):
    rows = [{"prompt": "Why?", "chosen": "word " * 20, "rejected": "No."}] * 4
    words = [*ONE, "trainer=dpo", "trainer.args.per_device_train_batch_size=2"]
    _, found = check({"a": rows}, *words)
    side, batches = found["sides"]["train"], found["batches"]
    assert batches["padded"]["efficiency"] == side["tokens"] / (8 * side["lengths"]["max"])
    assert batches["packed"] is None


def test_a_template_that_writes_another_prompt_breaks_a_rule(check, monkeypatch):
    from luthier.inspection.rules import TransformersPrompts

    monkeypatch.setattr(TransformersPrompts, "_prompt", lambda *_: [1, 2])
    code, found = check({"a": PAIRS[:2]}, *ONE, "trainer=dpo")
    (broken,) = (rule for rule in found["rules"] if rule["broken"])
    assert (code, broken["text"], broken["broken"]) == (1, REPLY_RULES[-1], 4)
    assert broken["examples"][0]["place"] == "a.jsonl:1, chosen"


STOPS = {
    "no row to evaluate on": (
        ["dataset.eval.path=b.jsonl"],
        {"b": [ROWS["nothing trains"]]},
        "dataset.eval.path: none of its rows can be used to evaluate on.",
    ),
    "all held out": (["dataset.eval.count=8"], {}, "leaves none to train on"),
}


@pytest.mark.parametrize("words, files, error", STOPS.values(), ids=STOPS)
def test_what_stops_a_training_does_not_stop_the_check(words, files, error, check, luthier):
    code, found = check({"a": A} | files, *ONE, *words)
    assert (code, found["holds"], found["sides"]["train"]["rows"]) == (1, False, 8)
    assert error in found["error"]
    assert f"Training stops: {found['error']}" in luthier("check", *ONE, *words)[1]


def test_everything_is_said_to_people(luthier, write):
    for name, rows in {"a": EQUAL, "b": B, "held": [A[0], shouted(A[5])]}.items():
        write([{"messages": row, "id": 1} for row in rows], f"{name}.jsonl")
    words = ["dataset.sources.b.repeats=2", "dataset.eval.sets.held.path=held.jsonl"]
    words += ["dataset.sources.a.filter='id == 1'", "dataset.sources.b.train_on=last"]
    code, out, _ = luthier("check", *TWO, *words, "chat.max_length=64")
    assert code == 0
    lines = " ".join(out.split())
    for part in (
        "dataset.sources.a: a.jsonl, type messages, 11 rows columns that are not read: id",
        "filter id == 1 leaves out 0 rows",
        "train_on last",
        "mixture of an epoch (dataset.mix=concatenate)",
        "b 4 2 8 44.4%",
        "equal to an earlier row: 2 rows, kept (dataset.deduplicate=none)",
        "a.jsonl:9 equals a.jsonl:3",
        "different from an earlier row in case, white space or Unicode form only: 1 row, kept",
        "held: 2 rows; left out of training because they equal one of them: 1 row; train although",
        "in a batch, padded to the longest:",
        "with trainer.args.packing=true:",
        "every rule holds",
    ):
        assert part in lines, part


def test_a_picture_of_the_data(luthier, write, tmp_path):
    from matplotlib import image

    write(A, "a.jsonl")
    code, out, err = luthier("check", *ONE, "--png", "data.png")
    assert code == 0 and "every rule holds" in out and err == "written data.png\n"
    assert image.imread(tmp_path / "data.png").shape[1] > 800
    code, _, err = luthier("check", *ONE, "--png", "none/data.png")
    assert code == 2 and "--png: none/data.png cannot be written: its folder is not there" in err


def test_the_sample_goes_through_to_the_end_and_stays_small():
    from luthier.inspection.rules import COMPARED_TURNS, RowSample

    sample = RowSample(0.5)
    taken = np.array([row for row in range(200_000) if sample.takes() and not sample.spend(0, 1)])
    assert taken[: COMPARED_TURNS // 2].tolist() == list(range(COMPARED_TURNS // 2))
    assert COMPARED_TURNS // 2 < len(taken) < 4 * COMPARED_TURNS
    assert taken[-1] > 190_000
    assert (np.diff(np.diff(taken)) >= -1).all()


def test_empty_replies_are_counted_with_the_first_rows(check, luthier):
    rows = [*A, *([{"role": "user", "content": f"Q {n}"}, bot] for n, bot in enumerate(EMPTY))]
    code, found = check({"a": rows}, *ONE)
    (finding,) = found["sources"]["dataset"]["findings"]
    assert code == 1 and found["rules"][0]["broken"] == len(EMPTY)
    assert (finding["fate"], finding["reason"], finding["rows"]) == (
        "stops", "empty reply", len(EMPTY),
    )  # fmt: skip
    first = len(A) + 1
    assert [e["place"] for e in finding["examples"]] == [f"a.jsonl:{first + n}" for n in range(3)]
    assert "the assistant's reply is empty" in finding["examples"][0]["words"]
    assert "empty reply" in luthier("check", *ONE)[1]
    code, found = check({"a": rows}, *ONE, "chat.empty_replies=drop")
    (finding,) = found["sources"]["dataset"]["findings"]
    assert code == 0 and (finding["fate"], finding["rows"]) == ("dropped", len(EMPTY))
    code, found = check({"a": rows}, *ONE, "chat.empty_replies=train")
    assert code == 0 and found["sides"]["train"]["rows"] == len(rows)


def test_keys_of_messages_that_are_not_read_are_named(check, luthier):
    question = {"role": "user", "content": "Q", "id": 7}
    rows = [[question, {"role": "assistant", "content": f"A {n}", "score": n}] for n in range(3)]
    _, found = check({"a": rows}, *ONE)
    assert found["sources"]["dataset"]["unread_keys"] == {"id": 3, "score": 3}
    shown = luthier("check", *ONE)[1]
    assert "keys of messages that are not read: id (3 rows), score (3 rows)" in shown


def test_a_wrong_role_stops_the_training(check):
    rows = [*A, [{"role": "human", "content": "Q"}, {"role": "assistant", "content": "A"}]]
    code, found = check({"a": rows}, *ONE)
    (finding,) = found["sources"]["dataset"]["findings"]
    assert (code, finding["fate"], finding["reason"]) == (1, "stops", "unknown role")
    assert "did you mean 'user'?" in finding["examples"][0]["words"]
