"""The data of the tiny recipes: reproducible, small, and its held-out rows are new."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
SETS = {
    "pairs": (160, 8, {"prompt", "chosen", "rejected"}),
    "verdicts": (160, 8, {"prompt", "completion", "label"}),
    "questions": (64, 8, {"prompt"}),
    "texts": (160, 16, {"text"}),
    "requests": (160, 32, {"text", "label"}),
    "sentences": (160, 32, {"tokens", "tags"}),
    "notes": (480, 40, {"source", "target"}),
}
KNOWN = ("notes",)
"""Sets whose held-out rows are new combinations of known words."""
NAMES = ("things", "places", "days", "first_names", "last_names")


def read(name, side):
    lines = (FOLDER / f"tiny.{name}.{side}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_script_makes_the_committed_files(tmp_path):
    subprocess.run([sys.executable, FOLDER / "tiny.py", "--out", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in FOLDER.glob("tiny.*.jsonl")}
    assert sum(map(len, made.values())) < 300_000


def test_another_seed_makes_other_rows(tmp_path):
    script = [sys.executable, FOLDER / "tiny.py", "--out", tmp_path, "--seed", "7"]
    subprocess.run(script, check=True)
    for path in FOLDER.glob("tiny.*.jsonl"):
        assert (tmp_path / path.name).read_bytes() != path.read_bytes()


@pytest.mark.parametrize("name", SETS)
def test_sizes_and_columns(name):
    train, held_out = read(name, "train"), read(name, "heldout")
    assert (len(train), len(held_out)) == SETS[name][:2]
    assert all(set(row) == SETS[name][2] for row in train + held_out)


@pytest.mark.parametrize("name", SETS)
def test_no_row_stands_twice(name):
    rows = [json.dumps(row) for side in ("train", "heldout") for row in read(name, side)]
    assert len(set(rows)) == len(rows)


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("tiny", FOLDER / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_and_phrasings_of_the_two_sides_differ(generator):
    for field in generator.Pool._fields[:-1]:
        sides = [getattr(pool, field) for pool in (generator.TRAIN, generator.HELD_OUT)]
        assert [len(set(side)) for side in sides] == [len(side) for side in sides], field
        assert not set(sides[0]) & set(sides[1]), field
    requests = generator.TRAIN.requests, generator.HELD_OUT.requests
    for label in generator.LABELS:
        assert not set(requests[0][label]) & set(requests[1][label]), label


@pytest.mark.parametrize("name", [name for name in SETS if name not in KNOWN])
def test_a_held_out_row_names_nothing_that_was_trained(generator, name):
    trained = {word for field in NAMES for word in getattr(generator.TRAIN, field)}
    new = {word for field in NAMES for word in getattr(generator.HELD_OUT, field)}
    words = set(
        re.findall(r"\w+", json.dumps([list(row.values()) for row in read(name, "heldout")]))
    )
    assert not words & trained
    assert len(words & new) > 5


def test_notes_say_the_same_in_another_order():
    for row in read("notes", "train") + read("notes", "heldout"):
        place, thing, owner = re.fullmatch(r"(\w+) has the (\w+) of (\w+)", row["source"]).groups()
        assert row["target"] == f"the {thing} of {owner} is in {place}"


def test_replies_are_judged_by_their_manner():
    friendly = {row["chosen"].split()[0] for row in read("pairs", "train")}
    rude = {row["rejected"].split()[0] for row in read("pairs", "train")}
    assert not friendly & rude
    for row in read("verdicts", "train"):
        assert row["completion"].split()[0] in (friendly if row["label"] else rude)
    assert sum(row["label"] for row in read("verdicts", "heldout")) == 4


def test_tags_fit_their_words():
    tags = [tag for row in read("sentences", "train") for tag in row["tags"]]
    assert set(tags) == {"O", "B-PER", "I-PER", "B-LOC"}
    row = read("sentences", "heldout")[0]
    named = [word for word, tag in zip(row["tokens"], row["tags"], strict=True) if tag != "O"]
    assert named == ["Walter", "Tanaka", "Teresa", "Romero"]


def test_every_class_has_rows_enough():
    for side, least in (("train", 30), ("heldout", 4)):
        labels = [row["label"] for row in read("requests", side)]
        assert set(labels) == {"price", "repair", "delivery", "rental"}
        assert all(labels.count(label) >= least for label in set(labels))


SCRIPTS = {
    "tiny_t5": "the model and its tokenizer",
    "tiny_vision": "the model, its processor, 720 pictures to train on and 48 held out",
    "tiny_tools": "the model, its tokenizer, ",
}


LONG = pytest.param("tiny_tools", marks=[pytest.mark.train, pytest.mark.long])


@pytest.mark.parametrize("name", ["tiny_t5", "tiny_vision", LONG])
def test_a_script_says_what_it_wrote_and_nothing_else(name, tmp_path):
    words = [sys.executable, FOLDER / f"{name}.py"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].startswith(f"wrote {name}: {SCRIPTS[name]}")
    assert (result.stdout.count("\n"), result.stderr) == (1 + (name == "tiny_tools"), "")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture(scope="module")
def pictures():
    """The module that draws the pictures of tiny_vision."""
    path = FOLDER / "tiny_vision.py"
    spec = importlib.util.spec_from_file_location("tiny_vision", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(pictures, folder, seed):
    """What a seed gives: rows by side, and the bytes of each picture."""
    chance = random.Random(seed)
    train, held_out = pictures.split_scenes(chance)
    pictures.write_rows(folder, "train", train, 80, chance)
    pictures.write_rows(folder, "heldout", held_out, 20, chance)
    rows = {path.stem: path.read_text().splitlines() for path in folder.glob("*.jsonl")}
    return rows, {path.name: path.read_bytes() for path in folder.glob("pictures/*.png")}


def test_pictures_are_the_same_for_the_same_seed_and_all_differ(pictures, tmp_path):
    rows, files = drawn(pictures, tmp_path / "a", 0)
    assert (rows, files) == drawn(pictures, tmp_path / "b", 0)
    assert rows != drawn(pictures, tmp_path / "c", 1)[0]
    assert len(set(files.values())) == len(files) == 100
    assert [len(rows[side]) for side in ("train", "heldout")] == [160, 40]


def test_no_held_out_scene_is_trained(pictures):
    train, held_out = pictures.split_scenes(random.Random(0))
    assert (len(train), len(held_out)) == (36, 12) and not set(train) & set(held_out)
    for place, values in enumerate((pictures.COLOURS, pictures.COUNTS, pictures.SHAPES)):
        assert {scene[place] for scene in train} == set(values), "each is known from other scenes"


def test_a_picture_shows_what_its_row_answers(pictures):
    chance = random.Random(0)
    for scene in product(pictures.COLOURS, pictures.COUNTS, ["square"]):
        picture = pictures.draw_picture(scene, chance)
        ground = picture.getpixel((0, 0))
        centres = product((8, 24), repeat=2)
        inks = [ink for at in centres if (ink := picture.getpixel(at)) != ground]
        assert len(inks) == scene[1]
        expected = pictures.COLOURS[scene[0]]
        assert all(abs(a - b) <= 15 for ink in inks for a, b in zip(ink, expected, strict=True))
