"""A unit's journal: immutable segments of finished rows, each named by the sha256 of its content.

Nothing is appended and nothing is locked, so the same journal works on a disk and on an object store. A writer that was
thought dead can do no harm: segments of a job that was since begun anew are ignored, an answer counts before an error,
and of two answers to one row the one in the segment of the smaller name.
"""

import array
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs.store import Location, delete, delete_folder, list_files, publish_bytes, read_bytes

INPUT_KEY = b"spanfill.input"
JOB_KEY = b"spanfill.job"
REPLAYED_AT_ONCE = 1_024
"""Samples of a segment that are Python's numbers at a time."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("stop_token_id", pa.int32()),
        ("mean_logprob", pa.float32()),
        ("sum_logprob", pa.float64()),
        ("scored", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("replica", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(slots=True)
class Sample:
    """What the engine made of one sample of one row: the least that must survive a kill. ``row`` is the file's.

    ``sum_logprob`` is the natural logarithm of the likelihood of the row's ``scored`` tokens, where they are scored.
    The ``token_ids`` of an answer are a 32-bit array, a tenth of a list's bytes: all are held until its part is out.
    """

    row: int
    sample: int
    token_ids: Sequence[int]
    stop_token_id: int | None = None
    mean_logprob: float | None = None
    sum_logprob: float | None = None
    scored: int = 0
    cached_tokens: int = 0
    replica: str = ""
    error_code: str | None = None
    error_message: str | None = None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Replay:
    """A journal read back: its samples, the input digests that they were made from, and what was damaged."""

    samples: list[Sample]
    digests: set[str]
    damaged: list[str]


class Journal:
    """The segments of one unit in ``folder``; damaged ones are moved to ``quarantine``.

    ``job`` tells this beginning of the job from an earlier one in the same output folder, whose segments do not count.
    """

    def __init__(self, folder: Location, quarantine: Location, *, job: str = "") -> None:
        self._folder = folder
        self._quarantine = quarantine
        self._job = job

    def publish(self, samples: Sequence[Sample], digest: str) -> None:
        """Publish one segment of rows that were made from an input of this ``digest``; raises ``StorageError``."""
        if not samples:
            return
        columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names if name != "token_ids"}
        columns["token_ids"] = token_lists(samples)
        schema = SCHEMA.with_metadata({INPUT_KEY: digest.encode(), JOB_KEY: self._job.encode()})
        sink = io.BytesIO()
        batch = pa.record_batch(columns, schema=schema)
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        publish_bytes(self._folder.join(f"{hashlib.sha256(data).hexdigest()}.arrow"), data)

    def replay(self) -> Replay:
        """Every sample once, from the segments whose content is what their name says; the others are set aside."""
        samples: dict[tuple[int, int], Sample] = {}
        digests: set[str] = set()
        damaged: list[str] = []
        for name, data in self._segments():
            if not _is_whole(name, data):
                publish_bytes(self._quarantine.join(name), data)
                delete(self._folder.join(name))
                damaged.append(name)
            elif (table := self._table(data)) is not None:
                digests.add(table.schema.metadata[INPUT_KEY].decode())
                for sample in _samples(table):
                    key = (sample.row, sample.sample)
                    if key not in samples or (samples[key].error_code and not sample.error_code):
                        samples[key] = sample
        return Replay(list(samples.values()), digests, damaged)

    def peek(self) -> tuple[int, dict[str, int]]:
        """How many rows the segments hold, and their errors by code; nothing is set aside."""
        rows: dict[int, str | None] = {}
        for name, data in self._segments():
            table = self._table(data) if _is_whole(name, data) else None
            if table is not None:
                for row, code in zip(table["row"].to_pylist(), table["error_code"].to_pylist(), strict=True):
                    rows[row] = rows.get(row, code) and code
        return len(rows), dict(Counter(code for code in rows.values() if code is not None))

    def digests(self) -> set[str]:
        """The digests of the inputs that the segments were made from; nothing is set aside."""
        tables = (self._table(data) for name, data in self._segments() if _is_whole(name, data))
        return {table.schema.metadata[INPUT_KEY].decode() for table in tables if table is not None}

    def _segments(self) -> Iterator[tuple[str, bytes]]:
        for info in list_files(self._folder):
            if info.base_name.endswith(".arrow"):
                yield info.base_name, read_bytes(self._folder.join(info.base_name))

    def _table(self, data: bytes) -> pa.Table | None:
        """A whole segment's rows, or None if it belongs to an earlier beginning of the job."""
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        return table if table.schema.metadata.get(JOB_KEY) == self._job.encode() else None

    def drop(self) -> None:
        """Forget the segments once the unit's part is out."""
        delete_folder(self._folder)


def token_lists(samples: Sequence[Sample]) -> pa.ListArray:
    """The samples' token ids as a column, made without a Python number for each of them."""
    ids, ends = array.array("i"), array.array("i", [0])
    for sample in samples:
        ids.extend(sample.token_ids)
        ends.append(len(ids))
    return pa.ListArray.from_arrays(*(pa.array(np.frombuffer(numbers, np.int32)) for numbers in (ends, ids)))


def _samples(table: pa.Table) -> Iterator[Sample]:
    for batch in table.to_batches(max_chunksize=REPLAYED_AT_ONCE):
        for row in batch.to_pylist():
            yield Sample(**row | {"token_ids": array.array("i", row["token_ids"])})


def _is_whole(name: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == name.removesuffix(".arrow")
