"""The desk where gateways have their requests admitted: one Ray actor an application, and the gateways' way to it.

The actor is detached: it outlives the gateway that made it, and ends itself when no gateway has reported for a while,
as when the application was deleted. Ray starts it again when its node is lost; a new one admits nobody before all
gateways have reported to it what runs, and what its predecessor had counted of the last minute is lost.
"""

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from serving.errors import LimitError, OverloadedError, SpanfillError, UsageError
from serving.lifeline import NAMESPACE
from serving.tenants.admission import Admission
from serving.tenants.caller import Caller
from serving.tenants.limits import Standing
from serving.tenants.tickets import USUAL_BOUNDS, Bounds, Capacity, Demand, Place, Reply, Report, Ticket, Used

BEAT_SECONDS = 2.0
"""A gateway reports at least so often, well within ``LEASE_SECONDS``."""

REPORT_SECONDS = 0.25
"""Output tokens are told so often at most; the end of a request is told at once, when it makes room for others."""

SETTLE_SECONDS = BEAT_SECONDS + 0.5
"""A new actor admits nobody for so long: gateways that outlived the one before it have reported by then."""

SILENCE_SECONDS = 60.0
"""An actor to which nobody has reported for so long ends itself."""

TICK_SECONDS = 0.25
PAUSE_SECONDS = 0.2
"""Before an actor that does not answer is asked again."""

GRACE_SECONDS = 5.0
"""How much longer than its patience a request waits for an actor that does not answer at all."""

SPARE_CALLS = 1_000
"""Calls that the actor takes while as many requests wait in it as may."""


