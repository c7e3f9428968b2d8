"""Every format's recipe of `luthier init` comes to its first step."""

import pytest

from helpers import format_rows, task_models, train_command


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """The folder of a tiny encoder-decoder model."""
    folder = tmp_path_factory.mktemp("t5")
    task_models.saved(folder, task_models.t5, task_models.unigram())
    return folder


FORMATS = [
    pytest.param(name, marks=pytest.mark.long if name in ("sharegpt", "alpaca") else ())
    for name in format_rows.ROWS
]


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_recipe_runs_as_it_is(format_name, forks, tiny, t5, luthier, tmp_path, workplace):
    model = t5 if format_name == "seq2seq" else tiny / "model"
    format_rows.write_rows(tmp_path / "rows.jsonl", format_name)
    words = format_rows.init_words(format_name)
    code, out, err = luthier("init", "rows.jsonl", *words, "--model", model)
    assert code == 0, err
    assert "median about" in out, "its tokenizer is at hand"
    done = forks.run(tmp_path, "recipe=rows", "dry_run=true", "model.device=cpu")
    assert done == 0, train_command.said(tmp_path)
