"""JSON and JSONL: what is read, at which line, and what every mistake says."""

import json

import pytest

from luthier.data.rows import BadRow, Row
from luthier.data.sources import streams
from luthier.errors import UserError

ROW = {"prompt": "Hi", "completion": "Hello"}
GOOD = json.dumps(ROW)


@pytest.fixture(params=[1 << 20, 7, 1], ids=["whole", "blocks-of-7", "blocks-of-1"])
def block(request, monkeypatch):
    """Reads of several sizes: no row may depend on where a block ends."""
    monkeypatch.setattr(streams, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f"{GOOD}\n{GOOD}\n", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.ndjson", f"{GOOD}\r\n\r\n{GOOD}", ["a.ndjson:1", "a.ndjson:3"]),
        ("a.json", f"[{GOOD}, {GOOD}]", ["a.json:1", "a.json:1"]),
        ("a.json", f"\n[\n  {GOOD},\n\n  {GOOD}\n]\n", ["a.json:3", "a.json:5"]),
        ("a.json", f"[{GOOD},\n{GOOD},\n]", ["a.json:1", "a.json:2"]),
        ("a.json", json.dumps([ROW, ROW], indent=2), ["a.json:2", "a.json:6"]),
        ("a.json", f"{GOOD}\n{GOOD}\n", ["a.json:1", "a.json:2"]),
        ("a.json", json.dumps(ROW, indent=1), ["a.json:1"]),
        ("a.json", f"{json.dumps(ROW, indent=1)}\n{GOOD}\n", ["a.json:1", "a.json:5"]),
        ("a.jsonl", f"[\n{GOOD},\n{GOOD}\n]", ["a.jsonl:2", "a.jsonl:3"]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), ["a.jsonl:1"]),
        ("a.json", b"\xef\xbb\xbf[" + GOOD.encode() + b"]", ["a.json:1"]),
        ("A.JSONL", GOOD, ["A.JSONL:1"]),
    ],
    ids=[
        "lines",
        "blank-lines",
        "array",
        "spread-array",
        "trailing-comma",
        "indented",
        "lines-in-json",
        "one-object",
        "objects",
        "array-in-jsonl",
        "bom",
        "bom-array",
        "upper-case",
    ],
)
def test_rows_and_their_lines(write, read, block, name, content, where):
    rows = read(write(name, content))
    assert [row.fields for row in rows] == [ROW] * len(where)
    assert [row.where for row in rows] == where


