"""What the gateways and the desk that admits their requests tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from serving.tenants.caller import Caller
from serving.tenants.limits import Standing


class Place(NamedTuple):
    """The name of a request that wants to be served: its gateway, and its number there; numbers only rise."""

    gateway: str
    number: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a caller's request may come to use: ``output_tokens`` is ``n * max_tokens``, ``samples`` run side by side.

    A request of several prompts is their sum. It waits ``patience`` seconds at most, a finite number. One that ``runs``
    takes room in the engines, one that ``claims`` counts against its caller's limits. A large request does so in parts:
    one that only claims, for all of it, is admitted or refused at once, and each of its portions only runs.
    """

    caller: Caller
    prompt_tokens: int
    output_tokens: int
    samples: int = 1
    patience: float = 30.0
    runs: bool = True
    claims: bool = True

    @property
    def tokens(self) -> int:
        """Prompt and output together, which is what its limits and its room in the engines are measured by."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Ticket:
    """A demand that has been taken; ``standing`` is what it left its caller of the limits."""

    place: Place
    demand: Demand
    standing: Standing


@dataclass(frozen=True, slots=True)
class Used:
    """What a request really used; a prompt counts once, whatever was cached of it and however many samples it had."""

    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and output together."""
        return self.prompt_tokens + self.output_tokens


LEAST_SHARES = 4
"""No request fills more than one part of so many of the engines at once."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engines hold at once: samples that run, and tokens in their KV caches, added up over the replicas."""

    samples: int
    tokens: int
    replicas: int = 1

    @property
    def share(self) -> "Capacity":
        """What one request may fill at once: a part of the engines, and of one replica, to which one call goes."""
        shares = max(LEAST_SHARES, self.replicas)
        return Capacity(self.samples // shares, self.tokens // shares)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many requests may wait: in all, and of one tenant."""

    total: int = 1_000
    tenant: int = 200


USUAL_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Report:
    """What a gateway tells; what is said first counts first.

    ``capacity`` is what it sees of the engines (nothing, before it has looked), ``again`` tickets that run and that the
    desk does not know, ``made`` output tokens so far by ticket number, ``left`` the requests that ended (None: nobody
    knows what they used), ``running`` and ``waiting`` the numbers of those that are open, up to ``issued``, the last
    number that it gave.
    """

    capacity: Capacity
    again: tuple[Ticket, ...]
    made: Mapping[int, int]
    left: Mapping[int, Used | None]
    running: frozenset[int]
    waiting: frozenset[int]
    issued: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the desk answers: how many requests of all gateways run, and which of this one's it does not know of."""

    serving: int
    unknown: frozenset[int]
