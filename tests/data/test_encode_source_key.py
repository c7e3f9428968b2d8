"""The cache's key: it changes when the encoded rows do, and only then.

Every field of the config that could have a say is changed in turn, with the rest as it was.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.chatml import CHATML
from helpers.letter_encoder import pair, save
from luthier.config.schema import ChatSettings, DatasetConfig, EvalConfig, SourceConfig
from luthier.data.encoders.chat import ConversationEncoder, TextEncoder
from luthier.data.prepare import prepare

DATED = "{{ strftime_now('%d %B') }}" + CHATML
GREETING = "{{ greeting }}" + CHATML
TALK = [
    {"role": "user", "content": "\n\nHello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Yes"},
]
ROWS = [
    {"messages": TALK, "lang": "en"},
    {"messages": TALK * 3, "lang": "de"},
    {"messages": [TALK[0], TALK[1] | {"reasoning_content": "I think"}], "lang": "en"},
    {"messages": [{"role": "user", "content": "Naïve <x>"}, TALK[1]], "lang": "en"},
    {"messages": TALK, "lang": "en"},
]
"""A greeting, a long one, one that the template does not show whole, one in letters, an equal."""


def tokenizer(template=CHATML, tokens=(), vocabulary=300, **facts):
    """A byte-level tokenizer that merges two line feeds."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["a\n\n\nHello\n\n\nuser Hello user Hello assistant"] * 9, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, eos_token="<|im_end|>", **facts
    )


PLAIN = tokenizer()
ROWS_CHANGE, CHOICE_CHANGES, NOTHING = "rows", "choice", "nothing"
"""What a change does: to the encoded rows and the key; to neither, but to what trains; to none."""


class Change(NamedTuple):
    """One change of one setting, given as `dataset.filter`, and what it does."""

    field: str
    effect: str
    after: object
    before: object = None
    among: Mapping = MappingProxyType({})
    """Settings that stay as they are."""


TWO = {
    "dataset.path": None,
    "dataset.sources": {"a": {"path": "data.jsonl"}, "b": {"path": "b.jsonl"}},
}
TEXT = {"dataset.path": "t.jsonl", "chat.max_length": 20}
HUB = {"dataset.path": "owner/name", "dataset.name": "default"}
SAVED = {"dataset.path": "saved"}
PAIRS = {"dataset.path": "pairs.jsonl"}
ODD = {
    "dataset.path": "odd.jsonl", "dataset.on_bad_row": "drop", "chat.on_lost": "drop",
    "chat.empty_replies": "drop",
}  # fmt: skip
ODD_ROWS = [
    pair("a", "b"),
    pair("c", {"d": 1}),
    {**pair("e", "f"), "chat_template_kwargs": {"x": 1}},
    pair("g", ""),
    pair([{"role": "critic", "content": "h"}], "i"),
]


def of_two(**settings):
    """Two sources, of which the first has these settings."""
    sources = TWO["dataset.sources"]
    return {
        "a": sources["a"] | settings,
        "b": sources["b"] | ({"weight": 1} if "weight" in settings else {}),
    }


