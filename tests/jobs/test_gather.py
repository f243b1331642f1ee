from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.gather import gather, inputs_of
from jobs.reader import ORIGIN_FILE, ORIGIN_ROW
from jobs.spec import JobSpec
from jobs.store import locate
from serving.formats import FORMATS, Format, load_format
from tests.conftest import WriteRows
from tests.serving.test_formats import letters_for

PREFIXES = ["b", "a", "b2", "a", None, "é", "a\x00"]


def gathered(source: Path, output: Path, fmt: Format | None = None, **more: Any) -> pa.Table:
    spec = JobSpec(input=str(source), output=str(output), order="global", **more)
    inputs = inputs_of(spec, locate(str(output)))
    gather(spec, fmt or load_format("codegen25"), inputs, locate(str(output)))
    found = inputs_of(spec, locate(str(output)))
    return pq.read_table(found.files[0].path)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_rows_are_sorted_by_their_prompts_beginning_whatever_holds_the_text(
    kind: pa.DataType, write_rows: WriteRows, tmp_path: Path
) -> None:
    text = pa.array(PREFIXES)
    column = text.dictionary_encode() if pa.types.is_dictionary(kind) else text.cast(kind)
    source = write_rows(id=range(7), prefix=column, **{'odd "name"': [1.5] * 7})
    found = gathered(source, tmp_path / "out")
    rows = found.column(ORIGIN_ROW).to_pylist()
    assert rows == [1, 3, 6, 0, 2, 5, 4]
    assert found.column("prefix").to_pylist() == [PREFIXES[row] for row in rows]
    assert found.column("id").to_pylist() == rows
    assert set(found.column(ORIGIN_FILE).to_pylist()) == {"rows.parquet"}


def test_columns_that_are_kept_keep_their_types(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows(
        prefix=["b", "a"],
        uuid=pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"1" * 16, b"2" * 16], pa.binary(16))),
        nothing=pa.nulls(2),
        took=pa.array([1, 2], pa.duration("ms")),
        price=pa.array([1, 2]).cast(pa.decimal256(50, 2)),
        tags=[[{"name": "x"}], []],
        views=pa.array([["x"], None], pa.large_list(pa.string_view())),
    )
    given, found = pq.read_table(source), gathered(source, tmp_path / "out")
    for name in ("uuid", "nothing", "took", "price", "tags"):
        assert found.schema.field(name).type == given.schema.field(name).type
        assert found.column(name).to_pylist() == given.column(name).to_pylist()[::-1]
    assert found.column("views").to_pylist() == [None, ["x"]]


def test_text_that_is_not_utf8_stays_as_it_is(write_rows: WriteRows, tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"b\xff")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    found = gathered(write_rows(prefix=broken), tmp_path / "out")
    assert found.column("prefix").cast(pa.large_binary()).to_pylist() == [b"b", b"\xff"]


def test_a_job_in_an_object_store_sorts_in_the_temporary_folder(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    output = locate(f"memory://{uuid4().hex}/out")
    spec = JobSpec(input=str(write_rows(prefix=["b", "a"])), output=output.uri, order="global")
    seen: list[str] = []

    def look() -> None:
        seen.extend(path.name for path in (tmp_path / "temporary").iterdir())

    gather(spec, load_format("codegen25"), inputs_of(spec, output), output, check=look)
    (file,) = inputs_of(spec, output).files
    assert file.rows == 2
    assert {name[:14] for name in seen} == {"spanfill-sort-"}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_limit_and_a_column_with_quotes_in_its_name(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows(**{'the "text"': ["c", "b", "a"]})
    found = gathered(source, tmp_path / "out", columns={"prefix": 'the "text"'}, limit=2)
    assert found.column('the "text"').to_pylist() == ["b", "c"]


def test_a_format_that_begins_with_the_suffix_is_sorted_by_it(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows(prefix=["b", "a", "c", "d"], suffix=["y", "y", "x", None])
    found = gathered(source, tmp_path / "out", Format(FORMATS["codestral"], letters_for("codestral")))
    assert found.column("prefix").to_pylist() == ["c", "a", "b", "d"]