def test_a_line_separator_in_a_text_ends_no_line(write, fields, block):
    row = {"prompt": "a\u2028b\u0085c", "completion": "d"}
    assert fields(write("a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_values_are_those_of_the_standard_decoder(write, fields, block):
    row = {
        "text": '"quoted" \\ \u00e9\u20ac\U0001f600\ud7ff\n\t\0',
        "numbers": [0, -1, 1.5, 1e300, 123456789012345678901],
        "nested": {"a": [{"b": [[], {}]}], "empty": "", "null": None, "true": True},
        "key: with {braces}": "1",
    }
    for name, content in (("a.jsonl", json.dumps(row)), ("b.json", json.dumps([row] * 3))):
        assert fields(write(name, content))[-1] == row


@pytest.mark.parametrize(
    ("content", "where", "problem", "text"),
    [
        ("{'a': 1}", "a.jsonl:2", "this is not JSON: Expecting property name", "{'a': 1}"),
        ("[1, 2]", "a.jsonl:2", "this is a list, not a JSON object", "[1, 2]"),
        ('"x"', "a.jsonl:2", "this is text, not a JSON object", "x"),
        ("3", "a.jsonl:2", "this is a number, not", "3"),
        ("null", "a.jsonl:2", "this is null, not", "null"),
        ("true", "a.jsonl:2", "this is true or false, not", "true"),
        ('{"a": "' + "x" * 500, "a.jsonl:2", "Unterminated string", "x" * 100 + "..."),
        (GOOD + GOOD, "a.jsonl:2", "Extra data (column", '{"prompt"'),
        ('{"a": NaN}', "a.jsonl:2", "NaN is not a JSON value", "NaN"),
        ('{"a": [-Infinity]}', "a.jsonl:2", "-Infinity is not a JSON value", ""),
        ('{"a": 1e999}', "a.jsonl:2", "1e999 is too large a number", ""),
        ('{"a": ' + "9" * 5000 + "}", "a.jsonl:2", "Exceeds the limit", ""),
        ('{"a": 1, "a": 2}', "a.jsonl:2", "the key 'a' appears twice", ""),
        ('{"a": [{"b": {"c": 1, "d": 2, "c" : 1}}]}', "a.jsonl:2", "'c' appears twice", ""),
        ('{"a": 1, "\\u0061": 2}', "a.jsonl:2", "the key 'a' appears twice", ""),
        ('{"a": "\\ud83d"}', "a.jsonl:2", "half of a character", ""),
        ('{"a": "\\uDE00\\uD83D"}', "a.jsonl:2", "half of a character", ""),
        ('{"a":' * 50_000, "a.jsonl:2", "not JSON", ""),
        ('{"a": "tab\there"}', "a.jsonl:2", "Invalid control character", ""),
        ("{", "a.jsonl:2", "not JSON", "{"),
    ],
    ids=[
        "not-json", "list", "text", "number", "null", "bool", "long-line", "two-in-a-line", "nan",
        "infinity", "overflow", "digits", "equal-keys", "nested-equal-keys", "escaped-equal-keys",
        "surrogate", "swapped-surrogates", "too-deep", "control-character", "cut",
    ],
)  # fmt: skip
def test_a_bad_line_costs_itself_alone(write, read, content, where, problem, text):
    first, bad, last = read(write("a.jsonl", f"{GOOD}\n{content}\n{GOOD}\n"))
    assert isinstance(bad, BadRow)
    assert bad.where == where
    assert problem in bad.problem
    assert text.removesuffix("...") in bad.text
    assert len(bad.text) <= 120
    assert [first, last] == [Row(ROW, "a.jsonl:1"), Row(ROW, "a.jsonl:3")]


def test_pairs_of_surrogates_and_escaped_backslashes_are_sound(write, fields):
    content = '{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}'
    assert fields(write("a.jsonl", content)) == [{"a": "\U0001f600", "b": "\\ud83d"}]


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("7", "this is a number, not a JSON object"),
        ("12345678", "this is a number, not a JSON object"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' appears twice"),
        ('{"a": "\\ud83d"}', "half of a character"),
    ],
    ids=["number", "long-number", "nan", "equal-keys", "surrogate"],
)
def test_a_bad_item_of_an_array_costs_itself_alone(write, read, block, item, problem):
    first, bad, last = read(write("a.json", f"[{GOOD},\n {item},\n {GOOD}]"))
    assert isinstance(bad, BadRow)
    assert bad.where == "a.json:2"
    assert problem in bad.problem
    assert [first.where, last.where] == ["a.json:1", "a.json:3"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.json", f"[{GOOD},\n {{'a'}}]", ["a.json:2: this is not JSON", "(line 2, column 3)"]),
        ("a.json", f"[{GOOD},\n {{\n'a'}}]", ["a.json:2", "(line 3, column 1)", "cannot be read"]),
        ("a.json", f"[{GOOD}\n {GOOD}]", ["a.json:2: expected ',' or ']'", '{"prompt"']),
        ("a.json", f"[{GOOD}\n", ["a.json:2: expected ',' or ']'", "the file ends"]),
        ("a.json", f"[{GOOD},\n", ["a.json:2: this is not JSON: Expecting value"]),
        ("a.json", f'[{GOOD},\n{{"a": "bc', ["a.json:2: this is not JSON: Unterminated string"]),
        ("a.json", f"[{GOOD}]\n{GOOD}", ["a.json:2: there is text after the end of the array"]),
        ("a.json", f"{{\n{GOOD}", ["a.json:1: this is not JSON"]),
        ("a.jsonl", "", ["a.jsonl is empty: it has no rows. Each row must be one JSON object"]),
        ("a.jsonl", "\n \n", ["a.jsonl is empty"]),
        ("a.json", "[]", ["a.json is empty"]),
        ("a.json", "", ["a.json is empty"]),
        (
            "a.jsonl",
            GOOD.encode() + b'\n{"a": "caf\xe9"}',
            [
                "a.jsonl:2: byte 0xe9 is not UTF-8",
                "iconv -f WINDOWS-1252 -t UTF-8 a.jsonl > utf8.jsonl",
                "options.encoding=windows-1252",
            ],
        ),
        ("a.jsonl", GOOD.encode() + b'\n\n{"a": "\xe2\x82', ["a.jsonl:3: byte 0xe2 is not UTF-8"]),
        ("a.jsonl", GOOD.encode("utf-16"), ["a.jsonl is UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("a.jsonl", GOOD.encode("utf-16-le"), ["a.jsonl is UTF-16"]),
    ],
    ids=[
        "array-not-json", "array-not-json-later", "array-comma", "array-cut", "array-cut-at-comma",
        "array-cut-in-text", "array-tail", "object-cut", "empty", "blank",
        "empty-array", "empty-json", "latin1", "cut-character", "utf16", "utf16-without-mark",
    ],
)  # fmt: skip
def test_broken_files_in_words(write, read, name, content, parts):
    with pytest.raises(UserError) as error:
        read(write(name, content))
    for part in parts:
        assert part in str(error.value)


def test_the_place_of_a_wrong_byte_does_not_depend_on_blocks(write, read, block):
    content = GOOD.encode() + b'\n{"a": "\xe2\x82\xac"}\n{"a": "caf\xe9"}\n' + GOOD.encode()
    with pytest.raises(UserError, match=r"a\.jsonl:3: byte 0xe9"):
        read(write("a.jsonl", content))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "utf-8-sig"])
