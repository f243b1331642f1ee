"""Parquet out: a unit's rows and error rows in input order, each file published whole."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
    return {name: _storable(batch.column(name)).take(indices) for name in columns}


def _storable(column: pa.Array) -> pa.Array:
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    return column


def error_columns(
    batch: pa.RecordBatch, columns: Iterable[str], rows: Sequence[int], samples: Sequence[Sample], source_file: str
) -> dict[str, Any]:
    """The rows that could not be done, with why; text that is not UTF-8 is shown with replacement characters."""
    found = passed_through(batch, columns, rows)
    return {name: _readable(column) for name, column in found.items()} | {
        "source_file": pa.array([source_file] * len(samples), pa.string()),
        "source_row": pa.array([s.row for s in samples], pa.int64()),
        "error_code": pa.array([s.error_code for s in samples], pa.string()),
        "error_message": pa.array([s.error_message for s in samples], pa.string()),
        "attempts": pa.array([s.attempts for s in samples], pa.int32()),
    }


def _readable(column: pa.Array) -> pa.Array:
    if not is_text(column.type):
        return column
    values = texts(column)
    if not any(isinstance(value, UnicodeDecodeError) for value in values):
        return column
    shown = [v.object.decode(errors="replace") if isinstance(v, UnicodeDecodeError) else v for v in values]
    return pa.array(shown, pa.large_string()).cast(
        column.type if not pa.types.is_dictionary(column.type) else pa.string()
    )
