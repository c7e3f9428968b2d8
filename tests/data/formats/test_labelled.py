"""Text, classes, tags and pairs of texts."""

import math

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import detect_format
from luthier.data.rows import Row, RowError


@pytest.mark.parametrize(
    ("fields", "settings", "kind", "expected"),
    [
        pytest.param({"text": "a"}, {}, "text", {"text": "a"}, id="text"),
        pytest.param(
            {"text": "a", "url": "b", "n": 3}, {}, "text", {"text": "a"}, id="text-and-more"
        ),
        pytest.param({"content": "a", "n": 3}, {}, "text", {"text": "a"}, id="only-text-column"),
        pytest.param(
            {"content": "a", "path": "b"},
            {"columns": {"text": "content"}},
            "text",
            {"text": "a"},
            id="text-mapped",
        ),
        pytest.param(
            {"text": "a", "label": "b"},
            {},
            "classification",
            {"text": "a", "label": "b"},
            id="class-by-name",
        ),
        pytest.param(
            {"sentence": "a", "label": 1.0, "idx": 3},
            {},
            "classification",
            {"text": "a", "label": 1},
            id="class-by-number",
        ),
        pytest.param(
            {"premise": "a", "hypothesis": "b", "label": 2},
            {},
            "classification",
            {"text": "a", "text_pair": "b", "label": 2},
            id="inference",
        ),
        pytest.param(
            {"text": "a", "intent": "b"},
            {"columns": {"label": "intent"}},
            "classification",
            {"text": "a", "label": "b"},
            id="class-mapped",
        ),
        pytest.param(
            {"text": "a", "label": -1},
            {},
            "classification",
            {"text": "a", "label": -1},
            id="a-number-below-zero",
        ),
        pytest.param(
            {"text": "a", "label": 0.5},
            {},
            "classification",
            {"text": "a", "label": 0.5},
            id="a-number",
        ),
        pytest.param(
            {"text": "a", "labels": ["b", "c"]},
            {},
            "classification",
            {"text": "a", "label": ["b", "c"]},
            id="several-classes",
        ),
        pytest.param(
            {"text": "a", "labels": []},
            {},
            "classification",
            {"text": "a", "label": []},
            id="no-class-of-several",
        ),
        pytest.param(
            {"tokens": ["a", "b"], "ner_tags": [0, 1], "pos_tags": [4, 5]},
            {},
            "tagging",
            {"tokens": ["a", "b"], "tags": [0, 1]},
            id="tags",
        ),
        pytest.param(
            {"tokens": '["a", "b"]', "tags": '["O", "B"]'},
            {},
            "tagging",
            {"tokens": ["a", "b"], "tags": ["O", "B"]},
            id="tags-in-csv",
        ),
        pytest.param(
            {"tokens": ["a"], "ner_tags": [0], "pos_tags": [4]},
            {"columns": {"tags": "pos_tags"}},
            "tagging",
            {"tokens": ["a"], "tags": [4]},
            id="tags-mapped",
        ),
        pytest.param(
            {"source": "a", "target": "b", "id": "c"},
            {},
            "seq2seq",
            {"source": "a", "target": "b"},
            id="seq2seq",
        ),
        pytest.param(
            {"translation": {"en": "a", "de": "b"}},
            {"columns": {"source": "translation.en", "target": "translation.de"}},
            "seq2seq",
            {"source": "a", "target": "b"},
            id="translation",
        ),
    ],
)
def test_a_labelled_row(detect, read, fields, settings, kind, expected):
    assert detect(fields, **settings).example_type == kind
    assert read(fields, **settings) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": None}, "'text' is null; expected text"),
        ({"text": float("nan")}, "'text' is NaN; expected text"),
        ({"text": ["a"]}, "'text' is a list; expected text"),
        ({"text": "a", "label": None}, "'label' is null; expected a class"),
        ({"text": "a", "label": math.inf}, "'label' is inf; expected a class, by name or whole"),
        ({"text": "a", "label": ""}, "'label' is ''; expected a class"),
        ({"text": "a", "label": [1, 0.5]}, "'label' is 0.5; expected a class"),
        ({"text": "a", "label": [[1]]}, "'label' is a list; expected a class"),
        ({"text": "a", "label": {"b": 1}}, "'label' is an object; expected a class"),
        ({"tokens": ["a", "b"], "tags": [1]}, "'tokens' has 2 entries and 'tags' 1"),
        ({"tokens": ["a", 3], "tags": [1, 2]}, "'tokens' holds a number; expected texts"),
        ({"tokens": ["a"], "tags": [None]}, "'tags' is null; expected a class"),
        (
            {"tokens": ["a"], "tags": [-1]},
            "'tags' is -1, which means no label in hub datasets",
        ),
        ({"source": 3, "target": "a"}, "'source' is a number; expected text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_labelled_rows_in_words(read, fields, problem):
    with pytest.raises(RowError) as error:
        read(fields)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('["a", "b"]', ["a", "b"]), ("['a', 'b']", ["a", "b"]), ("[]", []), (" [ ] ", []),
        ("[1, 2]", [1, 2]), ("[spam]", "[spam]"), ("[", "["),
    ],
)  # fmt: skip
def test_classes_in_a_text_cell(read, text, label):
    assert read({"text": "a", "label": text})["label"] == label


@pytest.mark.parametrize("text", ["[a, b]", "['a' 'b']", '["a", ', "[None, 'a']"])
def test_text_that_begins_like_a_list_of_classes_and_is_none(read, text):
    with pytest.raises(RowError, match="'label'"):
        read({"text": "a", "label": text})


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["1", "2", "10"], [1, 2, 10]),
        (["1.0", "2.0"], [1, 2]),
        (["0.5", "-1", "3e2"], [0.5, -1, 300]),
        ([" 1", "2 "], [1, 2]),
        (["1", "2", "many"], ["1", "2", "many"]),
        (["01", "02"], ["01", "02"]),
        (["+1", "2"], ["+1", "2"]),
    ],
)
def test_labels_of_text_cells_that_are_all_numbers_are_numbers(cells, labels):
    rows = [Row({"text": "a", "label": cell}, f"x.csv:{n}") for n, cell in enumerate(cells)]
    config = SourceConfig(path="x.csv")
    row_format = detect_format(config, rows, "x.csv", text_cells=True)
    assert [row_format.read(row)["label"] for row in rows] == labels
    # JSON has types of its own: a text stays a name there.
    row_format = detect_format(config, rows, "x.jsonl")
    assert [row_format.read(row)["label"] for row in rows] == cells
