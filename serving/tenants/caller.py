"""Who calls: what a key stands for, as the gateway and the admission know it."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used at most, by a tenant or by one of its keys; None: no limit of its own.

    ``tokens_per_minute`` counts prompt and completion tokens, ``concurrency`` requests admitted and not ended.
    """

    tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """A valid key: its tenant, whose fair share is ``weight``, and both their limits.

    ``models`` are the names that the tenant may use, None: all.
    """

    tenant: str
    key: str
    role: Role = "user"
    weight: float = 1.0
    limits: Limits = Limits()
    key_limits: Limits = Limits()
    models: tuple[str, ...] | None = None

    @property
    def cache_salt(self) -> str:
        """What parts the tenant's blocks in the prefix cache from all others'."""
        return f"tenant:{self.tenant}"
