"""Who is served next, by limits, fair shares and the room in the engines; the pure core of ``serving.tenants.desk``.

A request asks, and is refused at once where a limit or the queue is full. Else it waits until ``decide`` grants it, the
tenant's turn being its ``FairQueue``'s, or until its patience ends. It holds its part of the limits from the moment it
asks until it leaves, or until its gateway falls silent. Batch rows do not come here: they go to the engines at a lower
priority. No I/O.

A large request has one ticket that holds the limits for all of it, takes no room and waits for nothing, and others, one
after the other, with which its portions run: those of other tenants have their turns in between.
"""

import heapq
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from serving.errors import OverloadedError
from serving.tenants.caller import Caller
from serving.tenants.fair import W_IN, W_OUT, FairQueue
from serving.tenants.limits import Claim, Limiter, Standing
from serving.tenants.tickets import USUAL_BOUNDS, Bounds, Capacity, Demand, Place, Ticket, Used

LEASE_SECONDS = 10.0
"""What a gateway holds that has been silent for so long is given back."""

LEAST_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """The end of a wait: the ticket is granted, or refused."""

    ticket: Ticket
    refusal: OverloadedError | None = None


@dataclass(slots=True, eq=False)
class _Held:
    """A ticket that waits or is granted, what it has reserved, and the output tokens that it was charged for."""

    ticket: Ticket
    claim: Claim
    asked: float
    running: bool = False
    charged: int = 0

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.ticket.demand.caller.tenant


