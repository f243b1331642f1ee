"""What requests used goes to a journal of this machine at once, and from there to the store every second."""

import logging
import threading
import time
from pathlib import Path

from serving.errors import DatabaseAwayError
from serving.home import home_folder
from serving.tenants.journal import Add, Delivery, Journal, deliver_orphans, has_orphans, remove
from serving.tenants.store import TenantStore
from serving.tenants.usage import UsageRecord

SYNC_SECONDS = 0.1
"""What a loss of power costs: the latest records. The end of a process costs none."""

DELIVER_SECONDS = 1.0
ORPHAN_SECONDS = 30.0
"""How often to look for what dead gateways left behind."""

logger = logging.getLogger(__name__)


def open_meter(store: TenantStore) -> "Meter":
    """A meter with a journal in spanfill's home, apart from those for other databases, which a warning names."""
    _warn_of_others(_journals(store))
    return Meter(store.add_usage, _journals(store))


def collect(store: TenantStore) -> None:
    """Count what dead gateways of this machine left behind; raises ``DatabaseAwayError``."""
    deliver_orphans(_journals(store), store.add_usage)


def _journals(store: TenantStore) -> Path:
    return home_folder() / "usage" / store.fingerprint


def _warn_of_others(mine: Path) -> None:
    """Name what waits for a database of another address: nobody counts it unless it is this one by another name."""
    for other in sorted(mine.parent.glob("*")):
        if other != mine and has_orphans(other):
            logger.warning(
                "usage for a database of another address waits in %s. Use that address once, or move what is in it to "
                "%s if it is this database.",
                other,
                mine,
            )


class Meter:
    """Counts each record once, whatever dies or goes away in between; one for each gateway process.

    Other meters below ``root`` are left alone while their processes live. While the database is away, records stay in
    the journal.
    """

    def __init__(self, add: Add, root: Path) -> None:
        self._add, self._root = add, root
        self._journal = Journal(root)
        self._delivery = Delivery(self._journal.folder, add)
        self._records: list[UsageRecord] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_failing = False
        self._orphans_at = 0.0
        self._threads = [
            threading.Thread(target=work, name="spanfill-usage", daemon=True)
            for work in (self._keep_syncing, self._keep_delivering)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, record: UsageRecord) -> None:
        """Count a record; it survives the end of this process, however that comes. Neither waits nor fails."""
        with self._lock:
            self._records.append(record)
            if len(self._records) == 1:  # Else the disk has failed: it is tried again in the background.
                self._write()

    def close(self) -> None:
        """Write and deliver the rest; what the database does not take now, another gateway delivers later."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._sync()
        if self._tried(is_finished=True):
            remove(self._journal.folder)
        self._journal.close()

    def _keep_syncing(self) -> None:
        while not self._ended.wait(SYNC_SECONDS):
            self._sync()

    def _keep_delivering(self) -> None:
        self._tried(is_finished=False)
        while not self._ended.wait(DELIVER_SECONDS):
            self._tried(is_finished=False)

    def _write(self) -> None:
        """Append what waits."""
        try:
            self._journal.append(self._records)
        except OSError as error:
            logger.error("the journal of usage cannot be written, %d records wait: %s", len(self._records), error)
        else:
            self._records = []

    def _sync(self) -> None:
        with self._lock:
            if self._records:
                self._write()
        try:
            self._journal.sync()
        except OSError as error:
            logger.error("the journal of usage cannot be put on the disk: %s", error)

    def _tried(self, *, is_finished: bool) -> bool:
        """Deliver what can be delivered; returns whether that was all."""
        try:
            self._delivery.run(is_finished=is_finished)
            self._deliver_orphans()
        except (DatabaseAwayError, OSError) as error:
            if not self._is_failing:
                logger.warning("usage stays in %s until it can be delivered: %s", self._journal.folder, error)
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def _deliver_orphans(self) -> None:
        if time.monotonic() >= self._orphans_at:
            deliver_orphans(self._root, self._add)
            self._orphans_at = time.monotonic() + ORPHAN_SECONDS
