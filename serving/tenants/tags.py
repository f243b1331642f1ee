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


@dataclass(slots=True)
class _Tenant:
    """The latest start of a tenant's rows, when all that it has had so far ends, and how many are open."""

    start: float = 0.0
    end: float = 0.0
    open: int = 0


class Tags:
    """Gives the batch rows of one engine their priorities, so that tenants are served in proportion to their weights.

    Virtual time is in service (``serving.tenants.fair``) of a tenant of weight 1 that is alone. It begins anew whenever
    no row is open, so that priorities stay small and nothing is remembered of who was served before.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._tenants: dict[str, _Tenant] = {}
        self._open = 0

    def open(self, tenant: str, service: float, *, weight: float = 1.0) -> Tag:
        """The tag of a row that is sent to the engine now; every one is to be closed.

        A tenant's rows keep their order, whatever becomes of those before.
        """
        its = self._tenants.setdefault(tenant, _Tenant())
        if not its.open:
            its.end = max(its.end, self._now)  # What it did not use is not owed to it.
        its.start = max(its.start, its.end)
        its.end += service / weight
        its.open, self._open = its.open + 1, self._open + 1
        return Tag(tenant, its.start, service, weight)

    def close(self, tag: Tag, service: float = 0.0) -> None:
        """A row ended that was so much ``service`` in truth; what else was expected of it is its tenant's again.

        Virtual time goes on to the row's start, unless it was given up before it was served.
        """
        its = self._tenants[tag.tenant]
        its.open, self._open = its.open - 1, self._open - 1
        its.end += (service - tag.service) / tag.weight
        if not self._open:
            self._now, self._tenants = 0.0, {}
        elif service:
            self._now = max(self._now, tag.start)
