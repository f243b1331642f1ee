"""The Ray Serve deployment that owns one engine."""

import asyncio
import os

from ray import serve

from serving.config import EngineConfig, ReplicaConfig
from serving.cores import claim_cores
from serving.engine import VllmEngine
from serving.protocol import Engine, EngineInfo, EngineStats, MicroBatch, MicroBatchResult
from serving.simulated import SimulatedEngine


async def start_engine(config: EngineConfig, *, cores: tuple[int, ...] = ()) -> Engine:
    """The engine that ``config.kind`` names, ready to answer."""
    if config.kind == "vllm":
        return await VllmEngine.start(config, cores=cores)
    return SimulatedEngine(config)


class Replica:
    """One engine behind Ray Serve: micro-batches in, results out, many calls in flight.

    Its health check fails when the engine is dead, so that Serve starts another; on a scale-down or a rolling update
    Serve lets the calls in flight finish before it ends the engine.
    """

    async def __init__(self, engine: EngineConfig, replica: ReplicaConfig) -> None:  # type: ignore[misc]
        self._fingerprint = engine.fingerprint
        self._name = serve.get_replica_context().replica_id.unique_id
        claim = engine.kind == "vllm" and not replica.use_gpu and replica.cores
        cores = claim_cores(replica.cores) if claim else ()
        self._engine = await start_engine(engine, cores=cores)

    async def generate(self, batch: MicroBatch) -> MicroBatchResult:
        """Answer every request of a micro-batch, in its order; raises ``EngineDeadError`` if the engine dies."""
        tasks = [
            asyncio.ensure_future(
                self._engine.generate(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
            )
            for r in batch.requests
        ]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return MicroBatchResult(self._name, tuple(results))

    async def stats(self) -> tuple[str, EngineStats]:
        """This replica's name and its engine's latest reading."""
        return self._name, self._engine.stats()

    async def describe(self) -> tuple[str, EngineInfo]:
        """The fingerprint of the engine's configuration, and what the engine is."""
        return self._fingerprint, self._engine.info

    async def pid(self) -> int:
        """The process id, for whoever wants to kill it."""
        return os.getpid()

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine is dead."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
