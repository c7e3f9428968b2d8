"""Settings that do not fit the source, the early check, and what it must not import."""

import subprocess
import sys

import pytest

from luthier.config.schema import DatasetConfig
from luthier.data import check_files
from luthier.data.sources import read_heldout, read_rows
from luthier.errors import UserError

ROWS = [{"prompt": str(number), "completion": "b"} for number in range(4)]


def test_max_rows_takes_the_first(config):
    assert [row.fields["prompt"] for row in read_rows(config(ROWS, max_rows=2))] == ["0", "1"]


def test_heldout_rows_come_from_their_own_file(config, write):
    settings = {"eval": {"path": write("held.jsonl", ROWS[:1])}}
    assert [row.where for row in read_heldout(config(ROWS, **settings))] == ["held.jsonl:1"]
    assert read_heldout(config(ROWS)) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "main"},
            r"dataset\.name=main is for hub datasets, and data\.jsonl is a local file",
        ),
        ({"revision": "v1"}, r"Remove dataset\.revision\."),
        ({"split": "test"}, r"dataset\.split=test is for hub datasets"),
        ({"eval": {"split": "test"}}, r"eval\.path, eval\.share or eval\.count hold rows out"),
        (
            {"eval": {"share": 0.1, "count": 2}},
            r"dataset\.eval\.share and dataset\.eval\.count are set",
        ),
        ({"eval": {"path": "owner/name"}}, r"eval\.path=owner/name is no local"),
        ({"eval": {"path": "held.jsonl"}}, r"there is no file held\.jsonl"),
        ({"eval": {"path": "data.jsonl"}}, "holds every training row too"),
        ({"eval": {"count": 4}}, "leaves none to train on"),
        ({"columns": {"prompt": "x"}}, "maps prompt to 'x'"),
    ],
    ids=[
        "name",
        "revision",
        "split",
        "eval-split",
        "two-ways",
        "eval-hub",
        "eval-missing",
        "eval-same-file",
        "eval-all",
        "columns",
    ],
)
def test_the_early_check_in_words(config, settings, message):
    with pytest.raises(UserError, match=message):
        check_files(config(ROWS, **settings))


def test_a_sound_dataset_passes_the_early_check(config):
    check_files(config(ROWS, eval={"count": 1}))


def test_the_early_check_imports_nothing_heavy(config):
    config(ROWS)
    code = (
        "import sys; from luthier.data import check_files\n"
        "from luthier.config.schema import DatasetConfig\n"
        "check_files(DatasetConfig(path='data.jsonl', eval={'count': 1}))\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert shown.strip() == "set()"


def test_a_name_that_is_neither_file_nor_hub_name():
    with pytest.raises(UserError, match="neither a file here"):
        check_files(DatasetConfig(path="my data/of/rows"))
