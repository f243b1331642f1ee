"""Which of a tenant's files a job refuses to read: those that would fill the memory, though their footers lie."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.api import sizes
from jobs.api.sizes import check_sizes
from jobs.plan import Unit
from jobs.reader import UnitReader, find_input
from jobs.spec import JobSpec
from serving.errors import InputError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory than there is, so that the files are soon made."""
    monkeypatch.setattr(sizes, "MOST_HELD", 4 * MIB)


def check(path: Path, table: dict[str, Any], *, options: dict[str, Any] | None = None, **writing: Any) -> None:
    pq.write_table(pa.table(table), path, **writing)
    check_sizes(JobSpec.parse({"input": str(path), "output": "out"} | (options or {})))


@pytest.mark.parametrize(
    "writing",
    [
        {},
        {"use_dictionary": False, "data_page_version": "2.0"},
        {"write_page_index": True, "write_page_checksum": True, "compression": "none"},
        {"compression": "gzip", "row_group_size": 100},
        {"use_dictionary": ["suffix"], "column_encoding": {"prefix": "DELTA_BYTE_ARRAY"}},
        {"data_page_size": 100},
    ],
)
def test_an_ordinary_file_is_read_however_it_is_written(tmp_path: Path, writing: dict[str, Any]) -> None:
    texts = [f"def function_{number}(argument):\n" * (number % 50) for number in range(10_000)]
    table = {"prefix": texts, "suffix": [None] * 5_000 + ["x"] * 5_000, "tags": [["a", "b"], []] * 5_000}
    check(tmp_path / "a.parquet", table, **writing)


def test_a_file_with_a_page_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    bomb = {"prefix": ["x" * 5 * MIB] + ["a"] * 99}
    with pytest.raises(InputError, match=r"a.parquet, row group 0: pages up to column prefix.* more than 4,194,304"):
        check(tmp_path / "a.parquet", bomb, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"5,242,9.. bytes on average"):
        check(tmp_path / "a.parquet", {"prefix": ["x" * 5 * MIB]}, compression="zstd")


def test_columns_fill_the_memory_together_and_those_that_are_not_read_do_not(tmp_path: Path) -> None:
    table = {"prefix": ["a"] * 2, **{f"other{number}": ["x" * MIB, ""] for number in range(5)}}
    with pytest.raises(InputError, match="up to column other3"):
        check(tmp_path / "a.parquet", table)
    check(tmp_path / "a.parquet", table, options={"keep_columns": ["other0", "prefix"]})


def test_a_footer_that_lies_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prefix": ["x" * 5 * MIB]}), path, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(0)
    path.write_bytes(path.read_bytes().replace(varint(group.total_byte_size), varint(9, length=4)))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 9
    with pytest.raises(InputError, match="pages up to column prefix"):
        check_sizes(JobSpec(input=str(path), output="out"))


def varint(value: int, length: int = 1) -> bytes:
    """A number as Thrift's compact protocol writes it, in so many bytes at least."""
    value, found = value << 1, bytearray()
    while value or len(found) < length:
        found.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes([*found[:-1], found[-1] & 0x7F])


def test_pages_that_are_none_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prefix": ["some text"]}), path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\x55" * 20 + data[24:])
    with pytest.raises(InputError, match="column prefix is damaged"):
        check_sizes(JobSpec(input=str(path), output="out"))


def test_a_header_is_read_by_the_type_of_its_page(tmp_path: Path) -> None:
    """As Arrow reads it: what tells of a page of another type may say anything."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prefix": ["some text"]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    assert data[4:6] == b"\x15\x00"  # The header's first field, the type: a data page.
    data[5] = 2 * 3  # Of the second version, whose own struct is not there.
    path.write_bytes(data)
    with pytest.raises(InputError, match="column prefix is damaged"):
        check_sizes(JobSpec(input=str(path), output="out"))


@pytest.mark.parametrize("encoding", ["dictionary", "delta"])
def test_rows_that_all_have_one_long_text_are_read_a_few_at_once(tmp_path: Path, encoding: str) -> None:
    path, delta = tmp_path / "a.parquet", {"use_dictionary": False, "column_encoding": {"prefix": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"prefix": ["x" * MIB] * 200}), path, **(delta if encoding == "delta" else {}))
    assert path.stat().st_size < 200_000
    inputs = find_input(str(path))
    reader = UnitReader(inputs.root, ["prefix"], most_bytes=32 * MIB)
    batches = list(reader.read(inputs.files[0], Unit(0, 0, 0, 200)))
    assert sum(batch.num_rows for batch in batches) == 200
    assert max(batch.num_rows for batch in batches) <= 32