class Admission:
    """Interactive requests of all gateways: those that wait, and those that run in the room that the engines have.

    ``decide`` is to be called after every other call, and several times a second.
    """

    def __init__(self, *, bounds: Bounds = USUAL_BOUNDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seen: dict[str, Capacity] = {}
        self._bounds = bounds
        self._clock = clock
        self._limiter = Limiter(clock)
        self._queue: FairQueue[_Held] = FairQueue()
        self._held: dict[str, dict[int, _Held]] = {}
        self._heard: dict[str, float] = {}
        self._deadlines: list[tuple[float, Place]] = []
        self._decided: list[Decision] = []
        self._serving = self._samples = self._tokens = 0
        self._last_wait = 0.0

    @property
    def serving(self) -> int:
        """Requests that run."""
        return self._serving

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def capacity(self) -> Capacity:
        """What the engines hold by the gateway that sees most of them: one that comes has seen none yet."""
        seen = self._seen.values()
        return Capacity(max((c.samples for c in seen), default=0), max((c.tokens for c in seen), default=0))

    def resize(self, gateway: str, capacity: Capacity) -> None:
        """A gateway sees the engines hold more or less; what runs goes on."""
        self._heard[gateway] = self._clock()
        self._seen[gateway] = capacity

    def standing(self, caller: Caller) -> Standing:
        """What the caller may ask for now."""
        return self._limiter.standing(caller)

    def is_running(self, place: Place) -> bool:
        """Whether a ticket is granted and has not left."""
        held = self._find(place)
        return held is not None and held.running

    def ask(self, demand: Demand, place: Place) -> Ticket:
        """Take a demand in; it waits until ``decide`` names its ticket, where it ``runs``; else it is granted.

        Asking again for the same place does nothing. What claims nothing is of a request that was taken in, and is not
        refused here.

        Raises ``LimitError`` above a limit of the tenant or the key, ``OverloadedError`` when too many wait, and
        ``UsageError`` for more tokens than may be used in a whole minute.
        """
        now = self._clock()
        self._heard[place.gateway] = now
        if (known := self._find(place)) is not None:
            return known.ticket
        if demand.claims:
            self._check_bounds(demand.caller.tenant)
        claim = self._limiter.claim(demand.caller, demand.tokens) if demand.claims else Claim((), 0)
        held = _Held(Ticket(place, demand, self.standing(demand.caller)), claim, now)
        self._keep(held)
        heapq.heappush(self._deadlines, (now + demand.patience, place))
        return held.ticket

    def _check_bounds(self, tenant: str) -> None:
        for count, most, whose in (
            (self._queue.waiting(tenant), self._bounds.tenant, f" of tenant {tenant}"),
            (len(self._queue), self._bounds.total, ""),
        ):
            if count >= most:
                raise self._overloaded(f"{count:,} requests{whose} wait already, as many as may.")

    def _overloaded(self, message: str) -> OverloadedError:
        """An error that is worth a retry when the last one that was granted would have been."""
        wait = max(LEAST_RETRY_SECONDS, self._last_wait)
        return OverloadedError(message, remedy="Try again later; more replicas serve more at once.", retry_after=wait)

    def _keep(self, held: _Held) -> None:
        place, demand = held.ticket.place, held.ticket.demand
        self._held.setdefault(place.gateway, {})[place.number] = held
        if demand.runs:
            self._queue.push(held.tenant, held, weight=demand.caller.weight)
        else:
            held.running = True

    def _find(self, place: Place) -> _Held | None:
        return self._held.get(place.gateway, {}).get(place.number)

    def adopt(self, ticket: Ticket) -> None:
        """Take up a ticket that runs and is not known here, by a desk before this one, whatever is full."""
        if self._find(ticket.place) is not None:
            return
        demand, now = ticket.demand, self._clock()
        self._heard[ticket.place.gateway] = now
        claim = self._limiter.force(demand.caller, demand.tokens) if demand.claims else Claim((), 0)
        held = _Held(ticket, claim, now)
        self._keep(held)
        if demand.runs:
            self._start(held)

    def charge(self, place: Place, output_tokens: int) -> None:
        """The request has made so many output tokens by now; what was charged before is not charged again."""
        held = self._find(place)
        if held is not None and held.running:
            self._charge(held, output_tokens)
            # Of a request in portions nobody knows here which prompts have run: that is told when it leaves.
            prompt = held.ticket.demand.prompt_tokens if held.ticket.demand.runs else 0
            held.claim.use(prompt + output_tokens)

    def _charge(self, held: _Held, output_tokens: int) -> None:
        if not held.ticket.demand.runs:
            return
        more = max(0, output_tokens - held.charged)
        held.charged += more
        self._queue.charge(held.tenant, W_OUT * more)

    def leave(self, place: Place, used: Used | None = None) -> None:
        """The request is over, or nobody waits for it any more; what it did not use of its limits is given back.

        Without ``used`` that is what it was charged for. A place that is not known has left already.
        """
        held = self._find(place)
        if held is None:
            return
        if held.running and used is not None:
            self._charge(held, used.output_tokens)
            held.claim.use(used.tokens)
        self._end(held, "the request was given up.")

    def _end(self, held: _Held, why: str) -> None:
        place, demand = held.ticket.place, held.ticket.demand
        del self._held[place.gateway][place.number]
        held.claim.end()
        if not demand.runs:
            return
        if held.running:
            self._serving -= 1
            self._samples -= demand.samples
            self._tokens -= demand.tokens
        else:
            self._queue.remove(held.tenant, held)
            self._decided.append(Decision(held.ticket, self._overloaded(why)))

    def beat(self, gateway: str, numbers: Collection[int], issued: int) -> frozenset[int]:
        """The gateway is alive, and of its requests up to ``issued`` these are open; returns those not known here.

        What it held besides is given back.
        """
        self._heard[gateway] = self._clock()
        held = self._held.setdefault(gateway, {})
        for number in [number for number in held if number <= issued and number not in numbers]:
            self._end(held[number], "the request was given up.")
        return frozenset(numbers).difference(held)

    def decide(self) -> list[Decision]:
        """Those that waited until now and wait no more, in order; each is named once."""
        self._reclaim()
        self._expire()
        self._grant()
        decided, self._decided = self._decided, []
        return decided

    def _reclaim(self) -> None:
        """Give back what silent gateways hold."""
        now = self._clock()
        for gateway in [name for name, heard in self._heard.items() if now - heard > LEASE_SECONDS]:
            for held in list(self._held.get(gateway, {}).values()):
                self._end(held, "the gateway of the request fell silent.")
            self._held.pop(gateway, None)
            self._seen.pop(gateway, None)
            del self._heard[gateway]

    def _expire(self) -> None:
        """Refuse those whose patience has ended."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, place = heapq.heappop(self._deadlines)
            held = self._find(place)
            if held is not None and not held.running:
                self._end(held, f"the request waited for {held.ticket.demand.patience:g} s, and others go before it.")

    def _grant(self) -> None:
        """Start the heads of the queue while they fit; what fits but is not at the head waits, or large ones starve."""
        capacity = self.capacity
        while (held := self._queue.head()) is not None and self._fits(held.ticket.demand, capacity):
            self._last_wait = self._clock() - held.asked
            self._start(held)
            self._decided.append(Decision(held.ticket))

    def _fits(self, demand: Demand, capacity: Capacity) -> bool:
        """Whether there is room; what is larger than all the engines that are left runs when nothing else does."""
        if not self._serving:
            return capacity.samples > 0
        samples, tokens = self._samples + demand.samples, self._tokens + demand.tokens
        return samples <= capacity.samples and tokens <= capacity.tokens

    def _start(self, held: _Held) -> None:
        demand = held.ticket.demand
        self._queue.remove(held.tenant, held)
        self._queue.charge(held.tenant, W_IN * demand.prompt_tokens)
        held.running = True
        held.claim.begin()
        self._serving += 1
        self._samples += demand.samples
        self._tokens += demand.tokens
