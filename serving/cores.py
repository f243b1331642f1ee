"""Cores of one's own: replicas of one machine claim disjoint cores by file locks that die with them."""

import fcntl
import os
import tempfile
from pathlib import Path

from serving.errors import ResourceError

_held: list[int] = []
"""Open lock files of this process; closing one frees its core."""


def available_cores() -> list[int]:
    """The cores that this process may run on, in order."""
    return sorted(os.sched_getaffinity(0))


def claim_cores(count: int, *, folder: Path | None = None) -> tuple[int, ...]:
    """Claim ``count`` cores until this process ends; raises ``ResourceError`` when fewer are free.

    ``folder`` holds one lock file a core, shared by all processes of the user on the machine.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"spanfill-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    claimed: dict[int, int] = {}
    for core in available_cores():
        if len(claimed) == count:
            break
        lock = os.open(folder / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            claimed[core] = lock
    if len(claimed) < count:
        for lock in claimed.values():
            os.close(lock)
        raise ResourceError(
            f"{count} cores are needed and {len(claimed)} of {len(available_cores())} are free.",
            remedy="Ask for fewer (--cores, --replicas), or wait until the job or server that holds them ends.",
        )
    _held.extend(claimed.values())
    return tuple(claimed)
