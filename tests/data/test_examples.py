"""The cheap check of a dataset: mistakes in words, before anything heavy is imported."""

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from helpers.image_files import image_bytes
from helpers.letter_encoder import NAMELESS, Letters, pair, prepared, replies, save, shown
from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data import check_sources
from luthier.data.examples import BadRows, open_examples
from luthier.data.prepare import prepare
from luthier.errors import UserError


def check(**settings):
    check_sources(DatasetConfig.model_validate({"path": "data.jsonl", **settings}))


@pytest.fixture(autouse=True)
def some_files(write, tmp_path):
    write("data.jsonl", replies("a", "b", "c", "d"))
    write("bad.jsonl", "\n".join([json.dumps(pair("q", "a")), "{"]))
    write("none.jsonl", "{\n[]\n")
    write("odd.jsonl", [{"x": 1, "y": 2}])
    write("data.csv", "prompt;completion\nq;a\n")
    save(tmp_path / "saved", train=replies("a", "b"), test=replies("c"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"path": None}, r"dataset names no rows\. Set dataset\.path", id="no-path"),
        pytest.param({"path": "x.jsonl"}, r"there is no file x\.jsonl", id="missing"),
        pytest.param({"path": "my data/of/rows"}, "neither a file here", id="no-name"),
        pytest.param({"name": "main"}, r"dataset\.name=main is for hub datasets", id="name"),
        pytest.param({"revision": "v1"}, r"Remove dataset\.revision\.", id="revision"),
        pytest.param({"split": "test"}, r"dataset\.split=test is for hub datasets", id="split"),
        pytest.param(
            {"options": {"delimiter": ";"}}, r"dataset\.options\.delimiter: jsonl has", id="options"
        ),
        pytest.param({"columns": {"prompt": "x"}}, r"dataset\.columns", id="columns"),
        pytest.param({"path": "odd.jsonl"}, r"columns: x, y", id="unknown-format"),
        pytest.param({"path": "bad.jsonl"}, r"bad\.jsonl:2: this is not JSON", id="bad-row"),
        pytest.param(
            {"path": "none.jsonl", "on_bad_row": "drop"}, r"none\.jsonl:1", id="only-bad-rows"
        ),
        pytest.param({"filter": "lang ="}, r"dataset\.filter is not a valid filter", id="filter"),
        pytest.param({"filter": "lang == 'en'"}, r"data\.jsonl:1: .*lang", id="filter-column"),
        pytest.param(
            {"sources": {"a": {"path": "data.jsonl"}}},
            r"dataset\.path is for a dataset of one source, and dataset\.sources names a\. Set it "
            r"for each source it is for, such as dataset\.sources\.a\.path",
            id="path-beside-sources",
        ),
        pytest.param(
            {"path": None, "system": "S", "sources": {"a": {"path": "data.jsonl"}}},
            r"dataset\.system is for a dataset of one source",
            id="system-beside-sources",
        ),
        pytest.param(
            {"path": None, "sources": {"a": {"max_rows": 1}}},
            r"dataset\.sources\.a\.path is missing",
            id="a-source-without-a-path",
        ),
        pytest.param(
            {"path": None, "sources": {"a": {"path": "data.jsonl", "filter": "1 +"}}},
            r"dataset\.sources\.a\.filter is not a valid filter",
            id="a-source's-filter",
        ),
        pytest.param(
            {"path": None, "sources": {"a": {"path": "bad.jsonl"}}}, r"bad\.jsonl:2", id="source"
        ),
        pytest.param(
            {"eval": {"share": 0.1, "count": 2}},
            r"dataset\.eval\.share and dataset\.eval\.count are set",
            id="two-ways",
        ),
        pytest.param(
            {"eval": {"split": "test"}},
            r"dataset\.eval\.split=test is for hub datasets, and data\.jsonl is a file\. Remove "
            r"dataset\.eval\.split\.",
            id="eval-split",
        ),
        pytest.param({"path": "saved", "eval": {"split": "x"}}, "no split 'x'", id="no-split"),
        pytest.param(
            {"path": None, "sources": {"a": {"path": "saved"}}, "eval": {"split": "test"}},
            r"dataset\.eval\.split is a split of dataset\.path, which is not set",
            id="eval-split-of-sources",
        ),
        pytest.param({"eval": {"path": "x.jsonl"}}, r"there is no file x\.jsonl", id="eval-path"),
        pytest.param({"eval": {"path": "bad.jsonl"}}, r"bad\.jsonl:2", id="eval-bad-row"),
        pytest.param({"eval": {"path": "odd.jsonl"}}, r"dataset\.columns", id="eval-columns"),
        pytest.param(
            {"eval": {"sets": {"x": {"split": "test"}}}},
            r"dataset\.eval\.sets\.x has no path",
            id="set-without-a-path",
        ),
        pytest.param(
            {"eval": {"sets": {"x": {"path": "data.jsonl", "repeats": 2}}}},
            r"dataset\.eval\.sets\.x: weight and repeats mix training rows",
            id="set-with-repeats",
        ),
        pytest.param(
            {"eval": {"sets": {"x": {"path": "data.jsonl", "name": "main"}}}},
            r"dataset\.eval\.sets\.x\.name=main is for hub datasets",
            id="set-with-a-name",
        ),
    ],
)
def test_mistakes_in_words(settings, message):
    with pytest.raises(UserError, match=message) as error:
        check(**settings)
    assert not str(error.value).startswith("Traceback")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval": {"count": 1}},
        {"path": "bad.jsonl", "on_bad_row": "drop"},
        {"path": "bad.jsonl", "max_rows": 1},
        {"path": "saved", "eval": {"split": "test"}},
        {"path": "data.csv", "options": {"delimiter": ";"}},
        {"filter": "completion == 'a'"},
        {"path": None, "sources": {"a": {"path": "data.jsonl"}, "b": {"path": "saved"}}},
        {"eval": {"sets": {"x": {"path": "saved", "split": "test"}}}},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_sound_datasets_pass(settings):
    check(**settings)


