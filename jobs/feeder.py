"""A feeder: takes units through preparation, dispatch, journal and write, several at a time; a Ray actor."""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from jobs.dispatch import Call, Dispatcher
from jobs.lanes import Lanes, Ticket
from jobs.plan import InputFile, Unit
from jobs.score import SCORING
from jobs.tally import Tally
from jobs.unit import FeederConfig, UnitWork
from serving.formats import Format, load_format
from serving.protocol import MicroBatch, MicroBatchResult, Sampling

JOURNAL_SECONDS = 4.0
"""Pause between two segments of a unit, so that with the time to write one they come at least every 5 s."""

GC_ALLOCATIONS = 100_000
"""Objects made between two collections; with Python's own 700 a sixth of a feeder's time is collecting nothing."""


@dataclass(frozen=True, slots=True)
class FeederReport:
    """Sums of the units under way, by index; a few infills; what must be told, which is told once; CPU seconds."""

    units: dict[int, Tally] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """How to call an application: its replicas, each with ``window`` calls of this feeder in flight at first.

    A call is a micro-batch of ``batch_rows`` rows. Where there are more than two, they weigh no more than ``room``
    tokens. ``block_size`` tokens are a block of the engines' prefix caches.
    """

    replicas: int
    window: int
    batch_rows: int
    block_size: int
    room: float = math.inf


class Flight:
    """A unit whose rows are with the engines: ``left`` have not come back; ``done`` when none has."""

    def __init__(self, work: UnitWork, left: int) -> None:
        self.work = work
        self.left = left
        self.sends: set[asyncio.Task[None]] = set()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.land(0)

    def land(self, rows: int) -> None:
        """Count rows that came back, or that will not."""
        self.left -= rows
        if self.left == 0 and not self.done.done():
            self.done.set_result(None)

    def send(self, sending: Coroutine[Any, Any, None]) -> None:
        """Answer some of its rows beside others; whatever that raises gives the unit up."""
        task = asyncio.create_task(sending)
        self.sends.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Task[None]") -> None:
        self.sends.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.done.done():
            self.done.set_exception(error)


