"""Tables: what goes in comes out, whatever the record batches, in memory that stays flat."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from luthier.data.store import EntryWriter, Ragged, TokenTable
from luthier.data.store import table as writer


@pytest.fixture
def table(tmp_path):
    """A table of these appended columns."""

    def table(*appended):
        made = EntryWriter(tmp_path)
        target = made.table("rows")
        for columns in appended:
            target.append(columns)
        made.close()
        return TokenTable(tmp_path / "rows.arrow")

    return table


FIRST = {
    "input_ids": [[1, 2, 3], [], [4]],
    "labels": [[-100, 2, 3], [], [2**31 - 1]],
    "label": [7, 8, -9],
    "weight": [0.5, 1.0, 2.0],
    "good": [True, False, True],
    "text": ["Grüße", "", "c"],
    "json": [b"{}", b"\xff\0", b""],
}
SECOND = {
    "input_ids": Ragged(np.array([9, 9, 5, 6, 7, 0]), np.array([2, 4, 5])),
    "labels": [np.array([1, 2]), np.array([3])],
    "label": np.array([1, 2]),
    "weight": np.array([3.0, 4.0]),
    "good": np.array([False, True]),
    "text": ("d", "e"),
    "json": [b"d", b"e"],
}
ROWS = [
    ([1, 2, 3], [-100, 2, 3], 7, 0.5, True, "Grüße", b"{}"),
    ([], [], 8, 1.0, False, "", b"\xff\0"),
    ([4], [2**31 - 1], -9, 2.0, True, "c", b""),
    ([5, 6], [1, 2], 1, 3.0, False, "d", b"d"),
    ([7], [3], 2, 4.0, True, "e", b"e"),
]


def plain(row):
    return tuple(v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for v in row.values())


@pytest.mark.parametrize("batch_bytes", [1, 2**20], ids=["batch-per-append", "one-batch"])
def test_what_goes_in_comes_out(table, monkeypatch, batch_bytes):
    monkeypatch.setattr(writer, "BATCH_BYTES", batch_bytes)
    found = table(FIRST, SECOND)
    assert len(found) == 5
    assert found.columns == tuple(FIRST)
    assert [plain(found.row(position)) for position in range(5)] == ROWS
    assert [plain(row) for row in found.rows(np.array([4, 0, -2]))] == [ROWS[4], ROWS[0], ROWS[3]]
    assert found.lengths.tolist() == [3, 0, 1, 2, 1]
    assert found.lengths.dtype == np.int32
    assert found.lengths_of("labels").tolist() == [3, 0, 1, 2, 1]
    assert found.column("label").tolist() == [7, 8, -9, 1, 2]
    assert found.values("text", [3, 0, -1]) == ["d", "Grüße", "e"]


def test_token_rows_are_views_that_cannot_be_written(table):
    ids = table(FIRST).row(0)["input_ids"]
    assert ids.dtype == np.int32
    assert not ids.flags.owndata and not ids.flags.writeable


@pytest.mark.parametrize("position", [3, -4, 10**12])
def test_a_row_that_is_not_there(table, position):
    with pytest.raises(IndexError, match=f"row {position} of 3 rows"):
        table(FIRST).row(position)


@pytest.mark.parametrize("appended", [[], [{"input_ids": [], "text": []}]], ids=["none", "empty"])
def test_a_table_without_rows(table, appended):
    found = table(*appended)
    assert len(found) == 0
    assert found.columns == ()
    assert found.lengths.tolist() == []
    assert found.column("label").tolist() == []
    assert found.rows([]) == []


def test_a_worker_process_maps_the_same_file(table, tmp_path):
    held = pickle.dumps(table(FIRST, SECOND))
    assert len(held) < 1000
    (tmp_path / "table.pickle").write_bytes(held)
    code = "import pickle; print(pickle.load(open('table.pickle', 'rb')).row(3)['input_ids'])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "[5 6]"


@pytest.mark.parametrize(
    ("appended", "error", "message"),
    [
        ([{"a": [1], "b": [1, 2]}], ValueError, r"columns of \[1, 2\] rows in one append"),
        ([{}], ValueError, "columns of"),
        ([{"a": [[1, 2**31]]}], TypeError, "no 32-bit number"),
        ([{"a": [[1.5]]}], TypeError, "no 32-bit number"),
        ([{"a": [np.array([2**40])]}], TypeError, "no 32-bit number"),
        ([{"a": [1, None]}], TypeError, "None"),
        ([{"a": ["b", None]}], TypeError, "None"),
        ([{"a": [1]}, {"a": ["b"]}], TypeError, "behind columns"),
        ([{"a": [1]}, {"b": [1]}], TypeError, "behind columns"),
    ],
    ids=[
        "lengths",
        "no-columns",
        "large-id",
        "fraction",
        "large-numpy-id",
        "none-number",
        "none-text",
        "other-type",
        "other-name",
    ],
)
@pytest.mark.parametrize("batch_bytes", [1, 2**20], ids=["batch-per-append", "one-batch"])
def test_columns_that_do_not_go_together(table, monkeypatch, batch_bytes, appended, error, message):
    monkeypatch.setattr(writer, "BATCH_BYTES", batch_bytes)
    with pytest.raises(error, match=message):
        table(*appended)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden"])
def test_a_name_that_names_no_file(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a file's name"):
        EntryWriter(tmp_path).table(name)


FLAT = """
import resource, sys
from pathlib import Path
import numpy as np
from luthier.data.store import EntryWriter, TokenTable

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

rows = [list(range(200))] * 500
writer = EntryWriter(Path("."))
writer.table("rows").append({"input_ids": rows, "labels": rows})
writer.table("rows").append({"input_ids": rows * 20, "labels": rows * 20})
before = peak()
for _ in range(140):
    writer.table("rows").append({"input_ids": rows, "labels": rows})
writer.close()
grown = peak() - before
size = Path("rows.arrow").stat().st_size / 2**20
print(size, grown)
"""


def test_memory_stays_flat_while_a_table_is_written(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", FLAT], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    size, grown = map(float, shown.stdout.split())
    assert size > 100
    assert grown < 32
