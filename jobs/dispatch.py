"""Micro-batches to replicas: a bounded window in flight, failed calls sent again, poison isolated by halving."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from serving.errors import EngineDeadError
from serving.protocol import MicroBatch, MicroBatchResult, Request, Result, Sampling

Call = Callable[[MicroBatch], Awaitable[MicroBatchResult]]

LOST_REPLICA = (EngineDeadError, RayActorError, DeploymentUnavailableError)
"""What a call raises when its replica, not its content, may be at fault."""

RETRY_SECONDS = (0.5, 2.0, 5.0)


class Dispatcher:
    """Sends micro-batches, at most ``window`` at a time, first come first served."""

    def __init__(self, call: Call, *, window: int, max_attempts: int) -> None:
        self._call = call
        self._slots = asyncio.Semaphore(window)
        self._max_attempts = max_attempts
        self.retries = 0

    async def send(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[str, Result, int]]:
        """Answer every request: the replica's name, the result and how often it was tried.

        A batch whose replica is lost is sent again once; if that is lost too it is halved, until a row stands alone.
        Such a row is an error after ``max_attempts`` calls of its own.
        """
        async with self._slots:
            return await self._answer(list(requests), sampling, 1)

    async def _answer(self, requests: list[Request], sampling: Sampling, attempt: int) -> list[tuple[str, Result, int]]:
        try:
            batch = await self._call(MicroBatch(tuple(requests), sampling))
        except LOST_REPLICA as error:
            return await self._again(requests, sampling, attempt, error)
        except (RayTaskError, RayServeException) as error:
            return [("", _failed(request, error), attempt) for request in requests]
        return [(batch.replica, result, attempt) for result in batch.results]

    async def _again(
        self, requests: list[Request], sampling: Sampling, attempt: int, error: Exception
    ) -> list[tuple[str, Result, int]]:
        self.retries += 1
        if len(requests) == 1 and attempt >= self._max_attempts:
            return [("", _failed(requests[0], error), attempt)]
        await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1])
        if len(requests) == 1 or attempt == 1:
            return await self._answer(requests, sampling, attempt + 1)
        middle = len(requests) // 2
        first = await self._answer(requests[:middle], sampling, 1 if middle == 1 else attempt)
        return first + await self._answer(requests[middle:], sampling, 1 if len(requests) - middle == 1 else attempt)


def _failed(request: Request, error: Exception) -> Result:
    code = "engine_dead" if isinstance(error, LOST_REPLICA) else "replica_failed"
    words = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return Result(request.key, error_code=code, error_message=words[-1])