class Feeder:
    """Runs units through the lanes to the replicas."""

    def __init__(self, config: FeederConfig) -> None:
        # What lives as long as the process is not looked through again, and the rows' many lists seldom.
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, 50, 50)
        self._began = time.process_time()
        self._config = config
        self._format: Format = load_format(config.format, tokenizer_of=config.tokenizer)
        self._reader = config.reader()
        self._reading = asyncio.Lock()
        self._ready = asyncio.Event()
        self._stopping = False
        self._dispatcher: Dispatcher | None = None
        self._lanes = Lanes(0, 0, 1)
        self._batch_rows = self._block_size = 1
        self._flights: dict[int, Flight] = {}
        self._works: dict[int, UnitWork] = {}
        self._said: list[str] = []
        self._isolates = False
        self._tasks: set[asyncio.Task[Tally | None]] = set()
        self._sampling = SCORING if config.spec.task == "score" else _infilling(config, self._format)

    async def attach(self, deployment: str, app: str, route: Route) -> None:
        """Begin to call the application's replicas."""
        from ray import serve

        from serving.router import streamed

        handle = streamed(serve.get_deployment_handle(deployment, app_name=app))

        def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            results: AsyncIterator[MicroBatchResult] = handle.generate.remote(batch)
            return results

        self.connect(call, route)

    def connect(self, call: Call, route: Route) -> None:
        """Begin to send micro-batches with ``call``."""
        spec = self._config.spec
        self._dispatcher = Dispatcher(
            call, max_attempts=spec.max_attempts, cache_salt=spec.cache_salt, weight=spec.weight
        )
        self._lanes = Lanes(route.replicas, route.window, route.batch_rows, n=spec.n, room=route.room)
        self._batch_rows, self._block_size = route.batch_rows, route.block_size
        self._ready.set()

    async def widen(self, replicas: int) -> None:
        """Send to so many replicas from now on, where there were fewer."""
        self._lanes.widen(replicas)
        self._pump()

    async def progress(self) -> FeederReport:
        """How far the units under way are."""
        report = FeederReport(cpu_seconds=time.process_time() - self._began)
        for work in self._works.values():
            report.units[work.unit.index] = work.live
            report.examples.extend(work.examples)
            report.said.extend(work.said)
            work.said = []
        report.said.extend(self._said)
        self._said = []
        return report

    async def stop(self, drain_seconds: float) -> None:
        """Send nothing more, wait up to ``drain_seconds`` for what is in flight, and journal what is finished."""
        self._stopping = True
        if self._dispatcher is not None:
            self._dispatcher.close()
        for flight in self._flights.values():
            flight.land(self._lanes.drop(flight.work.unit.index))
        self._ready.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=drain_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(self, unit: Unit, file: InputFile) -> Tally | None:
        """Take one unit from its rows to its part; returns its sums, None if ``stop`` came first.

        Raises what ``UnitWork`` raises.
        """
        task = asyncio.ensure_future(self._run(UnitWork(self._config, self._format, unit, file)))
        self._tasks.add(task)
        try:
            return await task
        finally:
            self._tasks.discard(task)

    async def _run(self, work: UnitWork) -> Tally | None:
        started = time.monotonic()
        try:
            async with self._reading:
                if self._stopping:
                    return None
                self._works[work.unit.index] = work
                await asyncio.to_thread(work.prepare, self._reader)
            await self._ready.wait()
            await self._answer(work)
            if work.missing:
                return None
            async with self._reading:
                tally = await asyncio.to_thread(work.finish)
        finally:
            self._works.pop(work.unit.index, None)
            self._said += work.said
        tally.seconds = time.monotonic() - started
        return tally

    async def _answer(self, work: UnitWork) -> None:
        """Let the lanes work off a unit, and journal what is answered meanwhile."""
        groups, weights = await asyncio.to_thread(work.groups, self._batch_rows, self._block_size)
        if self._stopping:
            return
        flight = Flight(work, sum(len(batch) for group in groups for batch in group))
        self._flights[work.unit.index] = flight
        self._lanes.add(work.unit.index, groups, weights)
        journal = asyncio.create_task(self._keep_journal(work))
        try:
            self._pump()
            await asyncio.wait({flight.done, journal}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (flight.done, journal):
                if ended.done():
                    ended.result()
        finally:
            journal.cancel()
            self._lanes.drop(work.unit.index)
            del self._flights[work.unit.index]
            for task in flight.sends:
                task.cancel()
            if work.missing:
                await asyncio.to_thread(work.publish_journal)

    def _pump(self) -> None:
        """Send what the lanes have room for, one micro-batch of each in turn."""
        while sum(self._take(lane) for lane in range(len(self._lanes))):
            pass

    def _take(self, lane: int) -> bool:
        """Send a lane's next micro-batch; whether there was one."""
        ticket = None if self._stopping else self._lanes.take(lane)
        if ticket is None:
            return False
        flight = self._flights[ticket.unit]
        flight.send(self._send(flight, ticket))
        return True

    async def _send(self, flight: Flight, ticket: Ticket) -> None:
        assert self._dispatcher is not None

        def suspected() -> None:
            if not self._isolates:
                self._isolates = True
                self._said.append("engines die with some rows: looking for those at fault, one engine after another")
            self._lanes.settle(ticket, answered=False)
            self._pump()

        requests, waiting, answered = flight.work.requests(ticket.rows), None, 0
        sending = self._dispatcher.send(requests, self._sampling, lane=ticket.lane, suspected=suspected)
        async for answers in sending:
            for answer in answers:
                flight.work.answer(answer.result, replica=answer.replica, attempts=answer.attempts)
            waiting, answered = answers[-1].waiting, answered + len(answers)
            if answered < len(requests):  # Others take the places of those that are done, however long the rest takes.
                self._lanes.lighten(ticket, 1 - answered / len(requests))
                while self._take(ticket.lane):
                    pass
        self._lanes.settle(ticket, answered=answered > 0, waiting=waiting)
        flight.land(len(ticket.rows))
        self._pump()

    async def _keep_journal(self, work: UnitWork) -> None:
        while True:
            await asyncio.sleep(JOURNAL_SECONDS)
            await asyncio.to_thread(work.publish_journal)


def _infilling(config: FeederConfig, fmt: Format) -> Sampling:
    spec = config.spec
    return Sampling(
        max_tokens=spec.max_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repetition_penalty,
        stop_token_ids=fmt.stop_token_ids,
        logprobs="mean_logprob" in spec.extra_columns,
        stop=spec.stop,
        format=config.format,
        tokenizer=config.tokenizer,
    )
