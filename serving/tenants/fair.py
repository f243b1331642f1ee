"""Fair shares by served tokens: the Virtual Token Counter of Sheng et al. (OSDI 2024, arXiv 2401.00588), weighted.

A client's counter is the service that it has had, divided by its weight. What waits longest of the client with the
smallest counter is served next. No I/O.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

W_IN = 1.0
"""Service that a prompt token is, charged when its request begins (the weights are those of the paper's artifact).

All prompt tokens count, as in the paper: how many are cached is not known then, and nobody shall pay more because
others evicted his blocks.
"""

W_OUT = 2.0
"""Service that an output token is, charged as it is made."""

Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Item]):
    """What clients have queued, the next to be served at its head.

    Take the head with ``remove`` when it is served, and ``charge`` its client for what it gets. While two clients have
    something queued, their service divided by weight differs by at most
    ``2 * max(W_IN * longest prompt, W_OUT * tokens that run at once) / smallest weight``, whatever others do.
    """

    def __init__(self) -> None:
        self._queued: dict[str, OrderedDict[Item, None]] = {}
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last_to_leave = ""

    def __len__(self) -> int:
        return sum(map(len, self._queued.values()))

    def waiting(self, client: str) -> int:
        """How many items a client has queued."""
        return len(self._queued.get(client, ()))

    def push(self, client: str, item: Item, *, weight: float = 1.0) -> None:
        """Queue an item behind its client's others; ``weight`` is the client's share from now on.

        A client that had nothing queued is lifted to those that have: what it did not use is not owed to it.
        """
        self._weights[client] = weight
        if client not in self._queued:
            self._counters[client] = max(self._counters.get(client, 0.0), self._floor())
            self._queued[client] = OrderedDict()
        self._queued[client][item] = None

    def _floor(self) -> float:
        """The smallest counter of those that wait; when nobody does, that of the last who did."""
        waiting = (self._counters[client] for client in self._queued)
        return min(waiting, default=self._counters.get(self._last_to_leave, 0.0))

    def head(self) -> Item | None:
        """What is to be served next; None when nothing is queued."""
        client = min(self._queued, key=self._counters.__getitem__, default=None)
        return None if client is None else next(iter(self._queued[client]))

    def remove(self, client: str, item: Item) -> None:
        """Take a queued item out, to serve it or since nobody wants it any more."""
        queued = self._queued[client]
        del queued[item]
        if not queued:
            del self._queued[client]
            self._last_to_leave = client

    def charge(self, client: str, service: float) -> None:
        """Count ``W_IN`` a prompt token and ``W_OUT`` an output token of a client that has been queued before."""
        self._counters[client] += service / self._weights[client]
