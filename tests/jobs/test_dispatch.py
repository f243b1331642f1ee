import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from jobs import dispatch
from jobs.dispatch import FREE_CALLS, MOST_DEATHS, Answer, Dispatcher
from serving.errors import EngineDeadError, EngineError, EngineGoneError, EngineHungError
from serving.pace import Gate
from serving.protocol import Completion, MicroBatch, MicroBatchResult, Request, Result, Sampling

SAMPLING = Sampling(4)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "WAIT_SECONDS", (0.0,))


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request(key, [key]) for key in range(first, first + count)]


def answer(batch: MicroBatch) -> MicroBatchResult:
    return MicroBatchResult("r", tuple(Result(r.key, (Completion([r.key], "stop", 7),)) for r in batch.requests))


INSIDE = MicroBatchResult("r", ())
"""What a replica says before a micro-batch that goes alone: none but its rows are in the engine."""


async def answers_of(sent: Dispatcher, asked: list[Request]) -> list[Answer]:
    return [answer async for answers in sent.send(asked, SAMPLING) for answer in answers]


def keys(answers: list[Answer]) -> list[int]:
    return [answer.result.key for answer in answers]


def test_a_lost_replica_costs_nothing_but_a_second_call() -> None:
    calls: list[tuple[int, bool]] = []

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        calls.append((len(batch.requests), batch.alone))
        if len(calls) == 1:
            raise EngineDeadError("gone")
        yield answer(batch)

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(8)))
    assert calls == [(8, False), (8, False)]
    assert keys(answers) == list(range(8))
    assert {a.attempts for a in answers} == {2}


@pytest.mark.parametrize("poison", [{3}, {0, 7}, {1, 2, 6}])
@pytest.mark.parametrize("error", [EngineDeadError("segmentation fault"), EngineHungError("segmentation fault")])
def test_poison_is_isolated_and_its_neighbours_finish(poison: set[int], error: EngineDeadError) -> None:
    alone: Counter[int] = Counter()

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        held = {r.key for r in batch.requests}
        if len(held) == 1:
            assert batch.alone
            alone.update(held)
        if batch.alone:
            yield INSIDE
        if held & poison:
            raise error
        yield answer(batch)

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(8)))
    assert keys(answers) == list(range(8))
    failed = {a.result.key: a.result for a in answers if a.result.error_code}
    assert set(failed) == poison
    assert {(r.error_code, r.error_message) for r in failed.values()} == {(error.code, "segmentation fault")}
    assert all(alone[key] == 1 for key in poison)


def test_rows_beside_poison_in_one_engine_are_never_condemned() -> None:
    """One engine; whatever is in it when the poison comes is lost with it, unless the caller wants to be alone."""
    epoch = 0

    async def main() -> list[Answer]:
        gate = Gate()

        async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            nonlocal epoch
            async with gate.enter(alone=batch.alone):
                born = epoch
                await asyncio.sleep(0)
                epoch += 21 in {r.key for r in batch.requests}
                await asyncio.sleep(0)
                if epoch != born:
                    raise EngineDeadError("died")
                yield answer(batch)

        sent = Dispatcher(call, max_attempts=2)
        found = await asyncio.gather(*(answers_of(sent, requests(8, first)) for first in range(0, 80, 8)))
        return [answer for answers in found for answer in answers]

    answers = asyncio.run(main())
    assert keys(answers) == list(range(80))
    assert [a.result.key for a in answers if a.result.error_code] == [21]


def test_an_engine_that_was_dead_before_is_no_evidence_against_the_rows() -> None:
    calls = 0

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        nonlocal calls
        calls += 1
        if calls < 50:
            raise EngineGoneError("was dead already")
        yield answer(batch)

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=1), requests(1)))
    assert (answers[0].result.error_code, answers[0].attempts) == (None, 1)


def test_an_engine_that_dies_of_everything_ends_the_job_instead_of_condemning_every_row() -> None:
    def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        raise EngineDeadError("no such instruction")

    async def main() -> None:
        sent = Dispatcher(call, max_attempts=3)
        await asyncio.gather(*(answers_of(sent, requests(8, first)) for first in range(0, 80, 8)))

    with pytest.raises(EngineError, match="no call was answered: no such instruction"):
        asyncio.run(main())