SOURCE = [
    Change("path", ROWS_CHANGE, "b.jsonl", "data.jsonl"),
    Change("path", NOTHING, "copy.jsonl", "data.jsonl"),
    Change("path", NOTHING, "copy.ndjson", "data.jsonl"),
    Change("path", ROWS_CHANGE, ["b.jsonl", "data.jsonl"], ["data.jsonl", "b.jsonl"]),
    Change("format", NOTHING, "jsonl", "auto"),
    Change("format", ROWS_CHANGE, "text", "jsonl", {"dataset.path": "t.jsonl"}),
    Change("options", NOTHING, {"encoding": "UTF8"}, {}),
    Change("options", ROWS_CHANGE, {"encoding": "windows-1252"}, {}),
    Change("name", ROWS_CHANGE, "other", "default", HUB),
    Change("split", ROWS_CHANGE, "test", "train", SAVED),
    Change("split", ROWS_CHANGE, "train[:1]", "train", HUB),
    # What a revision changes is the content, which counts itself.
    Change("revision", NOTHING, "main", None, HUB),
    Change("type", NOTHING, "messages", "auto"),
    Change("type", ROWS_CHANGE, "prompt_completion", "messages", {"dataset.path": "both.jsonl"}),
    Change("columns", ROWS_CHANGE, {"prompt": "completion", "completion": "prompt"}, {}, PAIRS),
    Change("columns", NOTHING, {"prompt": "prompt"}, {}, PAIRS),
    Change("remove_columns", ROWS_CHANGE, ["chat_template_kwargs"], [], ODD),
    Change("json_replies", ROWS_CHANGE, True, False, ODD),
    # A text that holds it has an image then, and the row has none to fill it.
    Change("image_placeholder", ROWS_CHANGE, "<x>", None, {"dataset.on_bad_row": "drop"}),
    Change("system", ROWS_CHANGE, "Be kind."),
    Change("train_on", ROWS_CHANGE, "last"),
    Change("train_on", NOTHING, "all"),
    Change("max_rows", ROWS_CHANGE, 2),
    Change("filter", ROWS_CHANGE, "lang == 'en'"),
    Change("map", ROWS_CHANGE, "python:mapping.py:shorten"),
    Change("weight", CHOICE_CHANGES, of_two(weight=3), of_two(weight=1),
           TWO | {"dataset.mix": "interleave"}),
    Change("repeats", CHOICE_CHANGES, 2, 1),
]  # fmt: skip
DATASET = [
    Change("sources", NOTHING, {"mine": {"path": "data.jsonl"}}, {"other": {"path": "data.jsonl"}},
           {"dataset.path": None}),
    Change("sources", ROWS_CHANGE, {"a": {"path": "b.jsonl"}}, {"a": {"path": "data.jsonl"}},
           {"dataset.path": None}),
    Change("mix", CHOICE_CHANGES, "interleave", "concatenate", TWO),
    Change("deduplicate", CHOICE_CHANGES, "exact", "none"),
    Change("deduplicate", CHOICE_CHANGES, "normalised", "none"),
    Change("on_bad_row", NOTHING, "drop", "error"),
    Change("workers", NOTHING, 2),
    Change("cache", NOTHING, "elsewhere"),
    Change("shuffle_buffer", NOTHING, 7),
    Change("stride", ROWS_CHANGE, 5, 0, TEXT),
    Change("stride", NOTHING, 5, 0),
    Change("eval", CHOICE_CHANGES, {"count": 1}, {}),
]  # fmt: skip
EVAL = [
    Change("path", CHOICE_CHANGES, "b.jsonl"),
    Change("split", CHOICE_CHANGES, "test", None, SAVED),
    Change("share", CHOICE_CHANGES, 0.5, 0.25),
    Change("count", CHOICE_CHANGES, 2, 1),
    Change("by", CHOICE_CHANGES, "hash", "draw", {"dataset.eval.share": 0.5}),
    Change("sets", CHOICE_CHANGES, {"x": {"path": "b.jsonl"}}, {}),
]
CHAT = [
    Change("template", ROWS_CHANGE, CHATML.replace("\n{% endfor", "\n\n{% endfor")),
    Change("template", NOTHING, CHATML),
    Change("train_on", ROWS_CHANGE, "last", "all"),
    Change("train_on", ROWS_CHANGE, ["user"], "all"),
    Change("boundaries", ROWS_CHANGE, "segments", "served"),
    Change("on_lost", ROWS_CHANGE, "drop", "keep"),
    Change("max_length", ROWS_CHANGE, 60),
    Change("on_long", ROWS_CHANGE, "drop", "turns", {"chat.max_length": 60}),
    Change("empty_replies", ROWS_CHANGE, "train", "drop", ODD),
    Change("roles", ROWS_CHANGE, ["critic"], [], ODD),
    Change("date", ROWS_CHANGE, "2025-02-03", "2025-02-04", {"chat.template": DATED}),
    Change("date", NOTHING, "2025-02-03", "2025-02-04"),
    Change("variables", ROWS_CHANGE, {"greeting": "Ho"}, {}, {"chat.template": GREETING}),
]
CHANGES = [
    change._replace(field=f"{group}.{change.field}")
    for group, changes in {
        "dataset": [*SOURCE, *DATASET], "dataset.eval": EVAL, "chat": CHAT,
    }.items()
    for change in changes
]  # fmt: skip


