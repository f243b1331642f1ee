"""How long an engine had work, and how much of it ran at once."""

import time
from collections.abc import Callable


class Occupancy:
    """Adds up an engine's running rows over time; told after each step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._since = clock()
        self.busy_seconds = 0.0
        self.row_seconds = 0.0

    def tell(self, running: int) -> None:
        """``running`` rows run from now on."""
        now = self._clock()
        if self._running:
            self.busy_seconds += now - self._since
            self.row_seconds += self._running * (now - self._since)
        self._running, self._since = running, now
