"""`luthier init`: what it says of rows, what it writes, and that it loads."""

import json

import pytest

from helpers import format_rows
from helpers.image_files import image_bytes
from luthier.config import load_config
from luthier.data import check_sources

MODEL = ("--model", "owner/name")
"""A hub name that is not on this machine, so that no tokenizer is loaded."""


@pytest.mark.parametrize("format_name", format_rows.ROWS)
def test_every_format_ends_in_a_recipe_that_loads(format_name, luthier, tmp_path, workplace):
    format_rows.write_rows(tmp_path / "rows.jsonl", format_name)
    code, out, err = luthier("init", "rows.jsonl", *format_rows.init_words(format_name), *MODEL)
    assert code == 0, err
    method = format_rows.METHODS.get(format_name, "sft")
    assert "24 rows, " in out and f"(type {format_name})" in out
    assert f"\nwritten recipes/rows.yaml: trainer={method}, owner/name" in out
    assert max(map(len, out.splitlines())) <= 80
    config = load_config(["recipe=rows"]).config
    assert config.trainer.method == method and config.dataset.type == format_name
    check_sources(config.dataset, method)


def test_every_key_of_the_recipe_has_a_comment(luthier, tmp_path, workplace):
    format_rows.write_rows(tmp_path / "rows.jsonl", "messages")
    luthier("init", "rows.jsonl", *MODEL)
    lines = (tmp_path / "recipes" / "rows.yaml").read_text().splitlines()
    assert lines[0] == "# Supervised fine-tuning on rows.jsonl: 24 rows, owner/name."
    assert lines[2] == "# Command: luthier train recipe=rows"
    assert max(map(len, lines)) <= 100
    above = ""
    for line in lines:
        is_setting = ": " in line and not line.lstrip().startswith(("#", "- "))
        assert not is_setting or "  # " in line or above.lstrip().startswith("# "), line
        above = line


def test_what_is_odd_is_said_and_left_out(luthier, workplace):
    good = [format_rows.ROWS["messages"](number) for number in range(30)]
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}
    human = {
        "messages": [{"role": "human", "content": "Hi"}, {"role": "assistant", "content": "x"}]
    }
    lines = [json.dumps(row) for row in [*good, good[0], empty, human]] + ["{not json"]
    workplace("rows.jsonl", "\n".join(lines))
    code, out, _ = luthier("init", "rows.jsonl", *MODEL)
    said = " ".join(out.split())
    assert code == 0
    assert "1 row cannot be read; the recipe leaves it out. The first: rows.jsonl:34: " in said
    assert "1 row repeats an earlier one (rows.jsonl:31); the recipe leaves it out." in said
    assert "1 row has an empty reply (rows.jsonl:32); the recipe leaves it out" in said
    assert "the role 'human' (rows.jsonl:33); `user` is most likely meant" in said
    config = load_config(["recipe=rows"]).config
    assert (config.dataset.on_bad_row, config.dataset.deduplicate) == ("drop", "exact")
    assert (config.chat.empty_replies, config.chat.on_lost) == ("drop", "drop")


def test_a_wrong_role_in_every_row_is_not_left_out(luthier, workplace):
    rows = [
        {"messages": [{"role": "human", "content": format_rows.text(n)},
                      {"role": "assistant", "content": "x"}]}
        for n in range(20)
    ]  # fmt: skip
    workplace("rows.jsonl", "\n".join(map(json.dumps, rows)))
    _, out, _ = luthier("init", "rows.jsonl", *MODEL)
    assert "training stops there" in " ".join(out.split())
    assert load_config(["recipe=rows"]).config.chat.on_lost == "error"


def test_texts_that_hold_a_place_for_an_image(luthier, workplace):
    question = {"role": "user", "content": "<image>What?"}
    row = {"messages": [question, {"role": "assistant", "content": "A lute."}], "images": ["a.png"]}
    workplace("rows.jsonl", json.dumps(row)).with_name("a.png").write_bytes(image_bytes())
    _, out, err = luthier("init", "rows.jsonl", *MODEL)
    assert "1 with images" in out, err
    assert load_config(["recipe=rows"]).config.dataset.image_placeholder == "<image>"


def test_columns_of_no_format_are_answered_with_the_users_own_names(luthier, workplace):
    rows = "Nr;Frage;Antwort\n1;Wie alt?;Acht.\n2;Wer?;Anna.\n"
    workplace("faq.csv", rows)
    code, _, err = luthier("init", "faq.csv", *MODEL)
    settings = "dataset.columns.prompt=Frage dataset.columns.completion=Antwort"
    assert code == 2 and f"If 'Frage' is a prompt and 'Antwort' its reply: {settings}." in err
    code, out, err = luthier("init", "faq.csv", *settings.split(), *MODEL)
    assert code == 0 and "not used  Nr" in out, err
    columns = load_config(["recipe=faq"]).config.dataset.columns
    assert columns == {"prompt": "Frage", "completion": "Antwort"}


def test_a_table_without_a_header_is_answered_with_one(luthier, workplace):
    workplace("faq.csv", "Wie alt?,Acht.\nWer?,Anna.\n")
    code, _, err = luthier("init", "faq.csv", *MODEL)
    header = "'dataset.options.header=[prompt,completion]'"
    assert code == 2 and f"If the first line is a row and no header: {header}." in err
    code, out, err = luthier("init", "faq.csv", header.strip("'"), *MODEL)
    assert code == 0 and "faq.csv: 2 rows, conversations" in out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes one file"),
        (["rows.jsonl", "other.jsonl"], "Several files are a glob in quotes"),
        (["rows.jsonl", "trainer=dpo"], "settings of the dataset"),
        (["rows.jsonl", "dataset.eval.share=0.1"], "dataset.eval.share: change it in the recipe"),
        (["rows.jsonl", "dataset.colums.prompt=a"], "dataset.colums"),
        (["missing.jsonl"], "missing.jsonl"),
        (["rows.josnl"], "there is no file rows.josnl. Did you mean rows.jsonl?"),
        ([""], "takes one file"),
        (["rows.jsonl", "--model", "./none"], "there is no such folder"),
        (["rows.jsonl", "-o", "mine.txt"], "is a .yaml file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_said_in_words(words, message, luthier, tmp_path, workplace):
    format_rows.write_rows(tmp_path / "rows.jsonl", "messages")
    code, _, err = luthier("init", *words)
    assert code == 2 and message in err
    assert not (tmp_path / "recipes").exists()


def test_a_recipe_that_hides_a_bundled_one_is_named(luthier, tmp_path, workplace):
    format_rows.write_rows(tmp_path / "quickstart.jsonl", "messages")
    _, out, _ = luthier("init", "quickstart.jsonl", *MODEL)
    assert "recipe=quickstart now means recipes/quickstart.yaml, and no longer" in out


def test_nothing_is_overwritten_and_another_name_is_possible(luthier, tmp_path, workplace):
    format_rows.write_rows(tmp_path / "rows.jsonl", "messages")
    recipe = workplace("recipes/rows.yaml", "seed: 1\n")
    code, _, err = luthier("init", "rows.jsonl", *MODEL)
    assert (
        code == 2 and "exists, and is not overwritten" in err and recipe.read_text() == "seed: 1\n"
    )
    code, out, _ = luthier("init", "rows.jsonl", *MODEL, "-o", "elsewhere/mine.yaml")
    assert code == 0 and "LUTHIER_RECIPES=elsewhere luthier train recipe=mine" in out
