"""Streams: what a dialect tells of each part of an answer, line by line, ended as soon as the client is gone."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.api.ask import End, Piece
from serving.api.parts import LIMIT_HEADERS
from serving.errors import SpanfillError

Tell = Callable[[Piece | End], Iterable[str]]
"""The lines that a dialect makes of a part, framed; none for a part that its clients need not see."""

Apologise = Callable[[SpanfillError], str]
"""The line that tells of an error behind the first line, when the status has gone out."""

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
DONE = "data: [DONE]\n\n"
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
"""An event, as OpenAPI describes one since 3.2."""

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def encoded(value: Any) -> str:
    """One line of compact JSON, in ASCII: some clients split a stream at any of Unicode's line separators."""
    return json.dumps(value, separators=(",", ":"))


def event(value: Any) -> str:
    """A server-sent event."""
    return f"data: {encoded(value)}\n\n"


def line(value: Any) -> str:
    """A line of newline-delimited JSON."""
    return f"{encoded(value)}\n"


class Stream(StreamingResponse):
    """The ``first`` line, which is there already, and ``lines`` behind it, closed however the sending ends."""

    def __init__(self, first: str, lines: AsyncGenerator[str, None], apologise: Apologise, media_type: str) -> None:
        super().__init__(_followed(first, lines, apologise), media_type=media_type, headers=UNBUFFERED)
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines; a client that goes away ends the request that makes them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def stream(parts: AsyncIterator[Piece | End], tell: Tell, apologise: Apologise, media_type: str = SSE) -> Stream:
    """Wait for the first line, so that an error before it is an answer with a status of its own."""
    lines = _lines(parts, tell)
    return Stream(await anext(lines), lines, apologise, media_type)


async def _lines(parts: AsyncIterator[Piece | End], tell: Tell) -> AsyncGenerator[str, None]:
    try:
        async for part in parts:
            for told in tell(part):
                yield told
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


async def _followed(first: str, lines: AsyncIterator[str], apologise: Apologise) -> AsyncGenerator[str, None]:
    yield first
    try:
        async for told in lines:
            yield told
    except SpanfillError as error:
        yield apologise(error)


def described(media_type: str, description: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI tells of the answer of a route that may stream it."""
    content = {media_type: {"itemSchema": EVENT} if media_type == SSE else {"schema": {"type": "string"}}}
    return {200: {"description": description, "content": content, "headers": LIMIT_HEADERS}}
