"""CSV, TSV and plain text: rows, places and mistakes."""

import gzip

import pytest

from luthier.data.rows import BadRow, Row
from luthier.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "options", "rows"),
    [
        ("a.csv", "a,b\n1,x\n2,y\n", {}, [("a.csv:2", "1", "x"), ("a.csv:3", "2", "y")]),
        ("a.csv", "a,b\r\n1,x\r\n", {}, [("a.csv:2", "1", "x")]),
        ("a.csv", "\ufeffa,b\n1,x", {}, [("a.csv:2", "1", "x")]),
        (
            "a.csv",
            'a,b\n"1\n\n2","say ""hi"", x"\n3,\n',
            {},
            [("a.csv:2", "1\n\n2", 'say "hi", x'), ("a.csv:5", "3", "")],
        ),
        ("a.csv", "a,b\n\n1,x\n\n", {}, [("a.csv:3", "1", "x")]),
        ("a.csv", "a,b\nx\u2028y,\u0085\n", {}, [("a.csv:2", "x\u2028y", "\u0085")]),
        ("a.tsv", "a\tb\n1\tx,y\n", {}, [("a.tsv:2", "1", "x,y")]),
        ("a.csv", "a;b\n1;x\n", {"delimiter": ";"}, [("a.csv:2", "1", "x")]),
        ("a.csv", "a,b\n'1,2',x\n", {"quotechar": "'"}, [("a.csv:2", "1,2", "x")]),
        ("a.tsv", 'a\tb\n"1\t2"\n', {"quotechar": None}, [("a.tsv:2", '"1', '2"')]),
        ("a.csv", "1,x\n", {"header": ["a", "b"]}, [("a.csv:1", "1", "x")]),
        ("a.csv", b"a,b\ncaf\xe9,x\n", {"encoding": "latin1"}, [("a.csv:2", "caf\xe9", "x")]),
        ("a.csv", "a,b\n1,[]\n", {}, [("a.csv:2", "1", "[]")]),
        ("a.csv", "a,b\n1," + "x" * 500_000, {}, [("a.csv:2", "1", "x" * 500_000)]),
    ],
    ids=[
        "plain", "windows", "bom", "quotes", "blank-lines", "line-separator", "tsv", "delimiter",
        "quotechar", "no-quotes", "header", "encoding", "json-cell", "long-cell",
    ],
)  # fmt: skip
def test_csv_cells_are_text(write, read, name, content, options, rows):
    found = read(write(name, content), options=options)
    assert found == [Row({"a": a, "b": b}, where) for where, a, b in rows]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2,3", "3 cells for 2 columns"),
        ("1", "1 cell for 2 columns"),
        ('"a"b,2', "this is not CSV: ',' expected after '\"'"),
    ],
    ids=["too-many", "too-few", "text-behind-a-quote"],
)
def test_a_bad_record_costs_itself_alone(write, read, line, problem):
    first, bad, last = read(write("a.csv", f"a,b\n1,2\n{line}\n5,6\n"))
    assert isinstance(bad, BadRow)
    assert bad.where == "a.csv:3"
    assert problem in bad.problem
    assert line[:3] in bad.text
    assert [first.where, last.where] == ["a.csv:2", "a.csv:4"]


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ("a,a\n1,2\n", {}, ["a.csv, its header: the name 'a' appears twice"]),
        ("a,,b\n1,2,3\n", {}, ["a.csv, its header: column 2 has no name"]),
        (
            "a;b\n1;2\n",
            {"delimiter": ","},
            ["is a single cell: a;b", """set it: 'dataset.options.delimiter=";"'"""],
        ),
        ("a\tb\n1\t2\n", {"delimiter": ","}, ["set it: dataset.format=tsv"]),
        ('"a"x,b\n1,2\n', {}, ["a.csv:1: the header: this is not CSV"]),
        ("1,2\n", {"header": ["a", "a"]}, ["dataset.options.header: the name 'a' appears twice"]),
        ("", {}, ["a.csv is empty"]),
        ("a,b\n", {}, ["a.csv is empty: it has no rows", "one cell for each column"]),
        ('a,b\n1,2\n"3,4\n5,6\n', {}, ["a.csv:3: a cell opens with \" here", "quotechar=null"]),
        (b"a,b\ncaf\xe9,x\n", {}, ["a.csv:2: byte 0xe9 is not UTF-8", "> utf8.csv"]),
        ("a,b\n".encode("utf-16"), {}, ["a.csv is UTF-16"]),
        ("a\n1\n", {"delimeter": ";"}, ["dataset.options.delimeter", "Did you mean delimiter?"]),
        ("a\n1\n", {"delimiter": ";;"}, ["dataset.options.delimiter=';;' does not fit"]),
        ("a\n1\n", {"encoding": "utf9"}, ["dataset.options.encoding='utf9'", "no such encoding"]),
        ("a\n1\n", {"encoding": "base64"}, ["dataset.options.encoding='base64'"]),
    ],
    ids=[
        "equal-names", "no-name", "semicolons", "tabs", "bad-header", "equal-names-given", "empty",
        "header-alone", "open-quote", "latin1", "utf16", "unknown-option", "long-delimiter",
        "unknown-encoding", "no-text-encoding",
    ],
)  # fmt: skip
def test_broken_csv_in_words(write, read, content, options, parts):
    with pytest.raises(UserError) as error:
        read(write("a.csv", content), options=options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("start", ["", "\n", "\ufeff"], ids=["at once", "blank line", "mark"])
def test_the_delimiter_is_found_where_the_header_is_one_cell(write, read, mark, name, start):
    lines = ["Question{}Answer", 'What, or "why"?{}"so; or\tso|so,\nand so"', "a{}b"]
    lines[1] = '"What, or ""why""?"{}"so; or\tso|so,\nand so"'
    content = start + "".join(f"{line.format(mark)}\n" for line in lines)
    first, second = read(write(name, content))
    line = 2 if start != "\n" else 3
    assert (first.where, second.where) == (f"{name}:{line}", f"{name}:{line + 2}")
    assert first.fields == {
        "Question": 'What, or "why"?', "Answer": "so; or\tso|so,\nand so",
    }  # fmt: skip
    assert second.fields == {"Question": "a", "Answer": "b"}


@pytest.mark.parametrize(
    ("content", "options", "columns"),
    [
        ("text\na;b\n", {}, ["text"]),
        ("a,b;c\n1,2\n", {}, ["a", "b;c"]),
        ('"a;b",c\n1,2\n', {}, ["a;b", "c"]),
        ("a;b;c,d\n1,2\n", {}, ["a;b;c", "d"]),
        ("1;2\n", {"header": ["a"]}, ["a"]),
        ("a;b|c|d\n1|2|3\n", {}, ["a;b", "c", "d"]),
    ],
    ids=["one column", "two cells", "in quotes", "more of another", "header given", "the most"],
)
def test_a_header_that_parts_is_read_as_it_stands(write, read, content, options, columns):
    row = read(write("a.csv", content), options=options)[0]
    assert [*row.fields] == columns


TEXT = "One.\r\n  two\n\n\n\nThree\u2028four.\n \nFive."


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        (
            "line",
            [("a.txt:1", "One."), ("a.txt:2", "  two"), ("a.txt:6", "Three\u2028four."),
             ("a.txt:8", "Five.")],
        ),
        (
            "paragraph",
            [("a.txt:1", "One.\n  two"), ("a.txt:6", "Three\u2028four."), ("a.txt:8", "Five.")],
        ),
        ("file", [("a.txt", TEXT)]),
    ],
    ids=["line", "paragraph", "file"],
)  # fmt: skip
def test_text_by_line_paragraph_or_file(write, read, by, rows):
    found = read(write("a.txt", TEXT), options={"by": by})
    assert found == [Row({"text": text}, where) for where, text in rows]


