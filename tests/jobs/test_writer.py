"""Columns that pass through, and what an error file says of rows that are not text."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.journal import Sample
from jobs.store import locate
from jobs.writer import error_columns, part_writer, passed_through

VIEW = pa.string_view()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (VIEW, ["a", None]),
        (pa.binary_view(), [b"\xff", None]),
        (pa.list_(VIEW), [["a", None], None]),
        (pa.large_list(VIEW), [["a"], []]),
        (pa.list_(VIEW, 2), [["a", "b"], None]),
        (pa.struct([pa.field("x", VIEW), pa.field("y", pa.int8())]), [{"x": "a", "y": 1}, None]),
        (pa.map_(pa.string(), VIEW), [[("a", "b")], None]),
        (pa.list_(pa.struct([pa.field("x", pa.list_(VIEW), nullable=False)])), [[{"x": ["a"]}], None]),
        (pa.list_(pa.dictionary(pa.int32(), pa.string())), [["a"], None]),
    ],
    ids=str,
)
def test_views_pass_through_at_any_depth(tmp_path: Path, kind: pa.DataType, values: list[Any]) -> None:
    batch = pa.record_batch({"x": pa.array(values, kind)})
    with part_writer(locate(str(tmp_path / "part.parquet")), "zstd", {}) as writer:
        writer.write(pa.table(passed_through(batch, ["x"], [1, 0, 0])))
        writer.close()
    assert pq.read_table(tmp_path / "part.parquet").column("x").to_pylist() == [values[1], values[0], values[0]]


def test_clean_and_dirty_batches_of_a_dictionary_have_one_schema(tmp_path: Path) -> None:
    words = pa.array([b"fine", b"bad \xff"], pa.binary())
    dirty = pa.Array.from_buffers(pa.string(), 2, words.buffers())
    table = tmp_path / "errors.parquet"
    with part_writer(locate(str(table)), "zstd", {}) as writer:
        for dictionary, numbers in ((pa.array(["fine"]), [None, 0]), (dirty, [0, 1]), (dirty, [])):
            prefix = pa.DictionaryArray.from_arrays(pa.array(numbers * 512, pa.int32()), dictionary)
            rows = [0, 1] if numbers else []
            samples = [Sample(row, 0, [], error_code="bad_input", error_message="?") for row in rows]
            batch = pa.record_batch({"prefix": prefix})
            writer.write(
                pa.table(error_columns(batch, ["prefix"], rows, samples, [("a.parquet", row) for row in rows]))
            )
        writer.close()
    found = pq.read_table(table).column("prefix")
    assert (found.type, found.to_pylist()) == (pa.string(), [None, "fine", "fine", "bad \ufffd"])
