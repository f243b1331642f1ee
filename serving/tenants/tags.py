"""Whose batch row an engine takes next: tags of start-time fair queueing, as vLLM's scheduling priorities.

Goyal, Vin and Cheng, SIGCOMM 1996: a row's tag is the virtual time at which it would start if each tenant had its share
to itself, and rows start in the order of their tags. One ``Tags`` belongs to one engine. No I/O.
"""

from serving.protocol import BATCH_PRIORITY

MOST_PRIORITY = 2**62
"""vLLM sends priorities as 64-bit integers."""


class Tags:
    """Gives the batch rows of one engine their priorities, so that tenants are served in proportion to their weights.

    Virtual time is in tokens of a tenant of weight 1 that is alone. It begins anew whenever no row is open, so that
    priorities stay small and nothing is remembered of who was served before.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._open = 0

    def open(self, tenant: str, tokens: int, *, weight: float = 1.0) -> int:
        """The priority of a row that is sent to the engine now, from ``BATCH_PRIORITY`` on, the lowest served first.

        ``tokens`` is what the row costs, prompt and output. Every row that was opened is to be closed.
        """
        start = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens / weight
        self._open += 1
        return min(BATCH_PRIORITY + int(start), MOST_PRIORITY)

    def close(self, priority: int, *, served: bool = True) -> None:
        """A row ended. Virtual time goes on to its start, unless it was given up before it was ``served``."""
        self._open -= 1
        if not self._open:
            self._now, self._ends = 0.0, {}
        elif served:
            self._now = max(self._now, float(priority - BATCH_PRIORITY))
