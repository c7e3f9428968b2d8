"""The filter expression: what it keeps, what it refuses, and that nothing else is reached."""

import pytest

from luthier import patterns
from luthier.data.filter import SearchTimeoutError, compile_filter
from luthier.data.rows import RowError
from luthier.errors import UserError

ROW = {
    "text": "Hello, world",
    "score": 3,
    "lang": "en",
    "missing": None,
    "odd name": "x",
    "tags": ["a", "b"],
    "meta": {"source": "web"},
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
}


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("len(text) > 5", True),
        ("score >= 3 and lang == 'de'", False),
        ("score >= 4 or lang in ['en', 'de']", True),
        ("lang not in ('en', 'de')", False),
        ("not score == 3", False),
        ("1 < score < 3", False),
        ("1 < score <= 3", True),
        ("missing is None", True),
        ("missing is not None and len(missing) > 3", False),
        ("row['odd name'] == 'x'", True),
        ("'score' in row", True),
        ("'scores' in row and scores > 3", False),
        ("(row.get('split') or 'train') == 'train'", True),
        ("meta['source'] == 'web'", True),
        ("meta.get('year', 2000) > 1999", True),
        ("messages[-1]['content'] == 'Ho'", True),
        ("len(messages[0]['content'].split()) == 1", True),
        ("tags == ['a', 'b']", True),
        ("text.startswith('Hello')", True),
        ("text.startswith(('a', 'b'))", False),
        ("lower(text[:5]) == 'hello'", True),
        ("text.casefold().count('l') == 3", True),
        ("matches(text, r'\\bworld$')", True),
        ("matches(text, 'W')", False),
        ("matches(text, 'o{i}') or matches(text, 'o{e<=1}')", False),
        ("matches('x_{i}{2', r'^x_{i}{2$') and matches(text, 'l{2}o{,}[{,] w')", True),
        (r"matches('\\{a}', r'^\\{a\}$')", True),
        ("score * 2 - 1 == 5 and score / 2 == 1.5", True),
        ("score % 2 == 1 and score // 2 == 1 and -score < 0", True),
        ("max(score, 10) == 10 and min([1, 2]) == 1", True),
        ("lang + '-GB' == 'en-GB'", True),
        ("len(text) > 5\nand lang == 'en'\n", True),
        ("tags", True),
    ],
)
def test_it_keeps_the_rows_for_which_it_holds(expression, kept):
    assert compile_filter(expression)(ROW) is kept


@pytest.mark.parametrize(
    ("expression", "problem", "marked"),
    [
        ("score = 3", "write `==` for `=`", "="),
        ("score > 1 && lang", "write `and` for `&&`", "&"),
        ("(score > 1) | (score < 0)", "write `or` for `|`", "(score > 1) | (score < 0)"),
        ("!lang", "write `not` for `!`", "!"),
        ("score > 1 AND lang == 'en'", "write `and` for `AND`", "A"),
        ("score ORDER 1", "invalid syntax", "O"),
        ("score >\n  1 and", "something is missing at its end", ""),
        ("len(text", "'(' was never closed", "("),
        ("lang == true", "write `True`", "true"),
        ("lenn(text) > 3", "did you mean `len`?", "lenn"),
        ("text.startwith('a')", "did you mean `startswith`?", "text.startwith"),
        ("len(text, 3) > 3", "`len` takes 1 argument, not 2", "len(text, 3)"),
        ("meta.source == 'web'", 'write `["source"]`', "meta.source"),
        ("matches(text, '(a')", "no regular expression: missing )", "'(a'"),
        ("matches(text, lang)", "the pattern is a text in quotes", "lang"),
        ("matches(text, r'(?:a{999}){999}')", "this pattern is too large", "r'(?:a{999}){999}'"),
        ("matches(text, ')' + '(')", "the pattern is a text in quotes", "')' + '('"),
        ("row[lang]", "a column's name is a text", "lang"),
        ("row[1:2]", "a column's name is a text", "1:2"),
        ("(lambda: 1)()", "only functions and methods can be called", "lambda: 1"),
        ("'é' == naïve.x", 'write `["x"]`', "naïve.x"),
        ("lang, score", "write `and` or `or` between them", "lang, score"),
        ("", "it is empty", ""),
    ],
)
def test_a_mistake_is_shown_at_its_place(expression, problem, marked):
    with pytest.raises(UserError) as caught:
        compile_filter(expression, "dataset.sources.a.filter")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("dataset.sources.a.filter is not a valid filter: ")
    assert problem in lines[0]
    if marked:
        start, stop = lines[2].index("^"), len(lines[2])
        assert lines[1][start:stop] == marked


