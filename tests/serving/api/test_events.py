import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from serving.api.ask import End, Piece, Usage
from serving.api.events import Stream, stream
from serving.errors import EngineDeadError, SpanfillError

Part = Piece | End


class Endless:
    """Pieces without end; ``closed`` tells when nobody wants more."""

    def __init__(self) -> None:
        self.closed = False

    async def parts(self) -> AsyncIterator[Part]:
        """As ``Service.stream``."""
        try:
            while True:
                yield Piece(0, "a")
                await asyncio.sleep(0)
        finally:
            self.closed = True


def tell(part: Part) -> list[str]:
    return [part.text] if isinstance(part, Piece) else ["end"]


def apologise(error: SpanfillError) -> str:
    return f"sorry: {error.message}"


async def opened(parts: AsyncIterator[Part]) -> Stream:
    return await stream(parts, tell, apologise)


def scope_of(version: str) -> dict[str, Any]:
    return {"type": "http", "asgi": {"spec_version": version}}


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


def test_the_lines_come_in_order() -> None:
    async def parts() -> AsyncIterator[Part]:
        yield Piece(0, "a")
        yield Piece(0, "b")
        yield End(Usage())

    async def read() -> list[str]:
        return [str(line) async for line in (await opened(parts())).body_iterator]

    assert asyncio.run(read()) == ["a", "b", "end"]


def test_an_error_before_the_first_line_is_raised_and_a_later_one_told() -> None:
    async def parts(good: int) -> AsyncIterator[Part]:
        for _ in range(good):
            yield Piece(0, "a")
        raise EngineDeadError("gone")

    async def read(good: int) -> list[str]:
        return [str(line) async for line in (await opened(parts(good))).body_iterator]

    with pytest.raises(EngineDeadError):
        asyncio.run(read(0))
    assert asyncio.run(read(2)) == ["a", "a", "sorry: gone"]


def test_a_client_that_goes_away_ends_the_request() -> None:
    async def leave() -> bool:
        endless, gone = Endless(), asyncio.Event()
        lines: list[Any] = []

        async def send(message: Any) -> None:
            lines.append(message)
            if len(lines) == 5:
                gone.set()
            await asyncio.sleep(0)

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        response = await opened(endless.parts())
        await asyncio.wait_for(response(scope_of("2.3"), receive, send), 10)
        return endless.closed

    assert asyncio.run(leave())


@pytest.mark.parametrize("working", [0, 1, 3])
def test_a_connection_that_breaks_while_a_line_is_sent_ends_the_request(working: int) -> None:
    async def leave() -> bool:
        endless = Endless()
        sent: list[Any] = []

        async def send(message: Any) -> None:
            if len(sent) == working:
                raise OSError
            sent.append(message)

        response = await opened(endless.parts())
        with pytest.raises(ClientDisconnect):
            await response(scope_of("2.4"), never, send)
        return endless.closed

    assert asyncio.run(leave())


def test_a_request_that_is_cancelled_while_a_line_is_sent_ends() -> None:
    async def leave() -> bool:
        endless, stuck = Endless(), asyncio.Event()

        async def send(message: Any) -> None:
            stuck.set()
            await asyncio.Event().wait()

        response = await opened(endless.parts())
        sending = asyncio.create_task(response(scope_of("2.4"), never, send))
        await stuck.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        return endless.closed

    assert asyncio.run(leave())


def test_a_request_that_is_cancelled_before_its_first_line_ends() -> None:
    async def leave() -> bool:
        waiting, closed = asyncio.Event(), asyncio.Event()

        async def parts() -> AsyncIterator[Part]:
            try:
                waiting.set()
                await asyncio.Event().wait()
                yield Piece(0, "a")
            finally:
                closed.set()

        opening = asyncio.create_task(opened(parts()))
        await waiting.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        return closed.is_set()

    assert asyncio.run(leave())