def test_text_is_read_by_line_unless_said(write, fields):
    assert fields(write("a.md", "# a\n\nb\n")) == [{"text": "# a"}, {"text": "b"}]


@pytest.mark.parametrize("by", ["line", "paragraph", "file"])
def test_blank_text_is_empty(write, read, by):
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        read(write("a.txt", "\n \n"), options={"by": by})


ENDLESS = {
    "a line": ("a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 300_000, {}, "a.jsonl:2"),
    "a value of an array": (
        "a.json",
        '[{"text": "a"},\n{"text": "' + "x" * 900_000,
        {},
        "a.json:2",
    ),
    "a line of CSV": ("a.csv", "a,b\n1," + "x" * 300_000, {}, "a.csv:2"),
    "a text": ("a.txt", "x\n" * 200_000, {"by": "file"}, "a.txt"),
    "a paragraph": ("a.txt", "\n\n" + "x\n" * 200_000, {"by": "paragraph"}, "a.txt:3"),
}


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_row_without_an_end_is_an_error_with_its_place(write, read, monkeypatch, what, suffix):
    name, content, options, where = ENDLESS[what]
    monkeypatch.setattr("luthier.data.sources.text.MAX_ROW_CHARS", 100_000)
    content = gzip.compress(content.encode()) if suffix else content
    with pytest.raises(
        UserError, match=r"the row that begins here is longer than 100,000"
    ) as error:
        read(write(name + suffix, content), options=options)
    assert where.replace(name, name + suffix) in str(error.value)
