"""Micro-batches to replicas: lost calls sent again, poison isolated by halving.

A call that is lost with its replica says little of its rows: the machine may have failed, or a neighbour in the same
engine. So a micro-batch is sent again as it is; one that is lost again is suspect, and from then on its rows are alone
in the engine that they are sent to, one suspect at a time, so that a further loss is theirs. A suspect is halved until
the row that kills or hangs its engine stands alone.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from serving.errors import EngineDeadError, EngineError, EngineGoneError
from serving.pace import Pace
from serving.protocol import MicroBatch, MicroBatchResult, Request, Result, Sampling

Call = Callable[[MicroBatch], AsyncIterator[MicroBatchResult]]
"""Sends a micro-batch and gives the answers to its requests, some at a time, as the engine finishes them."""

NOT_REACHED = (EngineGoneError, DeploymentUnavailableError, ObjectLostError)
"""What a call raises that no engine ever saw, or whose answer was lost on its way with the node that held it.

It is sent again for as long as the driver has hope for the replicas.
"""

LOST = (EngineDeadError, RayActorError)
"""What a call raises when its replica was lost while it was there."""

FREE_CALLS = 2
"""Losses that a micro-batch survives without suspicion."""

MOST_DEATHS = 16
"""Engines that may die one after the other with no call answered in between: then another row is asked for, and
when that is lost too it is the engine and not the rows."""

WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Before a lost call is sent again: long enough that Serve has noticed that the replica is gone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One row's result, the replica that gave it, how often it was asked for, and how many rows waited there then."""

    result: Result
    replica: str = ""
    attempts: int = 1
    waiting: int | None = None


class Dispatcher:
    """Sends micro-batches until they are answered."""

    def __init__(self, call: Call, *, max_attempts: int, cache_salt: str | None = None, weight: float = 1.0) -> None:
        self._call = call
        self._cache_salt = cache_salt
        self._weight = weight
        self._isolation = asyncio.Lock()
        self._pace = Pace()
        self._deaths = 0
        self._latest_death = 0.0
        self._answered: Request | None = None
        self._latest: Request | None = None
        self._max_attempts = max_attempts
        self._closed = False

    def close(self) -> None:
        """Send nothing more; what is in flight is still awaited."""
        self._closed = True

    async def send(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        lane: int | None = None,
        suspected: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[list[Answer]]:
        """The answers to all requests, some at a time; a row that is lost again and again fails in the engine's words.

        It is asked for ``max_attempts`` times, and more often only where it must be parted from its neighbours: it was
        alone in its engine at the last. ``suspected`` is called before that begins, which may take minutes.

        After ``close`` fewer answers come, or none. Raises ``EngineError`` when every call is lost.
        """
        left = {request.key: request for request in requests}
        batch = MicroBatch((), sampling, cache_salt=self._cache_salt, lane=lane, weight=self._weight)
        self._latest = requests[0]
        attempt = 1
        free = FREE_CALLS if len(requests) > 1 else min(FREE_CALLS, max(1, self._max_attempts - 1))
        while attempt <= free:
            try:
                async for answers in self._reach(batch, left, attempt):
                    yield answers
                return
            except LOST:
                await _wait(attempt)
                attempt += 1
        suspected()
        async with self._isolation:
            async for answers in self._isolate(replace(batch, alone=True), left, attempt):
                yield answers

    async def _isolate(self, batch: MicroBatch, left: dict[int, Request], attempt: int) -> AsyncIterator[list[Answer]]:
        tries = 1 if len(left) > 1 else max(1, self._max_attempts - attempt + 1)
        for _ in range(tries):
            try:
                async for answers in self._reach(batch, left, attempt):
                    yield answers
                return
            except LOST as error:
                await _wait(attempt)
                attempt, lost = attempt + 1, error
        requests = list(left.values())
        if len(requests) == 1:
            yield [Answer(_failed(requests[0], lost), attempts=attempt - 1)]
            return
        middle = len(requests) // 2
        for half in (requests[:middle], requests[middle:]):
            async for answers in self._isolate(batch, {request.key: request for request in half}, attempt):
                yield answers

    async def _reach(self, batch: MicroBatch, left: dict[int, Request], attempt: int) -> AsyncIterator[list[Answer]]:
        """Ask for what is ``left`` of a micro-batch, until nothing is: what is answered is taken out.

        One that is to go alone, and was lost while it waited for those before it, was not in the engine that died: it
        waits again, as often as engines may die.
        """
        spared = 0
        while not self._closed and left:
            started, is_inside = time.monotonic(), not batch.alone
            asked = replace(batch, requests=tuple(left.values()), patience=self._pace.patience)
            try:
                async for answer in self._call(asked):
                    is_inside = True
                    if not answer.results:
                        continue
                    self._deaths = 0
                    for result in answer.results:
                        self._answered = left.pop(result.key)
                    yield [Answer(result, answer.replica, attempt, answer.waiting) for result in answer.results]
            except NOT_REACHED:
                await _wait(1)
            except LOST as error:
                if not is_inside and spared < MOST_DEATHS:
                    spared += 1
                    await _wait(spared)
                    continue
                if started >= self._latest_death:  # What was in flight before was lost in the death before.
                    self._deaths, self._latest_death = self._deaths + 1, time.monotonic()
                if self._deaths > MOST_DEATHS and not await self._lives(batch.sampling):
                    raise EngineError(
                        f"{self._deaths} engines died one after the other, no call was answered: {_words(error)}",
                        remedy="The replicas' logs are in Ray's session folder, under logs/serve.",
                    ) from error
                raise
            except (RayTaskError, RayServeException) as error:
                yield [Answer(_failed(request, error), attempts=attempt) for request in left.values()]
                return
            else:
                self._pace.record(time.monotonic() - started)
                return

    async def _lives(self, sampling: Sampling) -> bool:
        """Whether an engine answers a row that was answered before; where none was, one of the latest micro-batch."""
        asked = self._answered or self._latest
        assert asked is not None
        known = MicroBatch(
            (asked,), sampling, cache_salt=self._cache_salt, patience=self._pace.patience, weight=self._weight
        )
        while not self._closed:
            await _wait(1)
            try:
                async for _ in self._call(known):
                    self._deaths = 0
                return True
            except NOT_REACHED:
                continue
            except (*LOST, RayTaskError, RayServeException):
                return False
        return False


async def _wait(attempt: int) -> None:
    await asyncio.sleep(WAIT_SECONDS[min(attempt, len(WAIT_SECONDS)) - 1])


def _failed(request: Request, error: Exception) -> Result:
    cause = getattr(error, "cause", None) or error
    code = cause.code if isinstance(cause, EngineDeadError) else "engine_dead" if isinstance(error, LOST) else None
    return Result(request.key, error_code=code or "replica_failed", error_message=_words(error))


def _words(error: Exception) -> str:
    """What a lost engine said first, or the last line of a failure of another kind, which is its cause."""
    if isinstance(error, RayActorError):
        return "the replica's process died or its node was lost"
    cause = getattr(error, "cause", None) or error
    lines = str(getattr(cause, "message", cause)).strip().splitlines() or [type(error).__name__]
    return lines[0 if isinstance(error, LOST) else -1]
