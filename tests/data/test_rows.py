"""Settings in errors can be pasted: a shell and Hydra read back what was meant."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from luthier.data.rows import format_setting

VALUES = [
    "Question", "a b", ";", "|", "\t", ",", ":", "'", '"', "\\", 'say "so"', '\\"', "back\\", "7",
    "1.5", "-1", "True", "nan", "", "translation.en", "Fräge", "日本", "a=b", "{a}", "[a]", "(a)",
    "a,b", "$HOME", "`ls`", "!x", "#x", "a/b", "it's", "100%", "*", "a\\ b",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_from_shell_and_hydra(value):
    (word,) = shlex.split(format_setting("dataset.options.delimiter", value))
    override = OverridesParser.create().parse_override(word)
    assert override.key_or_group == "dataset.options.delimiter"
    assert override.value() == value and isinstance(override.value(), str)


def test_lists_and_typed_words():
    (word,) = shlex.split(format_setting("dataset.remove_columns", ["a b", "c"]))
    assert OverridesParser.create().parse_override(word).value() == ["a b", "c"]
    assert format_setting("dataset.json_replies", "true") == "dataset.json_replies=true"
    assert format_setting("dataset.options.delimiter", ";") == """'dataset.options.delimiter=";"'"""