def test_after_close_what_is_in_flight_is_answered_and_nothing_else_is_sent() -> None:
    calls = 0

    async def main() -> list[list[Answer]]:
        release = asyncio.Event()

        async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            nonlocal calls
            calls += 1
            await release.wait()
            yield answer(batch)

        sent = Dispatcher(call, max_attempts=1)
        tasks = [asyncio.create_task(answers_of(sent, requests(1))) for _ in range(2)]
        await asyncio.sleep(0.01)
        sent.close()
        tasks += [asyncio.create_task(answers_of(sent, requests(1))) for _ in range(3)]
        release.set()
        return await asyncio.gather(*tasks)

    assert [len(answers) for answers in asyncio.run(main())] == [1, 1, 0, 0, 0]
    assert calls == 2


def test_a_call_lost_after_close_is_not_sent_again() -> None:
    async def main() -> list[Answer]:
        def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            sent.close()
            raise EngineDeadError("pre-empted")

        sent = Dispatcher(call, max_attempts=1)
        return await answers_of(sent, requests(4))

    assert asyncio.run(main()) == []
    assert FREE_CALLS > 1


def test_a_replicas_own_failure_is_told_with_its_last_line() -> None:
    def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        raise RayTaskError("generate", "Traceback\nValueError: odd", ValueError("odd"))

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(2)))
    assert [(a.result.error_code, a.result.error_message) for a in answers] == [("replica_failed", "odd")] * 2


def test_a_programming_error_is_not_swallowed() -> None:
    def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(1)))


def test_many_poisonous_neighbours_are_told_from_an_engine_that_is_broken() -> None:
    """They stand first in their micro-batch: until all are isolated none of its rows is answered."""
    poison = set(range(20))

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        if poison & {r.key for r in batch.requests}:
            raise EngineDeadError("segmentation fault")
        yield answer(batch)

    async def main() -> list[Answer]:
        sent = Dispatcher(call, max_attempts=3)
        found = await asyncio.gather(*(answers_of(sent, requests(64, start)) for start in (0, 64)))
        return [answer for answers in found for answer in answers]

    answers = asyncio.run(main())
    assert keys(answers) == list(range(128))
    assert {a.result.key for a in answers if a.result.error_code} == poison


def test_what_is_answered_before_a_replica_is_lost_is_not_asked_for_again() -> None:
    asked: list[list[int]] = []

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        asked.append([r.key for r in batch.requests])
        half = replace(batch, requests=batch.requests[:4])
        yield answer(half)
        if len(asked) == 1:
            raise EngineDeadError("gone")
        yield answer(replace(batch, requests=batch.requests[4:]))

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(8)))
    assert asked == [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]
    assert [(a.result.key, a.attempts) for a in answers] == [(key, 1 + key // 4) for key in range(8)]


@pytest.mark.parametrize("attempts", [1, 2, 3, 4])
def test_a_row_without_neighbours_is_asked_for_max_attempts_times_and_twice_at_least(attempts: int) -> None:
    calls = 0

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        nonlocal calls
        calls += 1
        yield INSIDE
        raise EngineDeadError("segmentation fault")

    (answer,) = asyncio.run(answers_of(Dispatcher(call, max_attempts=attempts), requests(1)))
    assert (answer.attempts, calls) == (max(2, attempts),) * 2


def test_a_row_that_waited_to_be_alone_is_not_condemned_when_those_before_it_kill_the_engine() -> None:
    calls: list[bool] = []

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        calls.append(batch.alone)
        if len(calls) <= 1 + FREE_CALLS:
            raise RayActorError
        yield INSIDE
        yield answer(batch)

    (found,) = asyncio.run(answers_of(Dispatcher(call, max_attempts=1), requests(1)))
    assert (found.result.error_code, found.attempts) == (None, 2)
    assert calls == [False, *[True] * (FREE_CALLS + 1)]


def test_a_row_that_is_never_heard_of_again_is_given_up_in_the_end() -> None:
    """It may kill its engine before anything that the replica says comes through."""
    calls = 0

    def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        nonlocal calls
        calls += 1
        raise RayActorError

    (found,) = asyncio.run(answers_of(Dispatcher(call, max_attempts=1), requests(1)))
    assert (found.result.error_code, calls) == ("engine_dead", 2 + MOST_DEATHS)


def test_losses_while_a_row_waited_to_be_alone_do_not_speak_against_the_engine() -> None:
    """Nothing but one micro-batch, whose first row is poisonous, and nothing is heard of a call's first try."""
    tries = Counter[tuple[int, ...]]()

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        held = tuple(r.key for r in batch.requests)
        tries[held] += 1
        if batch.alone and tries[held] % 2:
            raise RayActorError
        if batch.alone:
            yield INSIDE
        if 0 in held:
            raise RayActorError
        yield answer(batch)

    answers = asyncio.run(answers_of(Dispatcher(call, max_attempts=3), requests(512)))
    assert {a.result.key for a in answers if a.result.error_code} == {0}
