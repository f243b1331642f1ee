"""Calls to replicas on behalf of people: a lost one is made again while nothing came of it, errors come as ours."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

from grpc import RpcError
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serving.errors import EngineDeadError, EngineError, OverloadedError, SpanfillError
from serving.protocol import MicroBatch

T = TypeVar("T")
Call: TypeAlias = Callable[[MicroBatch], AsyncIterator[T]]

TRIES = 3
WAIT_SECONDS = 0.5
"""Between two tries: Serve must notice that a replica is gone."""

OWN_SECONDS = 0.1
"""A caller whose call was cancelled learns within so long whether he is."""

LOST = (RayActorError, ObjectLostError, RpcError)
"""What a call raises when its replica was lost while it was there, or what came of it was lost on its way."""


async def answers(call: Call[T], batch: MicroBatch) -> AsyncGenerator[T, None]:
    """What the replica answers, some at a time; closing it ends the call, which frees the engine's slots.

    A call whose replica is lost before anything came is made again on another. Raises ``EngineDeadError`` when that
    does not help or something had come, ``OverloadedError`` when no replica is ready, ``EngineError`` when one fails.
    """
    for left in reversed(range(TRIES)):
        came = False
        try:
            async with aclosing(_once(call, batch)) as found:
                async for answer in found:
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
    except LOST as error:
        raise _lost() from error
    except RequestCancelledError:
        raise asyncio.CancelledError from None
    except RayServeException as error:
        raise OverloadedError("no replica is ready.", remedy="Ask again in a few seconds.") from error
    except RayError as error:
        raise EngineError("the call of a replica failed.", remedy="Ask again; the replicas' logs say more.") from error
    except asyncio.CancelledError:
        # Serve hands on the cancellation of a replica that ends as if it were the caller's own, and of a caller that
        # is gone it ends the calls first: his own cancellation comes while this sleeps.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        await asyncio.sleep(OWN_SECONDS)
        raise _lost() from None
    finally:
        if (cancel := getattr(response, "cancel", None)) is not None:
            cancel()


def _lost() -> EngineDeadError:
    return EngineDeadError("the replica was lost.", remedy="Ask again: another answers.")


def _translated(error: RayTaskError) -> SpanfillError:
    cause = error.cause
    if isinstance(cause, SpanfillError):
        return cause
    return EngineError("the replica failed.", remedy="Its log says why.")