def test_every_field_is_changed():
    fields = {
        *(f"dataset.{name}" for name in DatasetConfig.model_fields),
        *(f"dataset.eval.{name}" for name in EvalConfig.model_fields),
        *(f"chat.{name}" for name in ChatSettings.model_fields),
    }
    assert SourceConfig.model_fields.keys() < DatasetConfig.model_fields.keys()
    # A stream is not kept at all: see below.
    assert {change.field for change in CHANGES} | {"dataset.streaming"} == fields


@pytest.fixture(autouse=True)
def files(write, tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    for name in ("data.jsonl", "copy.jsonl", "copy.ndjson"):
        write(name, text)
    os.utime("copy.jsonl", (1, 1))
    (tmp_path / "cache").mkdir()
    write("b.jsonl", [{"messages": TALK[:2]}, {"messages": TALK[2:]}])
    write("t.jsonl", [{"text": "Hello user " * 30}, {"text": "Hi"}])
    write("both.jsonl", [{"messages": TALK} | pair("Hello", "Hi")])
    write("odd.jsonl", ODD_ROWS)
    write("pairs.jsonl", [pair("Hello", "Hi"), pair("user", "Yes")])
    write("mapping.py", "def shorten(row):\n    return {'messages': row['messages'][:2]}\n")
    save(tmp_path / "saved", train=[pair("a", "b"), pair("c", "d")], test=[pair("e", "f")])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub's datasets with one that has two configurations."""
    import datasets

    source = tmp_path / "source" / "name"
    source.mkdir(parents=True)
    for name in ("default", "other"):
        rows = [pair(name, "a"), pair(name, "b")]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = "".join(
        f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("default", "other")
    )
    (source / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("default", "other"):
        datasets.load_dataset(str(source), name, cache_dir=str(tmp_path / "made"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "made" / "name").rename(tmp_path / "hub" / "owner___name")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


class Outcome(NamedTuple):
    """The entries of the training sources, what stands in them, and what is chosen of it."""

    keys: list[str]
    tables: list[list[list[list[int]]]]
    choice: str


def outcome(settings, tokenizer=PLAIN, seed=0):
    """What a dataset with these settings gives; they are written as `dataset.eval.count`."""
    # A cache of its own, so that equal rows are no gift of an equal key.
    cache = tempfile.mkdtemp(dir="cache")
    default = {"dataset.path": "data.jsonl", "dataset.cache": cache, "chat.on_lost": "keep"}
    given = default | settings
    groups = {"dataset": {}, "chat": {}}
    for key, value in given.items():
        group, *inner, name = key.split(".")
        (groups[group].setdefault(*inner, {}) if inner else groups[group])[name] = value
    config, chat = DatasetConfig(**groups["dataset"]), ChatSettings(**groups["chat"]).model_dump()

    def encoder(kind, source, key):
        if kind == "text":
            return TextEncoder(tokenizer, chat["max_length"], config.stride)
        own = {} if source.train_on is None else {"train_on": source.train_on}
        return ConversationEncoder(tokenizer, chat | own)

    found = prepare(config, encoder, tokenizer, seed)
    parts = [part for key, part in found.sources.items() if not key.startswith("dataset.eval")]
    return Outcome(
        [part.stored.folder.name for part in parts],
        [[table(part.tokens, name) for name in ("input_ids", "labels")] for part in parts],
        found.content_hash,
    )


def table(tokens, column):
    """A column of token rows."""
    return [tokens.row(number)[column].tolist() for number in range(len(tokens))]


def check(effect, before, after):
    """The keys change exactly when the rows do, and this change does what it is to do."""
    assert (before.keys != after.keys) is (before.tables != after.tables) is (effect == ROWS_CHANGE)
    assert (before.choice != after.choice) is (effect != NOTHING)


@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: f"{change.field}-{json.dumps(change.after)[:25]}"
)
def test_the_key_changes_when_the_rows_do(change, request):
    if change.among is HUB:
        request.getfixturevalue("hub")
    field = "dataset.sources" if change.field == "dataset.weight" else change.field
    default = {} if change.before is None else {field: change.before}
    check(
        change.effect,
        outcome({**change.among, **default}),
        outcome({**change.among, field: change.after}),
    )


def test_a_stream_leaves_nothing_to_be_found():
    config = DatasetConfig(path="data.jsonl", streaming=True)
    encoder = ConversationEncoder(PLAIN, {"on_lost": "keep"})
    assert prepare(config, lambda *given: encoder, PLAIN, 0).sources == {}
    assert not Path("luthier/data").exists()


@pytest.mark.parametrize(
    ("settings", "effect"),
    [
        pytest.param({"dataset.eval.count": 2}, CHOICE_CHANGES, id="draws-rows"),
        pytest.param({"dataset.repeats": 0.5}, CHOICE_CHANGES, id="draws-a-part"),
        pytest.param({}, NOTHING, id="draws-nothing"),
    ],
)
def test_the_seed_chooses_among_the_same_rows(settings, effect):
    found = [outcome(settings, seed=seed) for seed in range(6)]
    assert all(one[:2] == found[0][:2] for one in found)
    assert (len({one.choice for one in found}) > 1) is (effect == CHOICE_CHANGES)


@pytest.mark.parametrize(
    ("make", "effect"),
    [
        pytest.param(lambda: tokenizer(), NOTHING, id="the-same-once-more"),
        pytest.param(lambda: tokenizer(model_max_length=9), NOTHING, id="its-length"),
        pytest.param(lambda: tokenizer(padding_side="left"), NOTHING, id="its-padding-side"),
        pytest.param(lambda: used(tokenizer()), NOTHING, id="a-call-before"),
        pytest.param(lambda: tokenizer(vocabulary=257), ROWS_CHANGE, id="its-merges"),
        pytest.param(lambda: tokenizer(tokens=["Hello", "Yes"]), ROWS_CHANGE, id="an-added-token"),
        pytest.param(
            lambda: tokenizer(CHATML.replace("\n{% endfor", "\n\n{% endfor")),
            ROWS_CHANGE,
            id="its-template",
        ),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"dataset.path": "t.jsonl"}], ids=["chat", "text"])
def test_the_tokenizer(settings, make, effect, request):
    if settings and request.node.callspec.id.endswith("its-template"):
        effect = NOTHING  # documents have no template
    check(effect, outcome(settings), outcome(settings, make()))


def used(tokenizer):
    """A tokenizer that has cut a text."""
    tokenizer("Hello", truncation=True, max_length=3)
    return tokenizer


def test_a_date_that_the_template_writes_is_that_of_the_day(monkeypatch):
    """Without `chat.date`, rows are made anew tomorrow only where they would say so."""
    import luthier.chat.encoder as module

    class Tomorrow:
        @staticmethod
        def today():
            return module_date.fromisoformat("2031-05-06")

    module_date = module.Date
    before = [outcome({}), outcome({"chat.template": DATED})]
    monkeypatch.setattr(module, "Date", Tomorrow)
    check(NOTHING, before[0], outcome({}))
    check(ROWS_CHANGE, before[1], outcome({"chat.template": DATED}))


# The content


def test_where_a_file_lies_and_when_it_was_written_does_not_count(tmp_path):
    before = outcome({})
    os.utime("data.jsonl", (7, 7))
    check(NOTHING, before, outcome({}))
    (tmp_path / "sub").mkdir()
    shutil.copy("data.jsonl", "sub/another name.ndjson")
    check(NOTHING, before, outcome({"dataset.path": str(tmp_path / "sub" / "another name.ndjson")}))
    Path("data.jsonl").rename("renamed.jsonl")
    check(NOTHING, before, outcome({"dataset.path": "renamed.jsonl"}))
    Path("link.jsonl").symlink_to("renamed.jsonl")
    check(NOTHING, before, outcome({"dataset.path": "link.jsonl"}))


def test_one_changed_byte_counts(write):
    before = outcome({})
    content = Path("data.jsonl").read_bytes()
    times = Path("data.jsonl").stat()
    write("data.jsonl", content.replace(b"More", b"Mare", 1))
    os.utime("data.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    check(ROWS_CHANGE, before, outcome({}))
    write("data.jsonl", content)
    check(NOTHING, before, outcome({}))


def test_another_encoding_version_counts(monkeypatch):
    before = outcome({})
    monkeypatch.setattr("luthier.data.store.store.ENCODING_VERSION", 1000)
    assert outcome({}).keys != before.keys
