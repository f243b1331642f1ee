"""The threads of a gateway that run what is queued: so many works at once on a node, however many gateways it has."""

import fcntl
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from jobs.api.office import Office
from jobs.api.tending import Tending
from serving.errors import SpanfillError

LOOK_SECONDS = 1.0
"""How often to look for a work."""

SWEEP_SECONDS = 600.0

logger = logging.getLogger(__name__)


class Agent:
    """Runs works while it is started: a thread for each place of the node, and one that ends those that are cut short.

    ``places`` is the folder of this node's place files. What a work raises that is known is logged: its claim lapses
    and it is tried again.
    """

    def __init__(self, office: Office, places: Path) -> None:
        self._office = office
        self._places = places
        self._swept = -SWEEP_SECONDS
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin; with no place on this node nothing is run."""
        count = self._office.config.at_once
        tasks: list[Callable[[], None]] = [partial(self._fill, number) for number in range(count)]
        for task in [*tasks, *([self._clear] if count else [])]:
            thread = threading.Thread(target=self._repeat, args=(task,), name="spanfill-works", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Ask the processes to stop, and wait until what is in flight is kept; another gateway goes on."""
        self._office.stopping.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, task: Callable[[], None]) -> None:
        while not self._office.stopping.wait(LOOK_SECONDS):
            try:
                task()
            except (SpanfillError, OSError) as error:
                logger.warning("a batch or job is tried again: %s", error)
            except Exception:  # A fault of ours with one work must not end those of all tenants.
                logger.exception("a batch or job is tried again")

    def _fill(self, number: int) -> None:
        """Run works in a place of this node, until none waits.

        Of several places the first is for tenants of whom nothing runs: long works of one leave the others theirs.
        """
        idle_only = number == 0 and self._office.config.at_once > 1
        with place_of(self._places, number) as is_ours:
            while is_ours and self._tend_one(idle_only=idle_only):
                pass

    def _clear(self) -> None:
        """End works that are cut short while nobody runs them, and remove what is too old."""
        while self._tend_one(closing=True):
            pass
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            sweep(self._office)

    def _tend_one(self, *, closing: bool = False, idle_only: bool = False) -> bool:
        if self._office.stopping.is_set():
            return False
        office = self._office
        work = office.queue.claim(office.holder, office.models, closing=closing, idle_only=idle_only)
        if work is None:
            return False
        Tending(office, work).run()
        return True


def sweep(office: Office) -> None:
    """Remove files, and works that ended, once they were kept for as long as they are."""
    office.shelf.sweep()
    for work in office.queue.forget(office.queue.clock() - office.config.kept_seconds):
        office.shelf.remove(office.shelf.work_folder(work.tenant, work.id))


@contextmanager
def place_of(folder: Path, number: int) -> Iterator[bool]:
    """Hold one of a node's places, if no gateway of the node does: the folder may be shared with others."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / f"{platform.node()}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _is_free(lock)
    finally:
        os.close(lock)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
