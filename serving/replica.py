"""The Ray Serve deployment that owns one engine."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from ray import serve

from serving.config import EngineConfig, ReplicaConfig
from serving.cores import claim_cores
from serving.engine import VllmEngine
from serving.errors import EngineDeadError, EngineGoneError, EngineHungError
from serving.pace import UNMEASURED_SECONDS, Gate, Pace
from serving.protocol import Engine, EngineInfo, EngineStats, MicroBatch, MicroBatchResult, Result
from serving.simulated import SimulatedEngine

ANSWER_SECONDS = 2.0
"""A row that is done waits at most so long for its neighbours in the micro-batch: only what has come can be kept."""


async def start_engine(config: EngineConfig, *, cores: tuple[int, ...] = ()) -> Engine:
    """The engine that ``config.kind`` names, ready to answer."""
    if config.kind == "vllm":
        return await VllmEngine.start(config, cores=cores)
    return SimulatedEngine(config)


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
        self._hung: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        claim = engine.kind == "vllm" and not replica.use_gpu and replica.cores
        cores = claim_cores(replica.cores) if claim else ()
        self._engine = await start_engine(engine, cores=cores)

    async def generate(self, batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        """Answer every request of a micro-batch: all at once, or every ``ANSWER_SECONDS`` those that are done by then.

        Raises ``EngineGoneError`` when the engine is dead already, ``EngineDeadError`` when it dies meanwhile,
        ``EngineHungError`` when it stands still for longer than its measured pace explains.
        """
        async with self._gate.enter(alone=batch.alone):
            try:
                await self.check_health()
            except EngineDeadError as error:
                raise EngineGoneError(error.message, remedy=error.remedy) from None
            started = time.monotonic()
            async for results in self._answer(batch):
                yield MicroBatchResult(self._name, results, self._engine.stats().waiting)
            self._pace.record(time.monotonic() - started)

    async def _answer(self, batch: MicroBatch) -> AsyncIterator[tuple[Result, ...]]:
        tasks = [
            asyncio.ensure_future(
                self._engine.generate(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
            )
            for r in batch.requests
        ]
        answers = asyncio.gather(*tasks)
        # Whoever gives up learns why it did, not what came after.
        answers.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        steps, looked = self._engine.stats().steps, time.monotonic()
        try:
            while not answers.done():
                patience = self._pace.patience or batch.patience or UNMEASURED_SECONDS
                left = looked + patience - time.monotonic()
                timeout = max(0.0, min(left, ANSWER_SECONDS))
                await asyncio.wait((answers, self._hung), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if answers.done():
                    answers.result()
                elif self._hung.done():
                    raise self._hang()
                elif time.monotonic() >= looked + patience:
                    before, steps, looked = steps, self._engine.stats().steps, time.monotonic()
                    if steps == before:
                        self._hung.set_result(f"the engine hangs: it made no step in {patience:.0f} s.")
                        raise self._hang()
                if done := [task for task in tasks if task.done()]:
                    tasks = [task for task in tasks if not task.done()]
                    yield tuple(task.result() for task in done)
        finally:
            answers.cancel()
            for task in tasks:
                task.cancel()

    def _hang(self) -> EngineHungError:
        return EngineHungError(self._hung.result(), remedy="Its replica is started again.")

    async def stats(self, lane: int = 0) -> tuple[str, EngineStats]:
        """This replica's name and its engine's latest reading; ``lane`` is for the router."""
        return self._name, replace(self._engine.stats(), cpu_seconds=time.process_time())

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