class Clerk:
    """The actor of an application: answers a gateway when its request may run, or is refused.

    Refusals are returned, not raised: they are many when there is much to do, and Ray formats a traceback for each. It
    ends after ``silence`` seconds without a report.
    """

    def __init__(self, app: str, bounds: Bounds, silence: float) -> None:
        self._app = app
        self._silence = silence
        self._heard = time.monotonic()
        self._admission = Admission(bounds=bounds)
        self._waiters: dict[Place, asyncio.Future[Ticket | SpanfillError]] = {}
        self._settled = asyncio.Event()
        self._ticks = asyncio.get_event_loop().create_task(self._tick())

    async def admit(self, place: Place, demand: Demand) -> Ticket | SpanfillError:
        """The ticket once it is granted, or why it is not; may be asked again for the same place."""
        await self._settled.wait()
        try:
            ticket = self._admission.ask(demand, place)
        except (LimitError, UsageError) as refusal:
            return refusal
        if self._admission.is_running(place):
            return ticket
        waiter = self._waiters.setdefault(place, asyncio.get_running_loop().create_future())
        self._turn()
        return await waiter

    async def report(self, gateway: str, report: Report) -> Reply:
        """What became of a gateway's requests."""
        self._heard = time.monotonic()
        self._admission.resize(gateway, report.capacity)
        for ticket in report.again:
            self._admission.adopt(ticket)
        for number, made in report.made.items():
            self._admission.charge(Place(gateway, number), made)
        for number, used in report.left.items():
            self._admission.leave(Place(gateway, number), used)
        unknown = self._admission.beat(gateway, report.running | report.waiting, report.issued) & report.running
        self._turn()
        return Reply(self._admission.serving, unknown)

    async def standing(self, caller: Caller) -> Standing:
        """What a caller may ask for now."""
        return self._admission.standing(caller)

    async def _tick(self) -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        self._settled.set()
        while time.monotonic() - self._heard < self._silence:
            await asyncio.sleep(TICK_SECONDS)
            self._turn()
        await asyncio.to_thread(end_clerk, self._app)

    def _turn(self) -> None:
        for decision in self._admission.decide():
            waiter = self._waiters.pop(decision.ticket.place, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(decision.refusal or decision.ticket)


def find_clerk(app: str, bounds: Bounds, silence: float = SILENCE_SECONDS) -> Any:
    """The application's actor, made if there is none; raises ``ValueError`` when another gateway is making it."""
    options = {"name": _name(app), "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    options |= {"num_cpus": 0, "max_restarts": -1, "max_concurrency": bounds.total + SPARE_CALLS}
    return ray.remote(Clerk).options(**options).remote(app, bounds, silence)


def end_clerk(app: str) -> None:
    """End the application's actor for good, if there is one; the next gateway that needs one makes another."""
    with suppress(ValueError):
        ray.kill(ray.get_actor(_name(app), NAMESPACE))


def _name(app: str) -> str:
    return f"{app}-desk"


class Desk:
    """A gateway's way to the actor; make it in the event loop that uses it, and ``close`` it there.

    ``capacity`` is what the engines hold. ``serving`` is how many requests of all gateways run, as of the last report.
    """

    def __init__(self, app: str, capacity: Capacity, *, bounds: Bounds = USUAL_BOUNDS) -> None:
        self.serving = 0
        self._capacity = capacity
        self._share: Capacity | None = None
        self._app = app
        self._bounds = bounds
        self._clerk: Any = None
        self._finding = asyncio.Lock()
        self._gateway = uuid.uuid4().hex
        self._issued = 0
        self._waiting: set[int] = set()
        self._running: dict[int, Ticket] = {}
        self._unknown: frozenset[int] = frozenset()
        self._made: dict[int, int] = {}
        self._left: dict[int, Used | None] = {}
        self._news = asyncio.Event()
        self._news.set()
        self._reports = asyncio.get_running_loop().create_task(self._run())

    async def admit(self, demand: Demand) -> Ticket:
        """Wait until a request may run; cancelling that leaves the queue. ``leave`` with the ticket, however it ends.

        Raises ``LimitError`` above a limit, ``OverloadedError`` when too many wait, or it waited beyond its patience,
        and ``UsageError`` for more tokens than may be used in a whole minute.
        """
        if self._reports.done():
            self._reports.result()  # Nobody would learn that the request ended: raise what stopped the reports.
        self._issued += 1
        place = Place(self._gateway, self._issued)
        self._waiting.add(place.number)
        try:
            async with asyncio.timeout(demand.patience + GRACE_SECONDS):
                answer = await self._ask(place, demand)
        except TimeoutError:
            self._forget(place.number)
            raise OverloadedError("nobody admits requests at present.", remedy="Try again in a few seconds.") from None
        except asyncio.CancelledError:
            self._forget(place.number)
            raise
        finally:
            self._waiting.discard(place.number)
        if not isinstance(answer, Ticket):
            raise answer
        self._running[place.number] = answer
        return answer

    async def _ask(self, place: Place, demand: Demand) -> Ticket | SpanfillError:
        while True:
            clerk = await self._reach()
            asked = asyncio.wrap_future(clerk.admit.remote(place, demand).future())
            # Of one that is cancelled while it waits nobody else takes what it ends with.
            asked.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            try:
                answer: Ticket | SpanfillError = await asked
            except RayActorError as error:
                await self._lose(clerk, error)
            else:
                return answer

    @property
    def share(self) -> Capacity | None:
        """What of the engines one request may fill at once, by those that were there last; None before any was."""
        return self._share

    def resize(self, capacity: Capacity) -> None:
        """Replicas came or went."""
        self._capacity = capacity
        if capacity.samples:
            self._share = capacity.share
        self._news.set()

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """The request has made so many output tokens by now, of all its samples."""
        if ticket.place.number in self._running:
            self._made[ticket.place.number] = output_tokens

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """The request ended. Without ``used`` it used what it was charged for; a second time it does nothing."""
        if self._running.pop(ticket.place.number, None) is not None:
            self._forget(ticket.place.number, used)

    def _forget(self, number: int, used: Used | None = None) -> None:
        self._left[number] = used
        self._news.set()

    async def standing(self, caller: Caller) -> Standing:
        """What a caller may ask for now; nothing is known of it while the actor does not answer."""
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                found: Standing = await (await self._reach()).standing.remote(caller)
        except (RayActorError, TimeoutError):
            return Standing()
        return found

    async def close(self) -> None:
        """Give back whatever is open, and report no more."""
        self._reports.cancel()
        self._running.clear()
        self._waiting.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await self._report()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._news.wait()
            if self._news.is_set() or self._made or clock() >= due:
                self._news.clear()
                await self._report()
                due = clock() + BEAT_SECONDS

    async def _report(self) -> None:
        """Tell the actor what it does not know yet; what it did not hear is told again."""
        clerk = await self._reach()
        again = tuple(self._running[number] for number in self._unknown if number in self._running)
        made, left = dict(self._made), dict(self._left)
        running, waiting = frozenset(self._running), frozenset(self._waiting)
        report = Report(self._capacity, again, made, left, running, waiting, self._issued)
        try:
            reply: Reply = await clerk.report.remote(self._gateway, report)
        except RayActorError as error:
            await self._lose(clerk, error)
            return
        self._made = {number: count for number, count in self._made.items() if made.get(number) != count}
        self._left = {number: used for number, used in self._left.items() if number not in left}
        self.serving, self._unknown = reply.serving, reply.unknown
        if self._unknown:
            self._news.set()

    async def _reach(self) -> Any:
        """The actor: the one that is known, else whichever is found or made."""
        async with self._finding:
            while self._clerk is None:
                with suppress(ValueError, RayError):  # Another gateway is making it, or Ray itself is away.
                    self._clerk = await asyncio.to_thread(find_clerk, self._app, self._bounds)
                    break
                await asyncio.sleep(PAUSE_SECONDS)
            return self._clerk

    async def _lose(self, clerk: Any, error: RayActorError) -> None:
        """An actor did not answer: try again after a pause, with another if it is dead, and tell it what runs."""
        if self._clerk is clerk and isinstance(error, ActorDiedError):
            self._clerk = None
        self._unknown = frozenset(self._running)
        self._news.set()
        await asyncio.sleep(PAUSE_SECONDS)
