"""When processes of this machine began, by ``/proc``."""

import os
import time
from pathlib import Path


def birth(pid: int) -> int | None:
    """When a live process of this machine began, in clock ticks since boot; None for one that is no more.

    Field 22 of ``/proc/PID/stat`` (man 5 proc): unlike a time of day it stays what it was when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def since_birth() -> float:
    """Seconds since this process began; 0 where there is no ``/proc`` to tell."""
    born = birth(os.getpid())
    return 0.0 if born is None else time.clock_gettime(time.CLOCK_BOOTTIME) - born / os.sysconf("SC_CLK_TCK")