def test_an_encoding_can_be_named(write, fields, block, encoding):
    row = {"text": "caf\xe9"}
    content = json.dumps(row, ensure_ascii=False).encode(encoding)
    assert fields(write("a.jsonl", content), options={"encoding": encoding}) == [row]


class TestOneObject:
    """A file that is one object is a row, or holds the rows under a key."""

    def test_known_keys_are_looked_into(self, write, read):
        name = write("squad.json", json.dumps({"version": "2", "data": [ROW, ROW, 3]}, indent=1))
        first, second, bad = read(name)
        assert [first, second] == [Row(ROW, "squad.json data[0]"), Row(ROW, "squad.json data[1]")]
        assert bad == BadRow("squad.json data[2]", "this is a number, not a JSON object", "3")

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [{"role": "user", "content": "a"}]},
            {"conversations": [{"from": "human", "value": "a"}], "tools": [{"function": {}}]},
            {"data": [1, 2]},
            {"data": []},
            {"prompt": "a", "data": "b"},
        ],
        ids=["messages", "sharegpt", "numbers", "empty", "text"],
    )
    @pytest.mark.parametrize("indent", [None, 1], ids=["one-line", "lines"])
    def test_what_holds_no_rows_is_a_row(self, write, fields, row, indent):
        assert fields(write("a.json", json.dumps(row, indent=indent))) == [row]

    @pytest.mark.parametrize(
        ("whole", "named"),
        [
            ({"pets": [ROW]}, "options.rows=pets"),
            ({"data": [ROW], "train": [ROW]}, "dataset.options.rows=data or dataset.options.rows="),
            ({"data": [ROW], "meta": {"a": 1}}, "options.rows=data"),
        ],
        ids=["unknown-key", "two-lists", "nested-beside"],
    )
    def test_in_doubt_the_user_is_asked(self, write, read, whole, named):
        name = write("a.json", json.dumps(whole))
        with pytest.raises(UserError, match="is one object that holds lists of objects") as error:
            read(name)
        assert named in str(error.value)
        assert "if the object is one row, set dataset.options.rows=null" in str(error.value)

    def test_the_key_can_be_named(self, write, fields):
        name = write("a.json", json.dumps({"pets": [ROW], "more": [ROW, ROW]}))
        assert fields(name, options={"rows": "more"}) == [ROW, ROW]
        assert fields(name, options={"rows": None}) == [{"pets": [ROW], "more": [ROW, ROW]}]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"pets": [ROW]}, r"holds no list under 'cats'\. It has the keys pets"),
            ([ROW, ROW], "is not one object"),
        ],
        ids=["no-such-key", "array"],
    )
    def test_a_key_that_is_not_there(self, write, read, content, words):
        with pytest.raises(UserError, match=words):
            read(write("a.json", json.dumps(content)), options={"rows": "cats"})


def test_a_broken_array_is_not_read_to_its_end(write, opened, monkeypatch):
    """What more text cannot mend is said at once; only a cut value waits for more."""
    taken = []
    real = streams.read_blocks

    def counted(file):
        for block in real(file):
            taken.append(len(block))
            yield block

    monkeypatch.setattr("luthier.data.sources.text.read_blocks", counted)
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    name = write("a.json", f"[{GOOD}, {{oops}}, " + f"{GOOD},\n" * 10_000)
    with pytest.raises(UserError, match=r"a\.json:1: this is not JSON"):
        list(opened(name).rows())
    assert len(taken) < 5
