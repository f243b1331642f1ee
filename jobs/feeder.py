"""A feeder: takes units through preparation, dispatch, journal and write, several at a time; a Ray actor."""

import asyncio
import gc
import time
from dataclasses import dataclass, field

from jobs.dispatch import Dispatcher
from jobs.plan import InputFile, Unit
from jobs.reader import UnitReader
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
    """Sums of the units under way, by index; a few infills; and what must be told, which is told once."""

    units: dict[int, Tally] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class Feeder:
    """Runs units through one window of micro-batches."""

    def __init__(self, config: FeederConfig) -> None:
        # What lives as long as the process is not looked through again, and the rows' many lists seldom.
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, 50, 50)
        self._config = config
        spec = config.spec
        self._format: Format = load_format(config.format, tokenizer_of=config.tokenizer)
        self._reader = UnitReader(config.input, config.schema.names)
        self._reading = asyncio.Lock()
        self._ready = asyncio.Event()
        self._stopping = False
        self._dispatcher: Dispatcher | None = None
        self._works: dict[int, UnitWork] = {}
        self._tasks: set[asyncio.Task[Tally | None]] = set()
        self._sampling = Sampling(
            max_tokens=spec.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            stop_token_ids=self._format.stop_token_ids,
            logprobs="mean_logprob" in spec.extra_columns,
            stop=spec.stop,
            format=config.format,
            tokenizer=config.tokenizer,
        )

    async def attach(self, deployment: str, app: str, window: int) -> None:
        """Begin to call the application's replicas, at most ``window`` micro-batches at a time."""
        from ray import serve

        handle = serve.get_deployment_handle(deployment, app_name=app).options(
            _by_reference=False, request_serialization="pickle", response_serialization="pickle"
        )

        async def call(batch: MicroBatch) -> MicroBatchResult:
            result: MicroBatchResult = await handle.generate.remote(batch)
            return result

        self._dispatcher = Dispatcher(call, window=window, max_attempts=self._config.spec.max_attempts)
        self._ready.set()

    async def progress(self) -> FeederReport:
        """How far the units under way are."""
        report = FeederReport()
        for work in self._works.values():
            report.units[work.unit.index] = work.live
            report.examples.extend(work.examples)
            report.said.extend(work.said)
            work.said = []
        return report

    async def stop(self, drain_seconds: float) -> None:
        """Send nothing more, wait up to ``drain_seconds`` for what is in flight, and journal what is finished."""
        self._stopping = True
        if self._dispatcher is not None:
            self._dispatcher.close()
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
        async with self._reading:
            if self._stopping:
                return None
            self._works[work.unit.index] = work
            try:
                await asyncio.to_thread(work.prepare, self._reader)
            except BaseException:
                del self._works[work.unit.index]
                raise
        try:
            await self._ready.wait()
            await self._answer(work)
            if work.missing:
                return None
            async with self._reading:
                tally = await asyncio.to_thread(work.finish)
        finally:
            del self._works[work.unit.index]
        tally.seconds = time.monotonic() - started
        return tally

    async def _answer(self, work: UnitWork) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                journal = group.create_task(self._keep_journal(work))
                async with asyncio.TaskGroup() as sending:
                    for rows in work.micro_batches():
                        sending.create_task(self._send(work, rows))
                journal.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            if work.missing:
                await asyncio.to_thread(work.publish_journal)

    async def _send(self, work: UnitWork, rows: list[int]) -> None:
        assert self._dispatcher is not None
        for answer in await self._dispatcher.send(work.requests(rows), self._sampling):
            work.answer(answer.result, replica=answer.replica, attempts=answer.attempts)

    async def _keep_journal(self, work: UnitWork) -> None:
        while True:
            await asyncio.sleep(JOURNAL_SECONDS)
            await asyncio.to_thread(work.publish_journal)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a group of groups."""
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
