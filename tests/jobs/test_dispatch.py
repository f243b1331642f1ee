import asyncio
from collections import Counter

import pytest

from jobs import dispatch
from jobs.dispatch import Dispatcher
from serving.errors import EngineDeadError
from serving.protocol import Completion, MicroBatch, MicroBatchResult, Request, Result, Sampling

SAMPLING = Sampling(4)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RETRY_SECONDS", (0.0,))


def requests(count: int) -> list[Request]:
    return [Request(key, [key]) for key in range(count)]


def answer(batch: MicroBatch) -> MicroBatchResult:
    return MicroBatchResult("r", tuple(Result(r.key, (Completion([r.key], "stop", 7),)) for r in batch.requests))


def test_a_lost_replica_costs_nothing_but_a_second_call() -> None:
    calls: list[int] = []

    async def call(batch: MicroBatch) -> MicroBatchResult:
        calls.append(len(batch.requests))
        if len(calls) == 1:
            raise EngineDeadError("gone")
        return answer(batch)

    sent = Dispatcher(call, window=1, max_attempts=3)
    results = asyncio.run(sent.send(requests(8), SAMPLING))
    assert calls == [8, 8]
    assert [result.key for _, result, _ in results] == list(range(8))
    assert sent.retries == 1


@pytest.mark.parametrize("poison", [{3}, {0, 7}, {1, 2, 6}])
def test_poison_is_isolated_and_its_neighbours_finish(poison: set[int]) -> None:
    alone: Counter[int] = Counter()

    async def call(batch: MicroBatch) -> MicroBatchResult:
        keys = {r.key for r in batch.requests}
        if len(keys) == 1:
            alone.update(keys)
        if keys & poison:
            raise EngineDeadError("segmentation fault")
        return answer(batch)

    results = asyncio.run(Dispatcher(call, window=1, max_attempts=3).send(requests(8), SAMPLING))
    assert [result.key for _, result, _ in results] == list(range(8))
    failed = {result.key: result for _, result, _ in results if result.error_code}
    assert set(failed) == poison
    assert all("segmentation fault" in (result.error_message or "") for result in failed.values())
    assert all(alone[key] == 3 for key in poison)


def test_the_window_bounds_what_is_in_flight() -> None:
    now = most = 0

    async def call(batch: MicroBatch) -> MicroBatchResult:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return answer(batch)

    async def main() -> None:
        sent = Dispatcher(call, window=3, max_attempts=1)
        await asyncio.gather(*(sent.send(requests(1), SAMPLING) for _ in range(20)))

    asyncio.run(main())
    assert most == 3


def test_a_programming_error_is_not_swallowed() -> None:
    async def call(batch: MicroBatch) -> MicroBatchResult:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        asyncio.run(Dispatcher(call, window=1, max_attempts=3).send(requests(1), SAMPLING))
