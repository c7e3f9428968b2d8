"""The quickstart's data: reproducible, and its held-out rows cannot be known from training."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
SCRIPT = FOLDER / "reminders.py"
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("reminders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(side):
    lines = (FOLDER / f"reminders.{side}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


TRAIN, HELD_OUT = read("train"), read("heldout")


def answers(rows):
    return [json.loads(messages[-1]["content"]) for messages in rows]


def test_generator_reproduces_the_committed_files(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], check=True)
    for side in ("train", "heldout"):
        name = f"reminders.{side}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_arguments_set_counts_and_seed(tmp_path):
    args = ["--out", tmp_path, "--train", "30", "--heldout", "6", "--seed", "7"]
    subprocess.run([sys.executable, SCRIPT, *args], check=True)
    train = (tmp_path / "reminders.train.jsonl").read_text(encoding="utf-8").splitlines()
    heldout = (tmp_path / "reminders.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert (len(train), len(heldout)) == (30, 6)
    assert [json.loads(line)["messages"] for line in train] != TRAIN[:30]


def test_sizes_and_form():
    assert len(TRAIN) == 1400
    assert len(HELD_OUT) == 120
    for messages in TRAIN + HELD_OUT:
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert len(messages[1]["content"]) < 120
        assert len(messages[2]["content"]) < 140


def test_no_row_stands_twice():
    notes = [messages[1]["content"] for messages in TRAIN + HELD_OUT]
    assert len(set(notes)) == len(notes)


@pytest.mark.parametrize(
    "key", ["who", "what", "date", "time", "customer", "item", "price", "payee", "amount", "due"]
)
def test_no_held_out_value_is_in_training(key):
    values = {answer[key] for answer in answers(HELD_OUT) if key in answer}
    known = {value for answer in answers(TRAIN) for value in answer.values()}
    numbers = {answer["quantity"] for answer in answers(TRAIN) if "quantity" in answer}
    assert len(values) > 10
    assert not values & (known - numbers)


@pytest.mark.parametrize("key", ["who", "what", "customer", "item", "payee"])
def test_no_held_out_words_are_in_a_training_note(key):
    text = "\n".join(messages[1]["content"] for messages in TRAIN)
    values = {answer[key] for answer in answers(HELD_OUT) if key in answer}
    assert not [value for value in values if value in text]
    if key in ("who", "customer"):
        names = {name for value in values for name in value.split()}
        assert not names & set(re.findall(r"\w+", text))


def test_pools_are_disjoint(generator):
    for name in generator.Pool._fields[:-1]:
        train, held_out = getattr(generator.TRAIN, name), getattr(generator.HELD_OUT, name)
        assert len(set(train)) == len(train), name
        assert len(set(held_out)) == len(held_out), name
        assert not set(train) & set(held_out), name


def phrasing(messages):
    """The note with its values and all numbers taken out, so that only the template is left."""
    note, answer = messages[1]["content"], json.loads(messages[2]["content"])
    for key in ("who", "what", "customer", "item", "payee"):
        if key in answer:
            value = answer[key]
            note = re.sub(re.escape(value), f"<{key}>", note, flags=re.IGNORECASE)
    numbers = "two|three|four|five|six|seven|eight|nine|ten|twelve"
    note = re.sub(rf"\b\d+ (?:{MONTHS})\b|\b(?:{MONTHS}) \d+", "<date>", note)
    note = re.sub(r"\b\d+:\d+( [ap]m)?|\b\d+ [ap]m", "<time>", note)
    note = re.sub(r"[$€£][\d.]*\d|\b[\d.]*\d (dollars|euros|pounds)", "<money>", note)
    return re.sub(rf"\b(?:{numbers}|\d+)\b", "<quantity>", note, flags=re.IGNORECASE)


def test_every_held_out_phrasing_is_new(generator):
    train = {phrasing(messages) for messages in TRAIN}
    held_out = {phrasing(messages) for messages in HELD_OUT}
    pools = generator.TRAIN, generator.HELD_OUT
    templates = [len(pool.reminders + pool.orders + pool.payments) for pool in pools]
    assert [len(train), len(held_out)] == templates, "each phrasing is one template"
    assert not train & held_out


def test_every_value_but_the_normalised_is_copied():
    for messages in TRAIN + HELD_OUT:
        answer = json.loads(messages[2]["content"])
        copied = {"who", "what", "customer", "item", "payee", "time"} & set(answer)
        assert all(answer[key].lower() in messages[1]["content"].lower() for key in copied)


def test_dates_have_the_day_first():
    pairs = [(messages[1]["content"], json.loads(messages[2]["content"])) for messages in TRAIN]
    turned = [
        (f"{day} {month}", answer)
        for note, answer in pairs
        for month, day in re.findall(rf"\b({MONTHS}) (\d+)\b", note)
        if answer["type"] == "reminder"
    ]
    assert len(turned) > 100
    assert all(date == answer["date"] for date, answer in turned)


@pytest.mark.parametrize(
    ("pattern", "key", "value"),
    [
        (r"\b(twelve|12) \w+", "quantity", 12),
        (r"€\d", "currency", "EUR"),
        (r"\d dollars", "currency", "USD"),
        (r"£\d", "currency", "GBP"),
    ],
)
def test_normalised_values(pattern, key, value):
    pairs = [(messages[1]["content"], json.loads(messages[2]["content"])) for messages in TRAIN]
    found = [answer[key] for note, answer in pairs if re.search(pattern, note) and key in answer]
    assert found
    assert set(found) == {value}
