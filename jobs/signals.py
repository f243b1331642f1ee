"""SIGINT and SIGTERM, turned into errors where a job can stop cleanly."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from serving.errors import InterruptedJobError, TerminatedJobError


class Signals:
    """SIGINT and SIGTERM as something to look at between two steps."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal ends the process at once."""
        if self._number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._number = number

    @property
    def came(self) -> bool:
        """Whether one came."""
        return bool(self._number)

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal ended; 0 when none came."""
        return 128 + self._number if self._number else 0

    def check(self) -> None:
        """Raise what the signal asks for."""
        if self._number:
            raise TerminatedJobError if self._number == signal.SIGTERM else InterruptedJobError


@contextmanager
def interruptible() -> Iterator[Signals]:
    """Catch both signals for the block, in the main thread; elsewhere nothing is caught."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    old: dict[int, Callable[..., Any] | int | None] = {
        n: signal.signal(n, signals) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
