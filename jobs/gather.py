"""``--order global``: a copy of the input in which rows that share a prompt's beginning stand together.

Units are stretches of the input, so rows of one source file that an earlier shuffle has scattered over it never meet in
an engine's prefix cache. One external sort, which DuckDB does on disk when memory is short, brings them together. The
copy is a file of the job's state; where each row came from goes with it.
"""

import tempfile
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.digest import as_bytes
from jobs.ledger import STATE
from jobs.plan import InputFile, Unit
from jobs.reader import ORIGIN_FILE, ORIGIN_ROW, InputSet, UnitReader, find_input, inputs_at, is_text
from jobs.spec import JobSpec
from jobs.store import Location, exists, publish
from serving.errors import StorageError
from serving.formats import Format

ROW_GROUP = 8_192
SORT_MEMORY = "2GB"
"""What the sort may hold in memory; beyond, it goes to a temporary folder."""


def inputs_of(spec: JobSpec, output: Location) -> InputSet:
    """The rows that a job's units count: its input, or the gathered copy where the job has one.

    Raises ``InputError``.
    """
    copy = _copy(output)
    if spec.order == "global" and exists(copy):
        return inputs_at(copy, named=str(copy))
    return find_input(spec.input, patience=spec.store_patience)


def _copy(output: Location) -> Location:
    return output.join(STATE, "gathered.parquet")


def gather(spec: JobSpec, fmt: Format, inputs: InputSet, output: Location) -> None:
    """Write the gathered copy unless it is there.

    It is sorted by what comes first in a prompt of this format. Raises ``StorageError`` when it cannot be written.
    """
    copy = _copy(output)
    if exists(copy):
        return
    schema = _plain(inputs.schema).append(pa.field(ORIGIN_FILE, pa.string())).append(pa.field(ORIGIN_ROW, pa.int64()))
    reader = pa.RecordBatchReader.from_batches(_sortable(schema), _rows(inputs, schema, spec.limit))
    with tempfile.TemporaryDirectory(prefix="spanfill-sort-") as folder, duckdb.connect() as database:
        database.execute(f"SET temp_directory = '{folder}'; SET memory_limit = '{SORT_MEMORY}'")
        try:
            ordered = database.from_arrow(reader).order(_keys(spec, fmt, schema)).fetch_record_batch(ROW_GROUP)
            with publish(copy) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                for batch in ordered:
                    writer.write_batch(_restored(batch, schema), row_group_size=ROW_GROUP)
        except duckdb.Error as error:
            raise StorageError(
                f"the input cannot be sorted: {error}.", remedy="Give TMPDIR more room, or leave --order global out."
            ) from error


def _keys(spec: JobSpec, fmt: Format, schema: pa.Schema) -> str:
    roles = [spec.column(role) for role in fmt.text_order]
    names = [*(role for role in roles if role in schema.names), ORIGIN_FILE, ORIGIN_ROW]
    return ", ".join('"' + name.replace('"', '""') + '"' for name in names)


def _rows(inputs: InputSet, schema: pa.Schema, limit: int | None) -> Iterator[pa.RecordBatch]:
    left = inputs.rows if limit is None else min(limit, inputs.rows)
    reader = UnitReader(inputs.root, inputs.schema.names)
    for file in inputs.files:
        row = 0
        for batch in reader.read(file, Unit(0, 0, 0, min(file.rows, left))):
            yield _with_origin(batch, schema, file, row)
            row += batch.num_rows
        left -= row


def _with_origin(batch: pa.RecordBatch, schema: pa.Schema, file: InputFile, first: int) -> pa.RecordBatch:
    columns = [batch.column(name) for name in batch.schema.names]
    columns.append(pa.array([file.name] * batch.num_rows))
    columns.append(pa.array(range(first, first + batch.num_rows)))
    return pa.record_batch([as_bytes(c) if is_text(c.type) else c for c in columns], schema=_sortable(schema))


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with dictionary and view columns of text made plain."""
    fields = [f.with_type(pa.large_string()) if is_text(f.type) else f for f in schema]
    return pa.schema([f.with_nullable(True) for f in fields])


def _sortable(schema: pa.Schema) -> pa.Schema:
    """Text as bytes: DuckDB refuses text that is not UTF-8, and a bad row is to become an error row."""
    return pa.schema([f.with_type(pa.large_binary()) if is_text(f.type) else f for f in schema])


def _restored(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [batch.column(f.name).cast(f.type, safe=False) for f in schema]
    return pa.record_batch(columns, schema=schema)
