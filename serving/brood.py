"""The processes of a Ray that was started here, so that none outlives it, whatever ended it."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil

KNOCK_SECONDS = 1.0
LOOK_SECONDS = 0.25

_daemons: set[psutil.Process] = set()
_head: list[tuple[str, int]] = []
_known: set[psutil.Process] = set()


def begin(daemons: Iterable[psutil.Process], head: str) -> None:
    """These are Ray's own programs, whatever runs below them is of it, and its head listens at ``head``, host:port."""
    host, _, port = head.rpartition(":")
    _head[:] = [(host.strip("[]"), int(port))]
    _daemons.update(daemons)
    _known.update(_daemons)


def remember() -> None:
    """Note what runs now: an engine whose replica was killed runs below nobody any more."""
    for process in _daemons:
        with suppress(psutil.NoSuchProcess):
            _known.update(process.children(recursive=True))


def is_headless() -> bool:
    """Whether Ray's head does not listen any more, as when a signal was sent to a whole group of processes.

    Whatever asks it waits for a minute then, and Ray ends the process.
    """
    for address in _head:
        try:
            socket.create_connection(address, timeout=KNOCK_SECONDS).close()
        except OSError:
            return True
    return False


def attended(ask: Callable[[], None]) -> None:
    """Ask something of Ray, in a thread that prints what it raises, but wait no longer once its head has ended."""
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive() and not is_headless():
        asking.join(LOOK_SECONDS)


def end() -> None:
    """Kill what of it is left, and forget it."""
    remember()
    kill(_known)
    for found in (_daemons, _head, _known):
        found.clear()


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill those that are left of some."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