def test_a_long_expression_is_shown_around_the_place():
    with pytest.raises(UserError) as caught:
        compile_filter("score == 1 and " * 30 + "oops.x and " + "score == 1 and " * 30 + "score")
    line, marks = str(caught.value).splitlines()[1:3]
    assert len(line) <= 102
    assert line[marks.index("^") : len(marks)] == "oops.x"


@pytest.mark.parametrize(
    "expression",
    [
        "().__class__.__bases__",
        "text.__class__",
        "text.format(1)",
        "'{}'.format(row)",
        "row.__class__()",
        "row.clear()",
        "tags.append(1)",
        "__import__('os')",
        "open('x')",
        "eval('1')",
        "getattr(text, 'upper')",
        "(lambda: 1)()",
        "[x for x in tags]",
        "any(x for x in tags)",
        "(y := 3)",
        "f'{text}'",
        "2 ** 3",
        "1 << 9",
        "text @ text",
        "{'a': 1}",
        "b'x'",
        "...",
        "1j",
        "len(*tags)",
        "int(x=1)",
        "text if score else lang",
        "text.replace('', text)",
        "text.ljust(10)",
        "score; lang",
        "import os",
        "tags['a':'b', 1]",
        "[*tags]",
        "-" * 9000 + "1",
        "(" * 5000,
        "not " * 2000 + "score",
        "score\0",
        "score or " * 2000 + "score",
    ],
)
def test_nothing_else_is_reached(expression):
    with pytest.raises(UserError, match="is not a valid filter"):
        compile_filter(expression)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("scroe > 1", "there is no 'scroe', .* did you mean 'score'?"),
        ("row['oddname'] == 'x'", "there is no 'oddname', .* did you mean 'odd name'?"),
        ("missing > 1", "`missing > 1` does not work on null and a number"),
        ("score > '1'", "`score > '1'` does not work on a number and text"),
        ("len(score) > 1", r"`len\(score\)` does not work on a number"),
        ("'a' in missing", "`'a' in missing` does not work on text and null"),
        ("missing.startswith('a')", r"`missing.startswith\('a'\)` does not work on null and text"),
        ("tags.get('a')", "does not work on a list and text"),
        ("matches(missing, 'a')", "does not work on null"),
        ("messages[2]['content']", r"`messages\[2\]` is not there"),
        ("meta['sorce']", r"`meta\['sorce'\]` is not there"),
        ("float(text) > 1", "does not work on text"),
        ("score / 0 > 1", "`score / 0` divides by zero"),
        ("text * 1000000000", r"`text \* 1000000000` does not work on text and a number"),
        ("text % 3", "does not work on text and a number"),
        ("missing[:5]", r"`missing\[:5\]` does not work on null and a number"),
    ],
)
def test_a_row_that_it_does_not_go_with_is_bad(expression, problem):
    with pytest.raises(RowError, match=problem):
        compile_filter(expression)(ROW)


def test_an_expression_of_a_hundred_levels_is_computed():
    assert compile_filter("-" * 98 + "score < 0")(ROW) is False


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(.*?a){25}P"])
def test_a_search_that_would_take_years_ends(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.1)
    holds = compile_filter(f"matches(text, '{pattern}')", "dataset.sources.a.filter")
    with pytest.raises(SearchTimeoutError) as caught:
        holds({"text": "a" * 60 + "b"})
    assert str(caught.value).startswith(
        f"dataset.sources.a.filter: `matches(text, '{pattern}')` takes more than 0.1 seconds"
    )