def test_a_row_that_the_filter_leaves_out_may_be_bad(write):
    write("mixed.jsonl", [pair("q", "a", lang="en"), pair("q", None, lang="de")])
    check(path="mixed.jsonl", filter="lang == 'en'")
    with pytest.raises(UserError, match=r"mixed\.jsonl:2"):
        check(path="mixed.jsonl")


def test_a_source_is_opened_once_and_anew_where_its_file_has_changed(write):
    config = DatasetConfig.model_validate({"path": "data.jsonl"})
    sources = check_sources(config)
    opened = sources.open("dataset")
    assert sources.open("dataset") is opened
    write("data.jsonl", replies("other"))
    again = sources.open("dataset")
    assert again is not opened
    assert [row.where for row in again.examples(BadRows())] == ["data.jsonl:1"]


def test_prepare_encodes_what_a_file_holds_then_and_not_what_the_check_saw(write, tmp_path):
    config = DatasetConfig.model_validate({"path": "data.jsonl", "cache": str(tmp_path / "cache")})
    sources = check_sources(config)
    write("data.jsonl", replies("changed"))
    encoder = Letters()
    made = prepare(config, lambda *arguments: encoder, NAMELESS, 0, sources)
    assert shown(made.train) == shown(prepared({"path": "data.jsonl"}).train)


def test_it_imports_nothing_heavy():
    code = (
        "import sys; from luthier.data import check_sources\n"
        "from luthier.config.schema import DatasetConfig\n"
        "check_sources(DatasetConfig.model_validate({'sources': {'a': {'path': 'data.jsonl', "
        "'filter': 'len(prompt) > 0'}, 'b': {'path': 'data.csv', 'options': {'delimiter': ';'}}}, "
        "'eval': {'count': 1, 'sets': {'x': {'path': 'data.jsonl'}}}}))\n"
        "print({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()"


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["data", "mixtures", "formats", "sources"])
def test_the_examples_of_the_docs_are_valid(page):
    blocks = re.findall(r"```yaml\n(dataset:.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    for block in blocks:
        DatasetConfig.model_validate(yaml.safe_load(block)["dataset"])
    assert blocks


def test_images_are_read_beside_their_file_and_bad_ones_name_row_and_part(write, tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "red.png").write_bytes(image_bytes("PNG", 30, 20))
    rows = [
        {"prompt": "Colour?", "completion": "Red.", "image": name}
        for name in ("red.png", "blue.png", "red.png")
    ]
    write("sub/rows.jsonl", rows)
    opened = open_examples(SourceConfig(path="sub/rows.jsonl"), "dataset")
    bad, kept = BadRows(), []
    examples = list(opened.examples(bad, keep_image=kept.append))
    assert [row.where for row in examples] == ["sub/rows.jsonl:1", "sub/rows.jsonl:3"]
    part = examples[0].example["messages"][0]["content"][0]
    assert part["image"] == {
        "sha256": sha256(image_bytes("PNG", 30, 20)).hexdigest(),
        "width": 30, "height": 20, "source": "red.png",
    }  # fmt: skip
    assert "images" not in examples[0].example
    assert len(kept) == 2
    (row,) = bad.rows
    looked_for = folder / "blue.png"
    assert row.where == "sub/rows.jsonl:2"
    assert row.problem == f"image: there is no file blue.png (looked for {looked_for})"
    with pytest.raises(UserError, match=r"rows.jsonl:2: image: there is no file blue.png") as error:
        check_sources(DatasetConfig(path="sub/rows.jsonl"))
    # The file is sound JSON: how JSON is written would not help.
    assert "one JSON object" not in str(error.value)
