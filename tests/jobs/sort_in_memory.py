"""Sorts some mebibytes of random texts with 100 MiB of memory and prints its greatest resident set, in bytes."""

import random
import resource
import sys
from collections.abc import Iterator

import pyarrow as pa

from jobs.sorting import in_order

SCHEMA = pa.schema([("text", pa.large_binary()), ("row", pa.int64())])


def batches(mebibytes: int) -> Iterator[pa.RecordBatch]:
    source = random.Random(0)
    for first in range(0, mebibytes * 256, 256):
        texts = [source.randbytes(4_096) for _ in range(256)]
        yield pa.record_batch([texts, range(first, first + 256)], schema=SCHEMA)


last = b""
for table in in_order(batches(int(sys.argv[1])), SCHEMA, ["text", "row"], 100 << 20):
    texts = table.column("text").to_pylist()
    assert last <= texts[0], "out of order"
    last = texts[-1]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
