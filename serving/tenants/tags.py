"""Whose batch row an engine takes next: tags of start-time fair queueing, as vLLM's scheduling priorities.

Goyal, Vin and Cheng, SIGCOMM 1996: a row's tag is the virtual time at which it would start if each tenant had its share
to itself, and rows start in the order of their tags. One ``Tags`` belongs to one engine. No I/O.
"""

from dataclasses import dataclass

from serving.protocol import BATCH_PRIORITY


@dataclass(frozen=True, slots=True)
class Tag:
    """The place of a tenant's row: the virtual time when it starts, and the service that it is expected to be."""

    tenant: str
    start: float
    service: float
    weight: float = 1.0

    @property
    def priority(self) -> int:
        """From ``BATCH_PRIORITY`` on; an engine serves the lowest first."""
        return BATCH_PRIORITY + int(self.start)


class Tags:
    """Gives the batch rows of one engine their priorities, so that tenants are served in proportion to their weights.

    Virtual time is in service (``serving.tenants.fair``) of a tenant of weight 1 that is alone. It begins anew whenever
    no row is open, so that priorities stay small and nothing is remembered of who was served before.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._starts: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._open = 0

    def open(self, tenant: str, service: float, *, weight: float = 1.0) -> Tag:
        """The tag of a row that is sent to the engine now; every one is to be closed.

        A tenant's rows keep their order, whatever becomes of those before.
        """
        start = max(self._now, self._starts.get(tenant, 0.0), self._ends.get(tenant, 0.0))
        self._starts[tenant], self._ends[tenant] = start, start + service / weight
        self._open += 1
        return Tag(tenant, start, service, weight)

    def close(self, tag: Tag, service: float = 0.0) -> None:
        """A row ended that was so much ``service`` in truth; what else was expected of it is its tenant's again.

        Virtual time goes on to the row's start, unless it was given up before it was served.
        """
        self._open -= 1
        if not self._open:
            self._now, self._starts, self._ends = 0.0, {}, {}
            return
        self._ends[tag.tenant] += (service - tag.service) / tag.weight
        if service:
            self._now = max(self._now, tag.start)
