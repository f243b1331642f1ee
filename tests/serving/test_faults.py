"""Engines that crash, hang or lose their process when they are told to, and the replica that finds out."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from serving.config import EngineConfig, ReplicaConfig
from serving.errors import EngineDeadError, EngineGoneError, EngineHungError
from serving.protocol import (
    INTERACTIVE_PRIORITY,
    Completion,
    Engine,
    EngineInfo,
    EngineStats,
    Growth,
    MicroBatch,
    MicroBatchResult,
    Request,
    Result,
    Sampling,
)
from serving.replica import Replica
from serving.simulated import SimulatedEngine

SAMPLING = Sampling(16)
GOOD, POISON = [1, 2, 3, 4], [1, 7, 8, 9, 4]
ALMOST = [[7, 8], [8, 9, 7], [7, 8, 1, 9], [7, 7, 8], [9], []]
TRIGGER = (7, 8, 9)
KINDS = pytest.mark.parametrize("kind", ["instant", "simulated"])


def config(kind: str = "instant", **roofline: Any) -> EngineConfig:
    return EngineConfig.parse(
        {"kind": kind, "model": "m", "max_model_len": 2048, "roofline": {"time_scale": 1e6} | roofline}
    )


def ask(engine: Engine, token_ids: list[int], key: int = 0) -> "asyncio.Task[Result]":
    async def generate() -> Result:
        return await engine.generate(Request(key, token_ids), SAMPLING)

    return asyncio.create_task(generate())


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@KINDS
def test_a_crash_takes_the_request_and_every_later_one(kind: str) -> None:
    async def main() -> None:
        engine = SimulatedEngine(config(kind, crash_on=TRIGGER))
        assert (await ask(engine, GOOD)).completions
        with pytest.raises(EngineDeadError, match="as it was told to"):
            await ask(engine, POISON)
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        with pytest.raises(EngineDeadError):
            await ask(engine, GOOD)

    asyncio.run(main())


def test_a_crash_takes_a_request_that_is_on_its_way_into_the_batch() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config("simulated", crash_on=TRIGGER))
        entering, poison = ask(engine, GOOD), ask(engine, POISON)
        failures = await asyncio.wait_for(asyncio.gather(entering, poison, return_exceptions=True), 60)
        assert [type(failure) for failure in failures] == [EngineDeadError] * 2

    asyncio.run(main())


def test_a_crash_takes_the_requests_that_are_under_way() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config("simulated", crash_on=TRIGGER, time_scale=1e-6, max_num_seqs=2))
        under_way = [ask(engine, GOOD, key) for key in range(5)]
        await settle()
        assert (engine.stats().running, engine.stats().waiting) == (2, 3)
        with pytest.raises(EngineDeadError):
            await ask(engine, POISON)
        failures = await asyncio.gather(*under_way, return_exceptions=True)
        assert [type(failure) for failure in failures] == [EngineDeadError] * 5

    asyncio.run(main())


@KINDS
def test_a_hang_holds_every_request_and_makes_no_step(kind: str) -> None:
    async def main() -> None:
        engine = SimulatedEngine(config(kind, hang_on=TRIGGER))
        assert (await ask(engine, GOOD)).completions
        poison = ask(engine, POISON)
        await settle()
        steps, later = engine.stats().steps, ask(engine, GOOD)
        await asyncio.sleep(0.1)
        assert not poison.done()
        assert not later.done()
        assert engine.stats().steps == steps
        await engine.check_health()
        for task in (poison, later):
            task.cancel()
        await asyncio.gather(poison, later, return_exceptions=True)
        await engine.shutdown()

    asyncio.run(main())


def test_a_hang_holds_the_requests_that_are_under_way() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config("simulated", hang_on=TRIGGER, time_scale=1.0, step_overhead_seconds=0.02))
        under_way = ask(engine, GOOD)
        await settle()
        poison = ask(engine, POISON)
        done, _ = await asyncio.wait((under_way, poison), timeout=1.0)
        assert not done
        for task in (under_way, poison):
            task.cancel()
        await asyncio.gather(under_way, poison, return_exceptions=True)
        await engine.shutdown()

    asyncio.run(main())


@KINDS
@pytest.mark.parametrize("fault", ["crash_on", "hang_on", "kill_on"])
def test_prompts_without_all_the_tokens_in_a_row_are_answered(kind: str, fault: str) -> None:
    async def main() -> None:
        engine = SimulatedEngine(config(kind, **{fault: TRIGGER}))
        for token_ids in (GOOD, *ALMOST):
            assert (await ask(engine, token_ids)).completions
        await engine.check_health()
        await engine.shutdown()

    asyncio.run(main())


def test_a_killed_process_is_gone_without_a_word() -> None:
    script = f"""
import asyncio
from serving.config import EngineConfig
from serving.protocol import Request, Sampling
from serving.simulated import SimulatedEngine

async def main():
    engine = SimulatedEngine(EngineConfig.parse({config(kill_on=TRIGGER).model_dump(mode="json")!r}))
    await engine.generate(Request(0, {GOOD}), Sampling(16))
    print("answered", flush=True)
    await engine.generate(Request(0, {POISON}), Sampling(16))
    print("survived", flush=True)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "answered\n"


