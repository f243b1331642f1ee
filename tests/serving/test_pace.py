"""Patience that grows with what was measured, and a gate that lets many in, or one alone."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.pace import FACTOR, LEAST_SECONDS, Gate, Pace

SECONDS = st.floats(0.0, 1e4)


def patience(*seconds: float) -> float:
    """After these measurements."""
    found = Pace()
    for value in seconds:
        found.record(value)
    assert found.patience is not None
    return found.patience


def test_before_anything_was_measured_nobody_knows_how_long_to_wait() -> None:
    assert Pace().patience is None


@given(seconds=st.lists(SECONDS, min_size=1, max_size=20))
def test_patience_is_never_below_the_least(seconds: list[float]) -> None:
    assert patience(*seconds) >= LEAST_SECONDS


@given(seconds=SECONDS)
def test_one_measurement_is_given_many_times_its_length(seconds: float) -> None:
    assert patience(seconds) >= FACTOR * seconds


@given(seconds=st.lists(SECONDS, min_size=1, max_size=10), factor=st.floats(1.0, 100.0))
def test_a_slower_engine_is_waited_for_longer(seconds: list[float], factor: float) -> None:
    assert patience(*(factor * value for value in seconds)) >= patience(*seconds) * 0.999


def test_patience_follows_an_engine_that_becomes_slow() -> None:
    grown = [patience(*([5.0] * 8 + [50.0] * count)) for count in range(6)]
    assert grown == sorted(set(grown))


def test_patience_of_a_steady_engine_comes_down_to_a_multiple_of_its_pace() -> None:
    assert patience(*([20.0] * 200)) == pytest.approx(FACTOR * 20, rel=0.01)


def test_an_unsteady_engine_is_waited_for_longer_than_a_steady_one() -> None:
    assert patience(*([10.0, 30.0] * 50)) > patience(*([20.0] * 100))


class Visitors:
    """Tasks that enter a gate by name and stay until they are let go."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.inside: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(self, *names: str, alone: bool = False) -> None:
        for name in names:
            self._leave[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._visit(name, alone))
        await settle()

    async def _visit(self, name: str, alone: bool) -> None:
        async with self.gate.enter(alone=alone):
            self.inside.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside.remove(name)

    async def go(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self._tasks[name].cancel()
        await settle()

    async def fail(self, name: str) -> None:
        async with self.gate.enter(alone=name.isupper()):
            raise ConnectionError(name)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(visit: Callable[[Visitors], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        visitors = Visitors()
        await visit(visitors)

    asyncio.run(main())


def test_many_are_inside_at_a_time() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("a", "b", "c")
        assert visitors.inside == ["a", "b", "c"]
        await visitors.go("b")
        await visitors.come("d")
        assert visitors.inside == ["a", "c", "d"]

    run(visit)


def test_who_is_alone_waits_for_all_and_lets_nobody_in() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("a", "b")
        await visitors.come("A", alone=True)
        assert visitors.inside == ["a", "b"]
        await visitors.go("a")
        assert visitors.inside == ["b"]
        await visitors.go("b")
        assert visitors.inside == ["A"]
        await visitors.come("c")
        assert visitors.inside == ["A"]
        await visitors.go("A")
        assert visitors.inside == ["c"]

    run(visit)


def test_who_wants_to_be_alone_goes_before_those_who_do_not() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("a")
        await visitors.come("A", alone=True)
        await visitors.come("b", "c")
        await visitors.come("B", alone=True)
        assert visitors.inside == ["a"]
        await visitors.go("a")
        assert visitors.inside == ["A"]
        await visitors.go("A")
        assert visitors.inside == ["B"]
        await visitors.go("B")
        assert visitors.inside == ["b", "c"]

    run(visit)


def test_a_waiter_who_is_cancelled_blocks_nobody() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("a")
        await visitors.come("A", alone=True)
        await visitors.come("b", "c")
        await visitors.cancel("A")
        assert visitors.inside == ["a", "b", "c"]
        await visitors.come("B", alone=True)
        await visitors.come("d")
        await visitors.cancel("d")
        await visitors.go("a", "b", "c")
        assert visitors.inside == ["B"]
        await visitors.go("B")
        await visitors.come("e")
        assert visitors.inside == ["e"]

    run(visit)


def test_a_visitor_who_is_cancelled_inside_blocks_nobody() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("a", "b")
        await visitors.come("A", alone=True)
        await visitors.cancel("a", "b")
        assert visitors.inside == ["A"]
        await visitors.come("c")
        await visitors.cancel("A")
        assert visitors.inside == ["c"]

    run(visit)


def test_one_who_is_cancelled_in_the_moment_of_admission_blocks_nobody() -> None:
    async def visit(visitors: Visitors) -> None:
        await visitors.come("A", alone=True)
        await visitors.come("B", alone=True)
        await visitors.come("b", "c")
        visitors._leave["A"].set()
        await asyncio.sleep(0)
        await visitors.cancel("B", "b")
        assert visitors.inside == ["c"]
        await visitors.go("c")
        await visitors.come("C", alone=True)
        assert visitors.inside == ["C"]

    run(visit)


@pytest.mark.parametrize("name", ["a", "A"])
def test_a_block_that_fails_leaves_the_gate_open(name: str) -> None:
    async def visit(visitors: Visitors) -> None:
        with pytest.raises(ConnectionError):
            await visitors.fail(name)
        await visitors.come("B", alone=True)
        assert visitors.inside == ["B"]
        await visitors.go("B")
        await visitors.come("b")
        assert visitors.inside == ["b"]

    run(visit)


@given(
    steps=st.lists(st.tuples(st.sampled_from(["come", "alone", "go", "cancel"]), st.integers(0, 30)), max_size=40),
    pauses=st.lists(st.integers(0, 2), min_size=40, max_size=40),
)
def test_the_gate_keeps_its_promise_and_never_jams(steps: list[tuple[str, int]], pauses: list[int]) -> None:
    """Whatever comes, goes and is cancelled, one who is alone is alone, and at the end everybody was let in."""

    async def main() -> None:
        gate, inside, served = Gate(), list[bool](), list[int]()
        leave = [asyncio.Event() for _ in steps]
        tasks: list[asyncio.Task[None]] = []

        async def visit(number: int, alone: bool) -> None:
            async with gate.enter(alone=alone):
                inside.append(alone)
                assert len(inside) == 1 or not any(inside)
                served.append(number)
                try:
                    await leave[number].wait()
                finally:
                    inside.remove(alone)

        cancelled = set[int]()
        for (deed, chosen), pause in zip(steps, pauses, strict=False):
            if deed in ("come", "alone"):
                tasks.append(asyncio.create_task(visit(len(tasks), deed == "alone")))
            elif tasks and deed == "go":
                leave[chosen % len(tasks)].set()
            elif tasks:
                tasks[chosen % len(tasks)].cancel()
                cancelled.add(chosen % len(tasks))
            for _ in range(pause):
                await asyncio.sleep(0)
        for event in leave:
            event.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for e in done if e is not None)
        assert set(served) | cancelled == set(range(len(tasks)))
        async with asyncio.timeout(30), gate.enter(alone=True):
            assert inside == []

    asyncio.run(asyncio.wait_for(main(), 60))
