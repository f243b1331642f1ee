"""What surrounds every request: no body is read without a key or beyond its bounds, times are counted, and the answer
says how the caller stands.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.door import Door
from serving.api.metrics import Metrics
from serving.api.replies import reply
from serving.errors import OverloadedError, SpanfillError

MOST_BODY = 4 << 20
"""Bytes of a request's body; a route that takes larger ones (files) is named in ``larger``."""

BODY_SECONDS = 30.0
"""A body may take so long to come, and longer by what has come at ``BODY_RATE``."""

BODY_RATE = 16 << 10
"""Bytes a second that a body brings at least."""

COMING_BODIES = 1_000
"""Bodies of one tenant that are on their way at once: half of what a gateway holds open. Nothing else bounds what
is sent slowly, since a request is admitted when it is read."""

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
    has no key could keep the gateway busy with bodies. Nor may a body that comes slowly, or many of one tenant, keep
    others out. ``larger`` gives the bytes that the bodies of some paths may have instead of ``MOST_BODY``.
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
        self._coming: Counter[str] = Counter()

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
        tenant = ""
        if route is not None:
            try:
                tenant = (await self._door.let_in(scope)).tenant
                if _has_body(scope):
                    self._check_coming(tenant)
            except SpanfillError as error:
                scope["route"] = route
                await _turned_away(scope, receive, send, error)
                return
        with _Body(scope, receive, self._larger.get(scope["path"], MOST_BODY), self._coming, tenant) as body:
            await self._app(scope, body.receive, send)

    def _check_coming(self, tenant: str) -> None:
        if self._coming[tenant] >= COMING_BODIES:
            raise OverloadedError(
                f"{COMING_BODIES} requests of this tenant are being sent.",
                remedy="Send the bodies of some before you begin others.",
            )


async def _turned_away(scope: Scope, receive: Receive, send: Send, error: SpanfillError) -> None:
    """Answer with an error; nobody waits for the rest of a body, so the connection is of no more use behind one."""
    answer = reply(Request(scope), error)
    if _has_body(scope):
        answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


class _Body:
    """A request's body on its way: refused beyond ``most`` bytes, by its header or as it comes, and when it is slow.

    Where there is one it is counted under its tenant in ``coming`` until it has come or is given up. Errors must be
    FastAPI's own: of any other it would make that the body cannot be read.
    """

    def __init__(self, scope: Scope, receive: Receive, most: int, coming: Counter[str], tenant: str) -> None:
        told = dict(scope["headers"]).get(b"content-length", b"0")
        self._receive = receive
        self._most = most
        self._told = int(told) if told.isdigit() else 0
        self._seen = 0
        self._began = asyncio.get_running_loop().time()
        self._coming = coming
        self._tenant = tenant
        self._is_whole = False
        self._is_counted = _has_body(scope)
        if self._is_counted:
            coming[tenant] += 1

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._ends()

    async def receive(self) -> Message:
        """The next part of the body, and behind it what else the client does."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._began + BODY_SECONDS + self._seen / BODY_RATE):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "The body does not come") from None
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if max(self._seen, self._told) > self._most:
                raise HTTPException(413, f"The body is larger than {self._most:,} bytes")
        if not message.get("more_body", False):
            self._is_whole = True
            self._ends()
        return message

    def _ends(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._coming[self._tenant] -= 1
            if not self._coming[self._tenant]:
                del self._coming[self._tenant]


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _route(scope: Scope) -> str:
    """The path as it is routed, so that names in it do not become labels."""
    return getattr(scope.get("route"), "path", "other")
