"""While a resumed job goes on, a look at what earlier runs finished: are its parts still what they were?"""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jobs.digest import InputDigest
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.plan import InputFile, Unit
from jobs.reader import UnitReader
from jobs.spec import JobSpec
from jobs.store import Location, patient
from serving.errors import InputChangedError, SpanfillError

WORKERS = 4
BLOCK_BYTES = 4 << 20


class Recheck:
    """Compares each finished unit with its report in the background; what differs comes out of ``damaged``."""

    def __init__(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        self._ledger = ledger
        self._damaged: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        self._failure: SpanfillError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(units,), name="spanfill-recheck", daemon=True)
        self._thread.start()

    def damaged(self) -> list[Unit]:
        """The units found damaged since the last call, set aside by then; raises ``StorageError``."""
        found: list[Unit] = []
        while not self._damaged.empty():
            found.append(self._damaged.get())
        if self._failure is not None:
            raise self._failure
        return found

    def wait(self, check: Callable[[], None]) -> list[Unit]:
        """``damaged`` once every unit was looked at; ``check`` is called meanwhile and may raise."""
        while self._thread.is_alive():
            self._thread.join(0.2)
            check()
        return self.damaged()

    def stop(self) -> None:
        """Look no further; what is not read yet would keep the process from ending."""
        self._stopped.set()
        self._thread.join()

    def _run(self, units: Sequence[Unit]) -> None:
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                for unit, whole in zip(units, pool.map(self._is_whole, units), strict=True):
                    if not whole and not self._stopped.is_set():
                        self._ledger.set_aside(unit.index)
                        self._damaged.put(unit)
        except SpanfillError as error:
            self._failure = error

    def _is_whole(self, unit: Unit) -> bool:
        if self._stopped.is_set():
            return True
        report = self._ledger.read_report(unit.index)
        if report is None:
            return False
        return all(sha256(self._ledger.output.join(*name.split("/"))) == told for name, told in report.sha256.items())


def check_inputs(ledger: Ledger, units: Sequence[Unit], job: Job, check: Callable[[], None]) -> None:
    """Compare what a begun job has generated with the rows of those input files that were written to since.

    A new time alone is noted and goes. ``check`` is called meanwhile and may raise. Raises ``InputChangedError`` naming
    the first rows that differ.
    """
    then = {file.name: file.modified for file in ledger.inputs()}
    files = job.inputs.files
    touched = [unit for unit in units if files and files[unit.file].modified != then.get(files[unit.file].name)]
    if not touched:
        return

    def compare(unit: Unit) -> None:
        report = ledger.read_report(unit.index)
        told = {report.input} if report is not None else ledger.journal(unit.index).digests()
        file = files[unit.file]
        if told and told != {input_digest(job.inputs.root, file, unit, job.spec)}:
            raise InputChangedError(
                f"{file.name}, rows {unit.start} to {unit.stop}, is not what it was when this job began.",
                remedy="Put the file back and run again to resume, or start anew with --overwrite.",
            )

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(compare, touched):
            check()
    finally:
        pool.shutdown(cancel_futures=True)
    ledger.store_inputs(files)


def input_digest(root: Location, file: InputFile, unit: Unit, spec: JobSpec) -> str:
    """The digest of a unit's rows as the input holds them now; raises ``InputChangedError`` if it cannot be read."""
    columns = _columns(root, file, spec)
    digest = InputDigest(columns)
    for batch in UnitReader(root, columns).read(file, unit):
        digest.add(batch)
    return digest.hexdigest()


def _columns(root: Location, file: InputFile, spec: JobSpec) -> list[str]:
    import pyarrow.parquet as pq

    def names() -> list[str]:
        with root.fs.open_input_file(file.path) as source:
            return list(pq.read_schema(source).names)

    present = patient(root, names)
    return [spec.column(role) for role in spec.roles if spec.column(role) in present]


def sha256(location: Location) -> str:
    """The sha256 of a file, or an empty string when it is not there."""

    def read() -> str:
        digest = hashlib.sha256()
        with location.fs.open_input_stream(location.path) as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    try:
        return patient(location, read)
    except FileNotFoundError:
        return ""
