"""Parquet out: a unit's rows and error rows in input order, each file published whole."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.journal import Sample
from jobs.reader import is_text, texts
from jobs.store import Location, publish

METADATA_KEY = b"spanfill"


class PartWriter:
    """Writes one Parquet file."""

    def __init__(self, stream: Any, compression: str, metadata: dict[str, Any]) -> None:
        self._stream = HashingStream(stream)
        self._compression = compression
        self._metadata = {METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()}
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if self._writer is None:
            schema = table.schema.with_metadata(self._metadata)
            self._writer = pq.ParquetWriter(self._stream, schema, compression=self._compression)
        self._writer.write_table(table.replace_schema_metadata(self._metadata))

    def close(self) -> tuple[str, int]:
        """Write the footer; returns the sha256 of the whole file and its size in bytes."""
        if self._writer is not None:
            self._writer.close()
        return self._stream.sha256.hexdigest(), self._stream.size


@contextmanager
def part_writer(
    location: Location, compression: str, metadata: dict[str, Any], *, once: bool = False
) -> Iterator[PartWriter]:
    """A writer whose file appears when the block ends well; with ``once``, unless it is there already.

    Raises ``StorageError``.
    """
    with publish(location, once=once) as stream:
        yield PartWriter(stream, compression, metadata)


class HashingStream:
    """A binary stream that hashes what passes through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        """Write and hash."""
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return int(self._stream.write(data))

    def flush(self) -> None:
        """Nothing is held back here."""

    def tell(self) -> int:
        """Bytes written so far."""
        return int(self._stream.tell())

    def close(self) -> None:
        """The owner of the stream closes it."""
        self.closed = True


def passed_through(batch: pa.RecordBatch, columns: Iterable[str], rows: Sequence[int]) -> dict[str, Any]:
    """The input's columns at ``rows``, a row as often as it is named."""
    indices = pa.array(rows, pa.int64())
    return {name: storable(batch.column(name)).take(indices) for name in columns}


def plain(batch: pa.RecordBatch, columns: Collection[str]) -> pa.RecordBatch:
    """The batch with these columns as they are stored."""
    names = batch.schema.names
    return pa.record_batch({n: storable(batch.column(n)) if n in columns else batch.column(n) for n in names})


def storable(column: pa.Array) -> pa.Array:
    """The column with views made plain, as ``storable_type`` says."""
    kind = storable_type(column.type)
    return column if kind == column.type else column.cast(kind)


def storable_type(kind: pa.DataType) -> pa.DataType:
    """The type with views, which pyarrow reads but cannot pick rows of, made plain at any depth."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([_storable_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_storable_field(kind.key_field), _storable_field(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_large_list(kind):
        return pa.large_list(_storable_field(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_storable_field(kind.value_field), kind.list_size)
    return pa.list_(_storable_field(kind.value_field)) if pa.types.is_list(kind) else kind


def _storable_field(field: pa.Field) -> pa.Field:
    return field.with_type(storable_type(field.type))


def error_columns(
    batch: pa.RecordBatch,
    columns: Iterable[str],
    rows: Sequence[int],
    samples: Sequence[Sample],
    sources: Sequence[tuple[str, int]],
) -> dict[str, Any]:
    """The rows that could not be done, with why; text that is not UTF-8 is shown with replacement characters.

    Dictionary-encoded text comes out plain, so that every batch has one schema whatever it holds.
    """
    found = passed_through(batch, columns, rows)
    return {name: _readable(column) for name, column in found.items()} | {
        "source_file": pa.array([name for name, _ in sources], pa.string()),
        "source_row": pa.array([row for _, row in sources], pa.int64()),
        "error_code": pa.array([s.error_code for s in samples], pa.string()),
        "error_message": pa.array([s.error_message for s in samples], pa.string()),
        "attempts": pa.array([s.attempts for s in samples], pa.int32()),
    }


def _readable(column: pa.Array) -> pa.Array:
    if not is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = texts(column)
    if not any(isinstance(value, UnicodeDecodeError) for value in values):
        return column
    shown = [v.object.decode(errors="replace") if isinstance(v, UnicodeDecodeError) else v for v in values]
    return pa.array(shown, pa.large_string()).cast(column.type)
