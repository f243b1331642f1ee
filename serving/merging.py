"""Several asynchronous iterators as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    """A source gives nothing more."""

    error: BaseException | None


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What the sources give, as it comes. The first error is raised; all sources are closed at the end, however."""
    queue: asyncio.Queue[T | _Ended] = asyncio.Queue()

    async def drain(source: AsyncGenerator[T, None]) -> None:
        async with aclosing(source):
            async for item in source:
                queue.put_nowait(item)

    def ended(task: "asyncio.Task[None]") -> None:
        queue.put_nowait(_Ended(None if task.cancelled() else task.exception()))

    tasks = [asyncio.ensure_future(drain(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(ended)
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if not isinstance(item, _Ended):
                yield item
                continue
            left -= 1
            if item.error is not None:
                raise item.error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_bunches(source: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[list[T], None]:
    """What a source gives, at once, but no two lists within ``seconds``: what comes meanwhile is in the second."""
    came: list[T] = []
    more = asyncio.Event()

    async def drain() -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    came.append(item)
                    more.set()
        finally:
            more.set()

    task = asyncio.ensure_future(drain())
    try:
        while came or not task.done():
            await more.wait()
            more.clear()
            if came:
                yield [came.pop(0) for _ in range(len(came))]
                await asyncio.wait((task,), timeout=seconds)
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
