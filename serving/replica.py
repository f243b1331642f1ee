"""The Ray Serve deployment that owns one engine."""

import asyncio
import os
import time
from dataclasses import replace

from ray import serve

from serving.config import EngineConfig, ReplicaConfig
from serving.cores import claim_cores
from serving.engine import VllmEngine
from serving.errors import EngineDeadError, EngineGoneError, EngineHungError
from serving.pace import UNMEASURED_SECONDS, Gate, Pace
from serving.protocol import Engine, EngineInfo, EngineStats, MicroBatch, MicroBatchResult, Result
from serving.simulated import SimulatedEngine


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

    async def generate(self, batch: MicroBatch) -> MicroBatchResult:
        """Answer every request of a micro-batch, in its order.

        Raises ``EngineGoneError`` when the engine is dead already, ``EngineDeadError`` when it dies meanwhile,
        ``EngineHungError`` when it stands still for longer than its measured pace explains.
        """
        async with self._gate.enter(alone=batch.alone):
            try:
                await self.check_health()
            except EngineDeadError as error:
                raise EngineGoneError(error.message, remedy=error.remedy) from None
            results = await self._answer(batch)
            return MicroBatchResult(self._name, results, self._engine.stats().waiting)

    async def _answer(self, batch: MicroBatch) -> tuple[Result, ...]:
        started = time.monotonic()
        tasks = [
            asyncio.ensure_future(
                self._engine.generate(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
            )
            for r in batch.requests
        ]
        answers = asyncio.gather(*tasks)
        try:
            results = await self._unless_hung(answers, batch.patience or UNMEASURED_SECONDS)
        finally:
            answers.cancel()
            if answers.done() and not answers.cancelled():
                answers.exception()  # Seen: the caller learns why it gave up, not what came after.
            for task in tasks:
                task.cancel()
        self._pace.record(time.monotonic() - started)
        return tuple(results)

    async def _unless_hung(self, answers: "asyncio.Future[list[Result]]", unmeasured: float) -> list[Result]:
        """Wait as long as the engine steps; one that does not, for its measured patience, is hung for everybody."""
        while not self._hung.done():
            steps, patience = self._engine.stats().steps, self._pace.patience or unmeasured
            await asyncio.wait((answers, self._hung), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if not self._hung.done() and self._engine.stats().steps == steps:
                self._hung.set_result(f"the engine hangs: it made no step in {patience:.0f} s.")
        raise self._hang()

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
