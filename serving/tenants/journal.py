"""A gateway's journal of usage: records in files of its own folder, which it holds locked for as long as it lives.

``<root>/<source>/`` holds a file ``lock`` and the segments ``00000001.jsonl``, ``00000002.jsonl`` and so on. A line of
a segment is a JSON array: a record's number, then its fields. A segment that was delivered is deleted when the next one
is begun; what a dead gateway left behind is delivered by any other one.
"""

import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from serving.tenants.usage import Numbered, UsageRecord

SEGMENT_BYTES = 4 << 20
BATCH_RECORDS = 1_000

Add = Callable[[str, Sequence[Numbered]], object]
"""Counts records of a source, none of them twice: ``TenantStore.add_usage``."""

logger = logging.getLogger(__name__)


class Journal:
    """A new journal below ``root``; one thread at a time may append, and any may sync beside it."""

    def __init__(self, root: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = root / uuid.uuid4().hex
        self._lock = _make_folder(self.folder)
        self._segment_bytes = segment_bytes
        self._segment: int | None = None
        self._segments = self._written = self._numbered = 0
        self._unsynced: list[int] = []
        self._is_synced = self._is_listed = True
        self._changing = threading.Lock()

    def append(self, records: Sequence[UsageRecord]) -> None:
        """Hand records to the system, which keeps them whatever becomes of this process.

        When it raises ``OSError`` they may be there in part; they are to be appended again, get the same numbers, and
        stand in another segment.
        """
        first = self._numbered + 1
        lines = b"".join(_line(number, record) for number, record in enumerate(records, first))
        with self._changing:
            segment = self._begin() if self._segment is None else self._segment
            self._is_synced = False
            try:
                _write(segment, lines)
            except OSError:
                self._end_segment()
                raise
            self._numbered += len(records)
            self._written += len(lines)
            if self._written >= self._segment_bytes:
                self._end_segment()

    def sync(self) -> None:
        """Put on the disk what was appended, for machines that lose power; raises ``OSError``."""
        with self._changing:
            if self._is_synced:
                return
            files, self._unsynced = self._unsynced, []
            if self._segment is not None:
                files.append(os.dup(self._segment))
            is_listed, self._is_synced, self._is_listed = self._is_listed, True, True
        try:
            for file in files:
                os.fsync(file)
            if not is_listed:
                _sync(self.folder)
        finally:
            for file in files:
                os.close(file)

    def close(self) -> None:
        """Let go of the folder; from now on anybody may deliver what is in it."""
        with self._changing:
            self._end_segment()
            for file in self._unsynced:
                os.close(file)
        os.close(self._lock)

    def _begin(self) -> int:
        self._segments, self._written = self._segments + 1, 0
        path = self.folder / f"{self._segments:08d}.jsonl"
        self._segment = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._is_listed = False
        return self._segment

    def _end_segment(self) -> None:
        if self._segment is not None:
            self._unsynced.append(self._segment)
        self._segment = None


class Delivery:
    """Brings a journal's records to ``add`` in their order, and deletes segments of which nothing is left to bring."""

    def __init__(self, folder: Path, add: Add) -> None:
        self._folder = folder
        self._add = add
        self._offsets: dict[Path, int] = {}

    def run(self, *, is_finished: bool) -> None:
        """Bring what is new; the last segment may go too when nobody appends any more.

        What ``add`` raises ends it; the next run goes on from there.
        """
        segments = sorted(self._folder.glob("*.jsonl"))
        for path in segments:
            self._bring(path)
            if is_finished or path != segments[-1]:
                path.unlink()
                self._offsets.pop(path, None)

    def _bring(self, path: Path) -> None:
        start, end = -1, self._offsets.get(path, 0)
        while end > start:
            start = end
            numbered, end = read_records(path, start)
            if numbered:
                self._add(self._folder.name, numbered)
            self._offsets[path] = end


def deliver_orphans(root: Path, add: Add) -> None:
    """Deliver and delete the journals below ``root`` whose gateways are gone; raises what ``add`` raises."""
    for folder in sorted(path for path in root.glob("*") if not path.name.startswith(".")):
        with _adopted(folder) as is_ours:
            if is_ours:
                Delivery(folder, add).run(is_finished=True)
                remove(folder)


def has_orphans(root: Path) -> bool:
    """Whether there are records below ``root`` whose gateways are gone."""
    for folder in root.glob("[!.]*"):
        with _adopted(folder) as is_ours:
            if is_ours and any(folder.glob("*.jsonl")):
                return True
    return False


def remove(folder: Path) -> None:
    """Delete a journal's folder, of which everything was delivered."""
    (folder / "lock").unlink()
    folder.rmdir()


def read_records(path: Path, offset: int, most: int = BATCH_RECORDS) -> tuple[list[Numbered], int]:
    """The records in the whole lines from a byte of a segment on, ``most`` lines of it, and the byte behind them.

    A line that was not written to its end is left alone; one that is whole and cannot be read is passed over.
    """
    numbered: list[Numbered] = []
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(most):
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            try:
                number, *fields = json.loads(line)
                numbered.append((number, UsageRecord(*fields)))
            except (ValueError, TypeError):
                logger.warning("%s has a line that is no record of usage; it is passed over", path)
    return numbered, offset


def _line(number: int, record: UsageRecord) -> bytes:
    return json.dumps([number, *astuple(record)], separators=(",", ":")).encode() + b"\n"


def _make_folder(folder: Path) -> int:
    """Make a journal's folder, which is locked from the moment it can be seen; returns the lock's descriptor."""
    hidden = folder.with_name(f".{folder.name}")
    hidden.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden.mkdir(mode=0o700)
    lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    hidden.rename(folder)
    _sync(folder.parent)
    return lock


@contextmanager
def _adopted(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, if its gateway is gone and nobody else was faster."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        yield _is_free(lock) and folder.exists()
    finally:
        os.close(lock)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync(folder: Path) -> None:
    """Let the disk have a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