class Slow:
    """An engine that has made one more step whenever one looks, and answers when it was looked at often enough."""

    def __init__(self, looks: int) -> None:
        self._left = looks
        self._looks = 0
        self._done = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("fake", "m", 2048, 1, 16, 1_000)

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int = 0, cache_salt: str | None = None
    ) -> Result:
        await self._done.wait()
        return Result(request.key, (Completion([1], "length"),))

    async def stream(
        self, request: Request, sampling: Sampling, *, priority: int = 0, cache_salt: str | None = None
    ) -> AsyncGenerator[Growth, None]:
        await self._done.wait()
        yield Growth(request.key, 0, [1], finish_reason="length")

    def stats(self) -> EngineStats:
        self._looks += 1
        if self._looks >= self._left:
            self._done.set()
        return EngineStats(steps=self._looks)

    async def check_health(self) -> None:
        """It is well."""

    async def shutdown(self) -> None:
        """Nothing to end."""


class Plain(Replica):
    """A replica outside Serve, which awaits its asynchronous ``__del__``; Python does not."""

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing."""


StartReplica = Callable[..., Coroutine[Any, Any, Replica]]


@pytest.fixture
def start_replica(monkeypatch: pytest.MonkeyPatch) -> StartReplica:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica-1"))
    monkeypatch.setattr("serving.replica.serve.get_replica_context", lambda: context)

    async def start(**roofline: Any) -> Replica:
        replica = Plain.__new__(Plain)
        await replica.__init__(config(**roofline), ReplicaConfig())  # type: ignore[misc]
        return replica

    return start


def call(
    replica: Replica,
    *prompts: list[int],
    alone: bool = False,
    patience: float | None = None,
    sampling: Sampling = SAMPLING,
    **more: Any,
) -> "asyncio.Task[Any]":
    requests = tuple(Request(key, token_ids) for key, token_ids in enumerate(prompts))
    batch = MicroBatch(requests, sampling, alone=alone, patience=patience, **more)

    async def gathered() -> MicroBatchResult:
        answers = [answer async for answer in replica.generate(batch)]
        return MicroBatchResult(answers[-1].replica, tuple(result for answer in answers for result in answer.results))

    return asyncio.create_task(gathered())


def test_a_replica_answers_in_order_and_says_who_it_is(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica()
        answer = await call(replica, GOOD, [5, 6], GOOD)
        assert answer.replica == "replica-1"
        assert [result.key for result in answer.results] == [0, 1, 2]
        assert answer.results[0].completions == answer.results[2].completions

    asyncio.run(main())


def test_a_reading_tells_whether_the_engine_is_alive(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(crash_on=TRIGGER)
        assert (await replica.stats())[1].is_alive
        with pytest.raises(EngineDeadError):
            await call(replica, POISON)
        assert not (await replica.stats())[1].is_alive

    asyncio.run(main())


def test_a_crash_is_told_apart_from_a_death_before(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(crash_on=TRIGGER)
        with pytest.raises(EngineDeadError) as died:
            await call(replica, GOOD, POISON, GOOD)
        assert not isinstance(died.value, EngineGoneError)
        with pytest.raises(EngineDeadError):
            await replica.check_health()
        with pytest.raises(EngineGoneError):
            await call(replica, GOOD)

    asyncio.run(main())


def test_a_hung_engine_is_given_up_for_everybody(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(kind="simulated", hang_on=TRIGGER)
        first = call(replica, GOOD, POISON, patience=0.3)
        await settle()
        calls = [first, call(replica, GOOD), call(replica, GOOD, alone=True)]
        failures = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        assert [type(failure) for failure in failures] == [EngineHungError, EngineHungError, EngineGoneError]
        assert "made no step" in str(failures[0])
        with pytest.raises(EngineHungError):
            await replica.check_health()
        with pytest.raises(EngineGoneError):
            await call(replica, GOOD)

    asyncio.run(main())


def test_a_replica_that_measured_its_own_pace_does_not_ask_the_callers(
    start_replica: StartReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.pace.LEAST_SECONDS", 0.3)

    async def main() -> None:
        replica = await start_replica(hang_on=TRIGGER)
        await call(replica, GOOD)
        with pytest.raises(EngineHungError):
            await asyncio.wait_for(call(replica, POISON, patience=1e6), 60)

    asyncio.run(main())


def test_a_slow_engine_that_steps_is_waited_for(start_replica: StartReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_engine(*_: object, **__: object) -> Engine:
        return Slow(looks=30)

    monkeypatch.setattr("serving.replica.start_engine", start_engine)

    async def main() -> None:
        replica = await start_replica()
        answer = await asyncio.wait_for(call(replica, GOOD, patience=0.01), 60)
        assert len(answer.results) == 1
        await replica.check_health()

    asyncio.run(main())


def test_a_cancelled_call_blocks_nobody_who_wants_to_be_alone(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(kind="simulated", time_scale=1e-6)
        long = call(replica, GOOD)
        await settle()
        waiting = call(replica, [5], alone=True)
        await settle()
        assert (await replica.stats())[1].running == 1
        waiting.cancel()
        long.cancel()
        await asyncio.gather(long, waiting, return_exceptions=True)
        other = call(replica, GOOD, alone=True)
        await settle()
        assert not other.done()
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("inside", [False, True])
def test_people_wait_for_no_row_that_is_to_be_alone(
    start_replica: StartReplica, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.ALONE_SECONDS", 0.0)

    async def main() -> None:
        replica = await start_replica(kind="simulated", time_scale=0.02)
        others = [] if inside else [call(replica, GOOD)]
        await settle()
        suspect = call(replica, [5], alone=True)
        await settle()
        assert (await replica.stats())[1].running == 1
        person = call(replica, GOOD, priority=INTERACTIVE_PRIORITY)
        row = call(replica, [6])
        await settle()
        stats = (await replica.stats())[1]
        assert stats.running + stats.waiting == 2, "the person and whichever was there"
        for task in [*others, suspect, person, row]:
            task.cancel()
        await asyncio.gather(*others, suspect, person, row, return_exceptions=True)

    asyncio.run(main())


class Silent(Slow):
    """Dies without a word to those who wait for it."""

    def __init__(self) -> None:
        super().__init__(looks=1 << 30)
        self.dead = False

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError("died")


def test_a_death_that_nobody_in_the_engine_hears_of_is_told_to_everybody(
    start_replica: StartReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.ANSWER_SECONDS", 0.05)

    async def main() -> None:
        replica, engine = await start_replica(), Silent()
        replica._engine = engine

        async def listen() -> None:
            async for _ in replica.stream(MicroBatch((Request(0, GOOD),), SAMPLING)):
                pass

        calls = [call(replica, GOOD), asyncio.create_task(listen()), call(replica, GOOD, alone=True)]
        await settle()
        engine.dead = True
        failures = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        assert [type(failure) for failure in failures] == [EngineDeadError, EngineDeadError, EngineGoneError]

    asyncio.run(main())


def test_whoever_is_to_be_alone_is_told_once_it_is(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(kind="simulated", crash_on=TRIGGER, time_scale=1.0)
        before = call(replica, GOOD, sampling=Sampling(1_000, ignore_eos=True))
        await settle()
        answers = replica.generate(MicroBatch((Request(0, POISON),), SAMPLING, alone=True))
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.1)
        assert not first.done()
        before.cancel()
        assert (await asyncio.wait_for(first, 60)).results == ()
        with pytest.raises(EngineDeadError, match="as it was told to"):
            await anext(answers)

    asyncio.run(main())


class Uneven(Slow):
    """Answers keys below 2 at once and the others when it is told to."""

    def __init__(self) -> None:
        super().__init__(looks=1 << 30)
        self.release = asyncio.Event()

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int = 0, cache_salt: str | None = None
    ) -> Result:
        if request.key >= 2:
            await self.release.wait()
        return Result(request.key, (Completion([1], "length"),))


def test_a_row_that_is_done_does_not_wait_for_its_slowest_neighbour(
    start_replica: StartReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.ANSWER_SECONDS", 0.05)

    async def main() -> list[list[int]]:
        replica, engine = await start_replica(), Uneven()
        replica._engine = engine
        batch = MicroBatch(tuple(Request(key, GOOD) for key in range(4)), SAMPLING)
        found = []
        async for answer in replica.generate(batch):
            found.append([result.key for result in answer.results])
            engine.release.set()
        return found

    assert asyncio.run(main()) == [[0, 1], [2, 3]]


def test_whoever_stops_listening_to_a_stream_frees_the_engine_and_hears_of_nothing_else(
    start_replica: StartReplica,
) -> None:
    async def main() -> None:
        replica = await start_replica(kind="simulated", time_scale=1.0)
        requests = tuple(Request(key, GOOD, (1, 2)) for key in range(3))
        batch = MicroBatch(requests, Sampling(1_000, temperature=1.0, ignore_eos=True))
        came = asyncio.Event()

        async def listen() -> None:
            async for _ in replica.stream(batch):
                came.set()

        listening = asyncio.create_task(listen())
        await asyncio.wait_for(came.wait(), 60)
        assert (await replica.stats())[1].running == 6
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        async with asyncio.timeout(1.0):
            while (await replica.stats())[1].running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_stream_of_a_dead_engine_says_so(start_replica: StartReplica) -> None:
    async def main() -> None:
        replica = await start_replica(kind="simulated", crash_on=TRIGGER, time_scale=1.0)

        async def listen(prompt: list[int]) -> None:
            async for _ in replica.stream(MicroBatch((Request(0, prompt),), Sampling(1_000, ignore_eos=True))):
                pass

        under_way = asyncio.create_task(listen(GOOD))
        await asyncio.sleep(0.1)
        failures = await asyncio.gather(listen(POISON), under_way, return_exceptions=True)
        assert [type(failure) for failure in failures] == [EngineDeadError, EngineDeadError]
        with pytest.raises(EngineGoneError):
            await listen(GOOD)

    asyncio.run(main())
