"""Sorts some mebibytes of random texts with 100 MiB of memory and prints its greatest resident set, in bytes.

The texts are all of 4 kB ("even"), or of 40 and, the last of all, 100,000 bytes ("long together").
"""

import random
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jobs.sorting import in_order

SCHEMA = pa.schema([("text", pa.large_binary()), ("row", pa.int64())])
SIZES = {"even": [4_096] * 256, "long together": [40] * 2_000 + [100_000] * 10}


def batches(sizes: list[int], mebibytes: int) -> Iterator[pa.RecordBatch]:
    """Batches of a mebibyte."""
    source = random.Random(0)
    for first in range(0, mebibytes * len(sizes), len(sizes)):
        texts = [(b"z" if size > 4_096 else b"a") + source.randbytes(size) for size in sizes]
        yield pa.record_batch([texts, range(first, first + len(sizes))], schema=SCHEMA)


last = b""
with tempfile.TemporaryDirectory() as folder:
    made = batches(SIZES[sys.argv[1]], int(sys.argv[2]))
    for table in in_order(made, SCHEMA, ["text", "row"], memory=100 << 20, folder=Path(folder, "sort")):
        texts = table.column("text").to_pylist()
        assert [last, *texts] == sorted([last, *texts]), "out of order"
        last = texts[-1]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
