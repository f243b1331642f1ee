"""Input files -> units: the deterministic list of row ranges that is a job's grain of commitment."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

UNIT_BYTES = 256 << 20
"""A unit's uncompressed input at most, so that rows of megabytes do not fill the memory."""

UNIT_TOKENS = 64 << 20
"""Tokens of a unit's samples at most, 256 MiB: they are held until its part is written."""

SAMPLE_TOKENS = 64
"""What else is held of a sample weighs as much as so many tokens."""

SCHEMA = pa.schema([("file", pa.int32()), ("start", pa.int64()), ("stop", pa.int64()), ("retries", pa.int32())])


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file: ``name`` is relative to the job's input, ``digest`` the sha256 of its footer.

    ``modified`` is when it last changed, in seconds since 1970: a hint that its content may have changed, no proof.
    """

    path: str
    name: str
    rows: int
    size: int
    uncompressed: int
    digest: str
    modified: float = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another file, as a job's identity has it."""
        return {"name": self.name, "rows": self.rows, "size": self.size, "footer": self.digest}


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``start`` to ``stop`` of input file number ``file``; ``index`` names its part.

    ``retries`` is the unit whose error rows this one does again, and nothing else; -1 for an ordinary unit.
    """

    index: int
    file: int
    start: int
    stop: int
    retries: int = -1

    @property
    def rows(self) -> int:
        """Input rows."""
        return self.stop - self.start


def input_bytes(unit: Unit, file: InputFile) -> int:
    """About what a unit of the file takes uncompressed."""
    return file.uncompressed // max(1, file.rows) * unit.rows


def plan_units(files: Iterable[InputFile], *, rows_per_part: int, limit: int | None = None) -> Iterator[Unit]:
    """Cut each file into even units of ``rows_per_part`` rows and ``UNIT_BYTES`` at most, from its footer alone.

    An input without rows is one unit without rows: its part holds the schema that readers need.
    """
    index, left = 0, limit
    for number, file in enumerate(files):
        rows = file.rows if left is None else min(file.rows, left)
        left = None if left is None else left - rows
        row_bytes = max(1, file.uncompressed // max(1, file.rows))
        size = max(1, min(rows_per_part, UNIT_BYTES // row_bytes))
        for start in range(0, rows, size):
            yield Unit(index, number, start, min(start + size, rows))
            index += 1
    if index == 0:
        yield Unit(0, 0, 0, 0)


def dump_plan(units: Iterable[Unit]) -> bytes:
    """The plan as one Arrow IPC file; a unit's index is its row."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        rows: list[tuple[int, int, int, int]] = []
        for unit in units:
            rows.append((unit.file, unit.start, unit.stop, unit.retries))
            if len(rows) == 65_536:
                writer.write_batch(_batch(rows))
                rows = []
        writer.write_batch(_batch(rows))
    return sink.getvalue()


def load_plan(data: bytes) -> list[Unit]:
    """The units of a stored plan."""
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    columns = (table.column(name).to_pylist() for name in SCHEMA.names)
    return [Unit(index, *row) for index, row in enumerate(zip(*columns, strict=True))]


def _batch(rows: list[tuple[int, int, int, int]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.record_batch([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)
