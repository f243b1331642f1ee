"""Several asynchronous iterators as one, and one in bunches."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.merging import in_bunches, merged


async def counted(name: str, count: int, ended: list[str], fails: bool = False) -> AsyncGenerator[str, None]:
    """``count`` items, and a note of how it was left."""
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield f"{name}{number}"
        if fails:
            raise ValueError(name)
    finally:
        ended.append(name)


@given(counts=st.lists(st.integers(0, 5), max_size=5))
def test_everything_comes_in_its_sources_order(counts: list[int]) -> None:
    async def run() -> list[str]:
        sources = [counted(f"{number}-", count, []) for number, count in enumerate(counts)]
        return [item async for item in merged(sources)]

    came = asyncio.run(run())
    for number, count in enumerate(counts):
        assert [item for item in came if item.startswith(f"{number}-")] == [f"{number}-{i}" for i in range(count)]
    assert len(came) == sum(counts)


def test_the_first_error_is_raised_and_the_other_sources_are_closed() -> None:
    ended: list[str] = []

    async def run() -> None:
        async for _ in merged([counted("a", 1, ended, fails=True), counted("b", 1_000_000, ended)]):
            pass

    with pytest.raises(ValueError, match="a"):
        asyncio.run(run())
    assert sorted(ended) == ["a", "b"]


def test_whoever_stops_early_closes_all_sources() -> None:
    ended: list[str] = []

    async def run() -> None:
        items = merged([counted("a", 1_000_000, ended), counted("b", 1_000_000, ended)])
        await anext(items)
        await items.aclose()

    asyncio.run(run())
    assert sorted(ended) == ["a", "b"]


def test_what_comes_while_nobody_looks_comes_together() -> None:
    async def run() -> list[list[str]]:
        return [bunch async for bunch in in_bunches(counted("a", 100, []), seconds=0.05)]

    bunches = asyncio.run(run())
    assert [item for bunch in bunches for item in bunch] == [f"a{number}" for number in range(100)]
    assert len(bunches) <= 3


def test_the_first_item_does_not_wait_for_a_second() -> None:
    async def slow() -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.Event().wait()

    async def run() -> list[int]:
        bunches = in_bunches(slow(), seconds=60.0)
        first = await asyncio.wait_for(anext(bunches), timeout=5)
        await bunches.aclose()
        return first

    assert asyncio.run(run()) == [1]


def test_a_bunched_sources_error_comes_behind_what_it_gave() -> None:
    ended: list[str] = []

    came: list[str] = []

    async def run() -> None:
        async for bunch in in_bunches(counted("a", 3, ended, fails=True), seconds=0.0):
            came.extend(bunch)

    with pytest.raises(ValueError, match="a"):
        asyncio.run(run())
    assert came == ["a0", "a1", "a2"]
    assert ended == ["a"]
