"""Parquet and Arrow files: rows without filled-in nulls, JSON columns, times; broken ones."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from luthier.data.rows import BadRow, Row
from luthier.data.sources import arrow
from luthier.errors import UserError


def call(**arguments):
    return {"function": {"name": "f", "arguments": arguments}}


ROWS = [
    {"messages": [{"role": "user", "content": "a"}], "n": 1},
    {"messages": [{"role": "assistant", "tool_calls": [call(x=1), call(y=[{"z": 2}, {"w": 3}])]}]},
    {"messages": [], "n": 3, "tools": '[{"default": null}]'},
]
COLUMNS = {key: [row.get(key) for row in ROWS] for key in ("messages", "n", "tools")}


def parquet(table, path):
    pyarrow.parquet.write_table(table, path)


def arrow_stream(table, path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, 2)


def arrow_file(table, path):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, 2)


WRITERS = {"parquet": parquet, "arrow": arrow_stream, "feather": arrow_file}


@pytest.mark.parametrize("suffix", WRITERS)
class TestEach:
    def test_nulls_that_arrow_filled_in_go(self, read, opened, suffix):
        WRITERS[suffix](pa.table(COLUMNS), f"a.{suffix}")
        assert read(f"a.{suffix}") == [
            Row(row, f"a.{suffix} row {number}") for number, row in enumerate(ROWS)
        ]
        assert opened(f"a.{suffix}").size == 3
        assert opened(f"a.{suffix}", max_rows=2).size == 2

    def test_rows_are_read_a_few_at_a_time(self, opened, fields, suffix, monkeypatch):
        monkeypatch.setattr(arrow, "_ROWS_AT_A_TIME", 7)
        rows = [{"n": number} for number in range(50)]
        WRITERS[suffix](pa.Table.from_pylist(rows), f"a.{suffix}")
        assert fields(f"a.{suffix}") == rows

    def test_columns_of_json_are_values_and_keep_their_nulls(self, fields, suffix):
        cells = [json.dumps({"a": None}), None, '[{"b": [null]}]']
        inner = pa.array(cells[:1], pa.json_())
        lists = pa.ListArray.from_arrays(pa.array([0, None, 1, 1]), inner)
        table = pa.table({"j": pa.array(cells, pa.json_()), "l": lists})
        WRITERS[suffix](table, f"a.{suffix}")
        assert fields(f"a.{suffix}") == [
            {"j": {"a": None}, "l": [{"a": None}]},
            {},
            {"j": [{"b": [None]}], "l": []},
        ]

    def test_kinds_of_columns(self, fields, suffix):
        time = datetime.datetime(2024, 2, 29, 12, 30)
        table = pa.table(
            {
                "time": pa.array([time], pa.timestamp("us")),
                "day": pa.array([time.date()]),
                "map": pa.array(
                    [[("a", [1]), ("b", None)]], pa.map_("string", pa.list_(pa.int64()))
                ),
                "large": pa.array(["x"], pa.large_string()),
                "choice": pa.array(["yes"]).dictionary_encode(),
                "fixed": pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
            }
        )
        WRITERS[suffix](table, f"a.{suffix}")
        (row,) = fields(f"a.{suffix}")
        assert row.pop("time").startswith("2024-02-29 12:30:00")
        assert row == {
            "day": "2024-02-29",
            "map": {"a": [1], "b": None},
            "large": "x",
            "choice": "yes",
            "fixed": [1, 2],
        }

    def test_a_table_without_rows_is_empty(self, read, suffix):
        WRITERS[suffix](pa.table(COLUMNS).slice(0, 0), f"a.{suffix}")
        with pytest.raises(UserError, match=rf"a\.{suffix} is empty: it has no rows"):
            read(f"a.{suffix}")

    def test_among_others_it_is_a_bad_row(self, read, suffix):
        table = pa.table(COLUMNS)
        for name, part in (("1", table), ("2", table.slice(0, 0)), ("3", table)):
            WRITERS[suffix](part, f"{name}.{suffix}")
        found = read(f"*.{suffix}")
        problem = "the file is empty: it has no rows"
        assert [entry for entry in found if isinstance(entry, BadRow)] == [
            BadRow(f"2.{suffix}", problem, "")
        ]
        assert len(found) == 7

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is empty: it has no bytes"),
            (b'{"a": 1}\n', r"cannot be read as an? (Parquet|Arrow) file"),
            (b"FEA1" + b"\0" * 50, r"cannot be read as an? (Parquet|Arrow) file"),
        ],
        ids=["empty", "json", "old-feather"],
    )
    def test_what_is_no_table_is_said(self, write, read, suffix, content, words):
        with pytest.raises(UserError, match=words):
            read(write(f"a.{suffix}", content))

    def test_a_cut_file_is_broken(self, write, read, suffix, tmp_path):
        rows = [{"text": f"{number}" * 50} for number in range(500)]
        WRITERS[suffix](pa.Table.from_pylist(rows), f"a.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        write(f"a.{suffix}", content[: len(content) // 2])
        with pytest.raises(UserError, match=rf"a\.{suffix} cannot be read as an?"):
            read(f"a.{suffix}")


def test_two_columns_of_one_name_are_refused(read):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    arrow_file(table, "a.arrow")
    with pytest.raises(UserError, match="two columns named 'a'"):
        read("a.arrow")


def test_a_map_with_equal_keys_is_refused(read):
    arrow_file(
        pa.table({"m": pa.array([[("a", 1), ("a", 2)]], pa.map_("string", "int64"))}), "a.arrow"
    )
    with pytest.raises(UserError, match="holds a key twice"):
        read("a.arrow")


def test_tables_have_no_options(read, write):
    with pytest.raises(UserError, match=r"dataset\.options\.by: parquet has no options"):
        read(write("a.parquet", b""), options={"by": "line"})
