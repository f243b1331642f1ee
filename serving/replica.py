"""The Ray Serve deployment that owns one engine."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from ray import serve

from serving.config import EngineConfig, ReplicaConfig
from serving.cores import claim_cores
from serving.engine import VllmEngine
from serving.errors import EngineDeadError, EngineGoneError, EngineHungError
from serving.merging import in_bunches, merged
from serving.pace import UNMEASURED_SECONDS, Gate, Pace, Stall
from serving.protocol import (
    BATCH_PRIORITY,
    Engine,
    EngineInfo,
    EngineStats,
    Growth,
    MicroBatch,
    MicroBatchResult,
    Result,
)
from serving.simulated import SimulatedEngine
from serving.tagging import generate
from serving.tenants.tags import Tags

T = TypeVar("T")

STREAM_SECONDS = 0.02
"""Between two messages of a stream: what comes faster comes together, since messages cost more than tokens."""

ALONE_SECONDS = 0.05
"""Serve sends what a replica has said a moment later: long enough before a row that may kill the process."""

ANSWER_SECONDS = 1.0
"""A row that is done waits at most so long for its neighbours in the micro-batch: only what has come can be kept.

As often it is asked whether the engine lives.
"""


async def start_engine(config: EngineConfig, *, cores: tuple[int, ...] = (), beside: int | None = None) -> Engine:
    """The engine that ``config.kind`` names, ready to answer."""
    if config.kind == "vllm":
        return await VllmEngine.start(config, cores=cores, beside=beside)
    return SimulatedEngine(config, beside=beside)


class Replica:
    """One engine behind Ray Serve: micro-batches in, results out, many calls in flight.

    Its health check fails when the engine is dead or hung, so that Serve starts another; on a scale-down or a rolling
    update Serve lets the calls in flight finish before it ends the engine.
    """

    async def __init__(self, engine: EngineConfig, replica: ReplicaConfig) -> None:  # type: ignore[misc]
        self._fingerprint = engine.fingerprint
        self._name = serve.get_replica_context().replica_id.unique_id
        self._gate = Gate()
        self._pace = Pace()
        self._tags = Tags()
        self._hung: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        claim = engine.kind == "vllm" and not replica.use_gpu and replica.cores
        cores = claim_cores(replica.cores) if claim else ()
        self._engine = await start_engine(engine, cores=cores, beside=replica.rows_beside)

    async def generate(self, batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        """Answer every request of a micro-batch: all at once, or every ``ANSWER_SECONDS`` those that are done by then.

        Before a micro-batch that goes alone comes a result of no rows: of jobs' rows none but its own are in the engine
        from then on.
        Raises ``EngineGoneError`` when the engine is dead already, ``EngineDeadError`` when it dies meanwhile,
        ``EngineHungError`` when it stands still for longer than its measured pace explains.
        """
        async with self._admitted(batch):
            if batch.alone:
                yield MicroBatchResult(self._name, ())
                await asyncio.sleep(ALONE_SECONDS)
            async for results in self._answer(batch):
                yield MicroBatchResult(self._name, results, self._engine.stats().waiting)

    async def stream(self, batch: MicroBatch) -> AsyncIterator[list[Growth]]:
        """Answer every request of a micro-batch as its completions grow; raises what ``generate`` raises."""
        async with self._admitted(batch):
            sources = [
                self._engine.stream(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
                for r in batch.requests
            ]
            async with (
                aclosing(in_bunches(merged(sources), STREAM_SECONDS)) as bunches,
                aclosing(self._patiently(batch, bunches)) as growing,
            ):
                async for growths in growing:
                    yield growths

    @asynccontextmanager
    async def _admitted(self, batch: MicroBatch) -> AsyncIterator[None]:
        """Inside, the micro-batch may be in the engine; how long that takes is the replica's pace.

        A job's rows that may be what kills engines go alone, but people do not wait for that: it may take minutes.
        """
        passes = batch.priority < BATCH_PRIORITY
        async with nullcontext() if passes else self._gate.enter(alone=batch.alone):
            try:
                await self.check_health()
            except EngineDeadError as error:
                raise EngineGoneError(error.message, remedy=error.remedy) from None
            started = time.monotonic()
            yield
            self._pace.record(time.monotonic() - started)

    async def _answer(self, batch: MicroBatch) -> AsyncIterator[tuple[Result, ...]]:
        tasks = [asyncio.ensure_future(generate(self._engine, self._tags, batch, r)) for r in batch.requests]
        answers = asyncio.gather(*tasks)
        # Whoever gives up learns why it did, not what came after.
        answers.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        stall = Stall(self._engine.stats().steps)
        try:
            while not answers.done():
                await self._wait(answers, stall, batch)
                if answers.done():
                    answers.result()
                if done := [task for task in tasks if task.done()]:
                    tasks = [task for task in tasks if not task.done()]
                    yield tuple(task.result() for task in done)
        finally:
            answers.cancel()
            for task in tasks:
                task.cancel()

    async def _patiently(self, batch: MicroBatch, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What a source gives, for as long as the engine makes steps."""
        stall = Stall(self._engine.stats().steps)
        while True:
            upcoming = asyncio.ensure_future(anext(source, None))
            try:
                while not upcoming.done():
                    await self._wait(upcoming, stall, batch)
            finally:
                upcoming.cancel()
                # A generator cannot be closed while something waits for its next item.
                await asyncio.wait((upcoming,))
            if (item := upcoming.result()) is None:
                return
            yield item

    async def _wait(self, answer: "asyncio.Future[Any]", stall: Stall, batch: MicroBatch) -> None:
        """Wait for an answer, for a while.

        Raises ``EngineHungError`` once the engine is known to stand still, ``EngineDeadError`` when it has died without
        a word to whoever waits.
        """
        patience = self._pace.patience or batch.patience or UNMEASURED_SECONDS
        timeout = min(stall.left(patience), ANSWER_SECONDS)
        await asyncio.wait((answer, self._hung), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return
        if not self._hung.done() and stall.is_over(self._engine.stats().steps, patience):
            self._hung.set_result(f"the engine hangs: it made no step in {patience:.0f} s.")
        await self.check_health()

    def _hang(self) -> EngineHungError:
        return EngineHungError(self._hung.result(), remedy="Its replica is started again.")

    async def stats(self, lane: int = 0) -> tuple[str, EngineStats]:
        """This replica's name and its engine's latest reading; ``lane`` is for the router."""
        try:
            await self.check_health()
            is_alive = True
        except EngineDeadError:
            is_alive = False
        return self._name, replace(self._engine.stats(), cpu_seconds=time.process_time(), is_alive=is_alive)

    async def describe(self) -> tuple[str, EngineInfo]:
        """The fingerprint of the engine's configuration, and what the engine is."""
        return self._fingerprint, self._engine.info

    async def pid(self) -> int:
        """The process id, for whoever wants to kill it."""
        return os.getpid()

    async def check_health(self) -> None:
        """Called by Serve; raises ``EngineDeadError`` when the engine is dead, ``EngineHungError`` when it is hung."""
        if self._hung.done():
            raise self._hang()
        await self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
