"""How long a replica waits for its engine before it holds it for hung: measured, not a constant."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

UNMEASURED_SECONDS = 600.0
"""A replica's patience before anybody measured: one step of a large prefill on a slow CPU may take minutes."""

LEAST_SECONDS = 30.0
"""Patience of the fastest engine: a starved machine is no hang, nor is the first request of its kind, whose kernels are
compiled when it comes."""

FACTOR = 8.0


class Pace:
    """Smoothed seconds of a micro-batch and their deviation, as TCP estimates round trips (RFC 6298, section 2)."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def record(self, seconds: float) -> None:
        """A micro-batch was answered."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
            return
        self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
        self._mean += (seconds - self._mean) / 8

    @property
    def patience(self) -> float | None:
        """Seconds without one engine step after which a micro-batch is given up; None before a measurement."""
        if self._mean is None:
            return None
        return max(LEAST_SECONDS, FACTOR * (self._mean + 4 * self._deviation))


class Stall:
    """Tells when an engine, whose ``steps`` are given, has made none for longer than it is given patience for."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps, self._since = steps, clock()

    def left(self, patience: float) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self._since + patience - self._clock())

    def is_over(self, steps: int, patience: float) -> bool:
        """Whether the engine has stood still for that long."""
        if self.left(patience):
            return False
        before, self._steps, self._since = self._steps, steps, self._clock()
        return steps == before


class Gate:
    """Lets many in at a time, or one alone; who wants to be alone goes first."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._alone = 0

    @asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait for admission; the block runs inside."""
        async with self._changed:
            self._alone += alone
            try:
                await self._changed.wait_for(lambda: self._inside == 0 if alone else self._alone == 0)
            except BaseException:
                self._leave(alone)
                raise
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._leave(alone)

    def _leave(self, alone: bool) -> None:
        self._alone -= alone
        self._changed.notify_all()
