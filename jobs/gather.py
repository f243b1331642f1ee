"""``--order global``: a copy of the input in which rows that share a prompt's beginning stand together.

Units are stretches of the input, so rows of one source file that an earlier shuffle has scattered over it never meet in
an engine's prefix cache. One external sort brings them together. The copy is a file of the job's state; where each
row came from goes with it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.digest import as_bytes
from jobs.ledger import STATE
from jobs.plan import InputFile, Unit
from jobs.reader import ORIGIN_FILE, ORIGIN_ROW, InputSet, UnitReader, find_input, inputs_at, is_text
from jobs.sorting import in_order
from jobs.spec import JobSpec
from jobs.store import Location, exists, publish
from jobs.writer import storable, storable_type
from serving.formats import Format

ROW_GROUP = 8_192
SORT_MEMORY = 2 << 30
"""How many bytes the sort may hold in memory; the rest waits in a temporary folder."""


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


def gather(
    spec: JobSpec, fmt: Format, inputs: InputSet, output: Location, *, check: Callable[[], None] = lambda: None
) -> None:
    """Write the gathered copy unless it is there.

    It is sorted by what comes first in a prompt of this format. ``check`` is called between any two
    steps, and may raise. Raises ``InputChangedError``, and ``StorageError`` when the copy cannot be sorted or written.
    """
    copy = _copy(output)
    if exists(copy):
        return
    schema = _plain(inputs.schema).append(pa.field(ORIGIN_FILE, pa.string())).append(pa.field(ORIGIN_ROW, pa.int64()))
    rows, keys, folder = _rows(inputs, schema, spec.limit), _keys(spec, fmt, schema), _sorting_folder(output)
    ordered = in_order(rows, _sortable(schema), keys, memory=SORT_MEMORY, folder=folder, check=check)
    with (
        closing(ordered),
        publish(copy) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for table in ordered:
            writer.write_table(_restored(table, schema), row_group_size=ROW_GROUP)


def _sorting_folder(output: Location) -> Path:
    """In the job's state; of a job in an object store in ``TMPDIR``, where the job finds it again after a kill."""
    if output.is_local:
        return Path(output.join(STATE, ".sort.tmp").path)
    name = hashlib.blake2b(f"{os.getuid()} {output.uri}".encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir(), f"spanfill-sort-{name}")


def _keys(spec: JobSpec, fmt: Format, schema: pa.Schema) -> list[str]:
    roles = [spec.column(role) for role in fmt.spec.text_order]
    return [*(role for role in roles if role in schema.names), ORIGIN_FILE, ORIGIN_ROW]


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
    return pa.record_batch([as_bytes(c) if is_text(c.type) else storable(c) for c in columns], schema=_sortable(schema))


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with dictionaries of text, and with views, which pyarrow cannot sort, made plain."""
    fields = [f.with_type(pa.large_string() if is_text(f.type) else storable_type(f.type)) for f in schema]
    return pa.schema([f.with_nullable(True) for f in fields])


def _sortable(schema: pa.Schema) -> pa.Schema:
    """Text as bytes: text that is not UTF-8 has no order otherwise, and a bad row is to become an error row."""
    return pa.schema([f.with_type(pa.large_binary()) if is_text(f.type) else f for f in schema])


def _restored(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table([rows.column(f.name).cast(f.type, safe=False) for f in schema], schema=schema)
