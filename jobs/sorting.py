"""An external merge sort of Arrow rows: by any columns, whatever types the others have, in bounded memory.

Rows are sorted in memory in runs, which wait as Parquet files in a temporary folder until they are merged. What came
from Parquet goes through such a file unchanged. (DuckDB, from 1.4 to 2.0, cannot sort texts of more than some 1.3 times
its memory limit, and does not know all of Arrow's types.)
"""

import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import StorageError

FAN_IN = 64
"""How many runs are merged at once. Of more, some are first merged into one."""

COPIES = 4
"""What the sort of a run takes at its height, in runs: rows as they came, in one piece, sorted, and what is written."""


def in_order(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    keys: Sequence[str],
    *,
    memory: int,
    folder: Path,
    check: Callable[[], None] = lambda: None,
) -> Generator[pa.Table, None, None]:
    """All rows, sorted by ``keys`` (columns of bytes, text or whole numbers; nulls last), in tables of some megabytes.

    ``memory`` is in bytes; only where single batches or rows are large beside it is more taken. Rows that agree in
    all keys come in any order. ``folder`` is for the sort alone: what a killed one has left there goes first.
    ``check`` is called between any two steps, and may raise. Raises ``StorageError`` when the folder cannot hold the
    rows.
    """
    own = folder / uuid.uuid4().hex
    try:
        shutil.rmtree(folder, ignore_errors=True)
        own.mkdir(parents=True)
        sort = _Sort(own, schema, keys, memory // COPIES, check)
        runs = [sort.run([rows]) for rows in sort.stretches(batches)]
        while len(runs) > FAN_IN:
            few = min(FAN_IN, len(runs) - FAN_IN + 1)
            runs = [*runs[few:], sort.run(sort.merged(runs[:few]))]
        for table in sort.merged(runs):
            yield from sort.blocks(table)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().rstrip(".").splitlines()[0]
        raise StorageError(
            f"the input cannot be sorted in {folder}: {reason}.", remedy="Give it room, or leave --order global out."
        ) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):  # Another sort that took over may be there.
            folder.rmdir()


class _Sort:
    """What all runs of one sort have in common."""

    def __init__(
        self, folder: Path, schema: pa.Schema, keys: Sequence[str], run_bytes: int, check: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._keys = keys
        self._run_bytes = run_bytes
        self._block_bytes = run_bytes // FAN_IN
        self._check = check

    def stretches(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """As many rows at once as make a run, sorted."""
        held: list[pa.RecordBatch] = []
        size = 0
        for batch in batches:
            self._check()
            held.append(batch)
            size += batch.nbytes
            if size >= self._run_bytes:
                yield self._sorted(pa.Table.from_batches(held, self._schema))
                held, size = [], 0
        if held:
            yield self._sorted(pa.Table.from_batches(held, self._schema))

    def run(self, tables: Iterable[pa.Table]) -> Path:
        """Sorted rows as a file, a row group for each block."""
        path = self._folder / uuid.uuid4().hex
        plain = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(path, self._schema, **plain) as writer:
            for table in tables:
                for block in self.blocks(table):
                    writer.write_table(block, row_group_size=len(block))
        return path

    def blocks(self, table: pa.Table) -> Iterator[pa.Table]:
        """The table in pieces of a block's bytes at most, or of one row."""
        if len(table) <= 1 or table.nbytes <= self._block_bytes:
            yield table
            return
        middle = len(table) // 2
        yield from self.blocks(table[:middle])
        yield from self.blocks(table[middle:])

    def merged(self, runs: Sequence[Path]) -> Iterator[pa.Table]:
        """The rows of all runs, sorted; the files are removed as they are read to their end.

        Of each run one block is held. What is not behind the first of the blocks' ends can be told in full.
        """
        sources = [self._blocks(run) for run in runs]
        heads = [next(source, None) for source in sources]
        while ends := [self._key(head, len(head) - 1) for head in heads if head is not None]:
            self._check()
            end, told = min(ends), []
            for index, (head, source) in enumerate(zip(heads, sources, strict=True)):
                if head is not None:
                    cut = bisect_right(range(len(head)), end, key=partial(self._key, head))
                    told.append(head[:cut])
                    heads[index] = head[cut:] if cut < len(head) else next(source, None)
            yield self._sorted(pa.concat_tables(told))

    def _blocks(self, run: Path) -> Iterator[pa.Table]:
        with pq.ParquetFile(run) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)
        run.unlink()

    def _sorted(self, table: pa.Table) -> pa.Table:
        whole = table.combine_chunks()
        return whole.take(pc.sort_indices(whole, sort_keys=[(key, "ascending") for key in self._keys]))

    def _key(self, table: pa.Table, row: int) -> tuple[tuple[bool, Any], ...]:
        values = (table.column(key)[row].as_py() for key in self._keys)
        return tuple((value is None, value) for value in values)
