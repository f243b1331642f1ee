"""Calls to replicas: which are made again, what their errors become, and that giving up ends them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serving.api import calls
from serving.api.calls import answers
from serving.errors import EngineDeadError, EngineError, EngineGoneError, OverloadedError, PromptTooLongError
from serving.protocol import MicroBatch, Sampling

BATCH = MicroBatch((), Sampling(1))


class Response:
    """What a call gives: these, one after the other; an exception is raised, None waits for ever."""

    def __init__(self, *told: Any) -> None:
        self.cancelled = 0
        self._told = iter(told)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for told in self._told:
            if isinstance(told, BaseException):
                raise told
            if told is None:
                await asyncio.Event().wait()
            return told
        raise StopAsyncIteration

    def cancel(self) -> None:
        """As Serve's."""
        self.cancelled += 1


class Replicas:
    """Answers one call after the other with these."""

    def __init__(self, *responses: Response) -> None:
        self.responses = responses
        self.called = 0

    def __call__(self, batch: MicroBatch) -> Any:
        """A call."""
        self.called += 1
        return self.responses[self.called - 1]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WAIT_SECONDS", 0)


def read(replicas: Replicas) -> list[Any]:
    """Everything that comes."""

    async def run() -> list[Any]:
        return [answer async for answer in answers(replicas, BATCH)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "lost", [ActorDiedError(), EngineGoneError("gone"), RayServeException("none"), asyncio.CancelledError()]
)
def test_a_call_that_is_lost_before_anything_came_is_made_again(lost: BaseException) -> None:
    replicas = Replicas(Response(lost), Response(lost), Response("a", "b"))
    assert read(replicas) == ["a", "b"]
    assert replicas.called == 3


def test_a_call_that_is_lost_three_times_is_an_error() -> None:
    with pytest.raises(EngineDeadError, match="the replica was lost"):
        read(Replicas(*(Response(ActorDiedError()) for _ in range(3))))
    with pytest.raises(OverloadedError, match="no replica is ready"):
        read(Replicas(*(Response(RayServeException("none")) for _ in range(3))))


def test_a_call_that_is_lost_when_something_had_come_is_not_made_again() -> None:
    replicas = Replicas(Response("a", ActorDiedError()))
    with pytest.raises(EngineDeadError):
        read(replicas)
    assert replicas.called == 1


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (RayTaskError("f", "...", PromptTooLongError("Too long.")), PromptTooLongError, "Too long"),
        (RayTaskError("f", "...", ValueError("secret")), EngineError, "the replica failed"),
        (PromptTooLongError("Too long."), PromptTooLongError, "Too long"),
        (TaskCancelledError(), EngineError, "the call of a replica failed"),
    ],
)
def test_errors_come_as_ours(raised: Exception, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as found:
        read(Replicas(Response(raised)))
    assert "secret" not in str(found.value)


def test_an_answer_that_is_lost_on_its_way_is_asked_for_again() -> None:
    assert read(Replicas(Response(ObjectLostError("00", "here", "there")), Response("a"))) == ["a"]


def test_whoever_wants_no_more_ends_the_call() -> None:
    async def run() -> int:
        response = Response("a", None)
        found = answers(Replicas(response), BATCH)
        await anext(found)
        await found.aclose()
        return response.cancelled

    assert asyncio.run(run()) == 1


async def cancelled(replicas: Replicas) -> None:
    """Be cancelled while waiting for what comes."""

    async def wait() -> None:
        async for _ in answers(replicas, BATCH):
            pass

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_whoever_is_cancelled_ends_the_call_and_makes_no_other() -> None:
    response = Response(None)
    replicas = Replicas(response, Response("a"))
    asyncio.run(cancelled(replicas))
    assert (response.cancelled, replicas.called) == (1, 1)


def test_a_call_that_serve_cancels_for_its_caller_is_a_cancellation() -> None:
    replicas = Replicas(Response(RequestCancelledError()), Response("a"))
    with pytest.raises(asyncio.CancelledError):
        read(replicas)
    assert replicas.called == 1


def test_a_caller_who_is_cancelled_behind_his_call_makes_no_other() -> None:
    replicas = Replicas(Response("a", asyncio.CancelledError()), Response("b"))
    asyncio.run(cancelled(replicas))
    assert replicas.called == 1
