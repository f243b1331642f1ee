"""Who calls: by a key in one of the headers in which clients send them, or anybody on an open server."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope

from serving.errors import AuthenticationError, ForbiddenError
from serving.tenants.caller import Caller
from serving.tenants.terms import NOBODY

OPEN_CALLER = Caller(tenant=NOBODY, key="none", role="admin")
"""Everybody, on loopback before there is any tenant."""

HOW_TO_MAKE_ONE = "Make a tenant and its key with: spanfill tenants create NAME"

BEARER = HTTPBearer(
    scheme_name="bearer", description="A key that `spanfill tenants create` has printed.", auto_error=False
)
X_API_KEY = APIKeyHeader(name="x-api-key", scheme_name="x-api-key", auto_error=False)
API_KEY = APIKeyHeader(name="api-key", scheme_name="api-key", auto_error=False)

CALLER = "spanfill.caller"
"""Where a request's scope says who calls, once that is known."""


class Door:
    """A FastAPI dependency that tells who calls; ``find`` is ``Directory.caller``.

    Where ``has_tenants`` is given, it is asked until there are some, in a thread; until then anybody is let in,
    whatever key is sent: most clients must be given one. But no browser for a page of elsewhere, which would have the
    loopback's server at its service: by its ``Origin``, or by a ``Host`` that is no name of this machine.
    """

    def __init__(
        self, find: Callable[[str], Awaitable[Caller]], *, has_tenants: Callable[[], bool] | None = None
    ) -> None:
        self._find = find
        self._has_tenants = has_tenants

    async def __call__(
        self,
        request: Request,
        _bearer: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)],
        _x_api_key: Annotated[str | None, Security(X_API_KEY)],
        _api_key: Annotated[str | None, Security(API_KEY)],
    ) -> Caller:
        """As ``let_in``; that the headers are named here is for OpenAPI's description."""
        return await self.let_in(request.scope)

    async def let_in(self, scope: Scope) -> Caller:
        """Who calls, looked up once a request; raises ``AuthenticationError``, ``DatabaseAwayError``."""
        if CALLER not in scope:
            scope[CALLER] = await self._caller(Request(scope))
        caller: Caller = scope[CALLER]
        return caller

    async def _caller(self, request: Request) -> Caller:
        if not await self._is_open():
            return await self._find(await _key(request))
        host, origin = request.headers.get("host", "localhost"), request.headers.get("origin", "")
        if not _is_here(f"//{host}"):
            what = f"without a key this server is asked as localhost or 127.0.0.1, not as {host}."
            raise ForbiddenError(what, remedy=HOW_TO_MAKE_ONE + ".")
        if (origin == "null" or origin.startswith(("http:", "https:"))) and not _is_here(origin):
            raise ForbiddenError("web pages of elsewhere are not answered without a key.", remedy=HOW_TO_MAKE_ONE + ".")
        return OPEN_CALLER

    async def _is_open(self) -> bool:
        if self._has_tenants is not None and await asyncio.to_thread(self._has_tenants):
            self._has_tenants = None
        return self._has_tenants is not None


def _is_here(address: str) -> bool:
    """Whether its host is this machine whoever answers for names: a page may have its own name lead here."""
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    return host == "localhost" or host.endswith(".localhost")


async def _key(request: Request) -> str:
    """The key that was sent; raises ``AuthenticationError`` when there is none."""
    bearer = await BEARER(request)
    key = (bearer.credentials.strip() if bearer else "") or await X_API_KEY(request) or await API_KEY(request)
    if not key:
        raise AuthenticationError("no key was sent.", remedy=f"Send Authorization: Bearer KEY. {HOW_TO_MAKE_ONE}.")
    return key
