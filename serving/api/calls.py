"""Calls to replicas on behalf of people: a lost one is made again while nothing came of it, errors come as ours."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeAlias, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from serving.errors import EngineDeadError, EngineError, OverloadedError, SpanfillError
from serving.protocol import MicroBatch

T = TypeVar("T")
Call: TypeAlias = Callable[[MicroBatch], AsyncIterator[T]]

TRIES = 3
WAIT_SECONDS = 0.5
"""Between two tries: Serve must notice that a replica is gone."""


async def answers(call: Call[T], batch: MicroBatch) -> AsyncGenerator[T, None]:
    """What the replica answers, some at a time; closing it ends the call, which frees the engine's slots.

    A call whose replica is lost before anything came is made again on another. Raises ``EngineDeadError`` when that
    does not help or something had come, ``OverloadedError`` when no replica is ready, ``EngineError`` when one fails.
    """
    for left in reversed(range(TRIES)):
        came = False
        try:
            async for answer in _once(call, batch):
                came = True
                yield answer
        except (EngineDeadError, OverloadedError):
            if came or not left:
                raise
            await asyncio.sleep(WAIT_SECONDS)
        else:
            return


async def _once(call: Call[T], batch: MicroBatch) -> AsyncGenerator[T, None]:
    response: Any = call(batch)
    try:
        async for answer in response:
            yield answer
    except RayTaskError as error:
        raise _translated(error) from error
    except RayActorError as error:
        raise EngineDeadError("the replica was lost.", remedy="Ask again: another answers.") from error
    except (DeploymentUnavailableError, RayServeException) as error:
        raise OverloadedError("no replica is ready.", remedy="Ask again in a few seconds.") from error
    finally:
        if (cancel := getattr(response, "cancel", None)) is not None:
            cancel()


def _translated(error: RayTaskError) -> SpanfillError:
    cause = error.cause
    if isinstance(cause, SpanfillError):
        return cause
    return EngineError("the replica failed.", remedy="Its log says why.")
