"""What surrounds every request: no body is read without a key or beyond its bounds, times are counted, and the answer
says how the caller stands.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.door import Door
from serving.api.metrics import Metrics
from serving.api.replies import reply
from serving.errors import SpanfillError

MOST_BODY = 4 << 20
"""Bytes of a request's body; a route that takes larger ones (files) is named in ``larger``."""

GONE, FAILED = 499, 500
"""How a request is counted whose client went away, and one that raised what nobody expected."""


@dataclass(slots=True)
class Noted:
    """What is learned of a request while it is answered; ``headers`` go out with the answer."""

    headers: dict[str, str] = field(default_factory=dict)


noted: ContextVar[Noted | None] = ContextVar("noted", default=None)
"""Of the request that is being answered."""


class Edge:
    """ASGI middleware.

    What ``guarded`` routes would answer is let in by the ``door`` before anything of the body is read: else whoever
    has no key could keep the gateway busy with bodies. ``larger`` gives the bytes that the bodies of some paths may
    have instead of ``MOST_BODY``.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        door: Door,
        guarded: Sequence[BaseRoute],
        larger: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._door = door
        self._guarded = guarded
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        about, started = Noted(), time.monotonic()
        token = noted.set(about)
        status = FAILED

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(name.encode(), value.encode()) for name, value in about.headers.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self._answer(scope, receive, sent)
        except asyncio.CancelledError:
            status = GONE
            raise
        finally:
            noted.reset(token)
            self._metrics.answered(_route(scope), status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = next((route for route in self._guarded if route.matches(scope)[0] is Match.FULL), None)
        if route is not None:
            try:
                await self._door.let_in(scope)
            except SpanfillError as error:
                scope["route"] = route
                await _turned_away(scope, receive, send, error)
                return
        await self._app(scope, _bounded(scope, receive, self._most(scope)), send)

    def _most(self, scope: Scope) -> int:
        return self._larger.get(scope["path"], MOST_BODY)


async def _turned_away(scope: Scope, receive: Receive, send: Send, error: SpanfillError) -> None:
    """Answer with an error; nobody waits for the rest of a body, so the connection is of no more use behind one."""
    answer = reply(Request(scope), error)
    headers = dict(scope["headers"])
    if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
        answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


def _bounded(scope: Scope, receive: Receive, most: int) -> Receive:
    """``receive`` that refuses a body of more than ``most`` bytes, by its header or as it comes.

    The error must be FastAPI's own: of any other it would make that the body cannot be read.
    """
    seen = 0
    told = dict(scope["headers"]).get(b"content-length", b"0")

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most or (told.isdigit() and int(told) > most):
                raise HTTPException(413, f"The body is larger than {most:,} bytes")
        return message

    return bounded


def _route(scope: Scope) -> str:
    """The path as it is routed, so that names in it do not become labels."""
    return getattr(scope.get("route"), "path", "other")
