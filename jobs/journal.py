"""A unit's journal: immutable segments of finished rows, each named by the sha256 of its content.

Nothing is appended and nothing is locked, so the same journal works on a disk and on an object store, and a writer that
was thought dead can do no harm: of two answers to one row, the one in the segment of the smaller name counts.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from jobs.store import Location, delete, delete_folder, list_files, publish_bytes, read_bytes

INPUT_KEY = b"spanfill.input"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("stop_token_id", pa.int32()),
        ("mean_logprob", pa.float32()),
        ("cached_tokens", pa.int32()),
        ("replica", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(slots=True)
class Sample:
    """What the engine made of one sample of one row: the least that must survive a kill. ``row`` is the file's."""

    row: int
    sample: int
    token_ids: list[int]
    stop_token_id: int | None = None
    mean_logprob: float | None = None
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
    """The segments of one unit in ``folder``; damaged ones are moved to ``quarantine``."""

    def __init__(self, folder: Location, quarantine: Location) -> None:
        self._folder = folder
        self._quarantine = quarantine

    def publish(self, samples: Sequence[Sample], digest: str) -> None:
        """Publish one segment of rows that were made from an input of this ``digest``; raises ``StorageError``."""
        if not samples:
            return
        columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names}
        schema = SCHEMA.with_metadata({INPUT_KEY: digest.encode()})
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
        for info in list_files(self._folder):
            if not info.base_name.endswith(".arrow"):
                continue
            data = read_bytes(self._folder.join(info.base_name))
            if hashlib.sha256(data).hexdigest() != info.base_name.removesuffix(".arrow"):
                publish_bytes(self._quarantine.join(info.base_name), data)
                delete(self._folder.join(info.base_name))
                damaged.append(info.base_name)
                continue
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            digests.add(table.schema.metadata[INPUT_KEY].decode())
            for row in table.to_pylist():
                samples.setdefault((row["row"], row["sample"]), Sample(**row))
        return Replay(list(samples.values()), digests, damaged)

    def peek(self) -> tuple[int, dict[str, int]]:
        """How many rows the segments hold, and their errors by code; nothing is set aside."""
        rows: dict[int, str | None] = {}
        for info in list_files(self._folder):
            data = read_bytes(self._folder.join(info.base_name))
            if hashlib.sha256(data).hexdigest() == info.base_name.removesuffix(".arrow"):
                table = pa.ipc.open_file(pa.BufferReader(data)).read_all().select(["row", "error_code"])
                rows |= dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
        return len(rows), dict(Counter(code for code in rows.values() if code is not None))

    def drop(self) -> None:
        """Forget the segments once the unit's part is out."""
        delete_folder(self._folder)
