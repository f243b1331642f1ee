"""The gateway: a Ray Serve deployment that answers HTTP with the replicas of its application."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import APIRouter, FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.application import application
from serving.api.ask import ServedModel, Service, Usage
from serving.api.door import Door
from serving.api.metrics import Metrics
from serving.api.parts import WhoCalls
from serving.api.service import Engines, FleetService
from serving.app_config import AppConfig, function_of
from serving.config import Frozen
from serving.formats import load_format
from serving.models import Model
from serving.protocol import EngineInfo, EngineStats
from serving.router import streamed
from serving.tenants.caller import Caller
from serving.tenants.database import refuse_embedded
from serving.tenants.desk import Desk
from serving.tenants.directory import Directory
from serving.tenants.metering import Meter, open_meter
from serving.tenants.store import TenantStore, open_store
from serving.tenants.tickets import Capacity
from serving.tenants.usage import UsageRecord

LOOK_SECONDS = 2.0
"""How often the replicas are read."""

STALE_SECONDS = 10.0
"""Without a reading for so long the gateway is not healthy."""


class GatewayConfig(Frozen):
    """What a gateway is told; ``open_until_tenants``: without any tenant no key is asked for (loopback only)."""

    app: str
    model: str
    tokenizer: str
    format: str
    replicas: int
    open_until_tenants: bool = False


@dataclass(frozen=True)
class Context:
    """What the routes of other packages are made from; ``caller`` is the dependency that tells who calls.

    ``application`` is the configuration of the application that serves them.
    """

    config: GatewayConfig
    service: Service
    caller: WhoCalls
    store: TenantStore
    meter: Meter
    application: AppConfig | None = None


@dataclass(frozen=True)
class Routes:
    """What another package adds: a router, and the bytes that bodies may have at some of its paths."""

    router: APIRouter
    larger: Mapping[str, int]


MakeRoutes = Callable[[Context, dict[str, Any]], Routes]
"""What ``AppConfig.routes`` names; it is given the settings that stand there."""


def served(model: Model, name: str, context: int) -> ServedModel:
    """A model as clients list it."""
    fmt = load_format(model.format, tokenizer_of=name)
    return ServedModel(
        name=name,
        format=model.format,
        context=context,
        can_infill=fmt.can_infill,
        created=int(time.time()),
        licence=model.licence,
        notice=model.notice,
    )


def check_database() -> None:
    """Raise ``ConfigError`` for an SQLite database where several nodes are alive.

    Serve starts a gateway, be it the only one, on any node, and again on another when its own is lost. Machines may
    have the same name; Ray nodes on one machine have the same file.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    refuse_embedded(None, [f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}" for node in alive])


class Hearing:
    """Tells of a client that is gone as ASGI does, where Serve raises: nobody takes what its task ends with."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def heard() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self._app(scope, heard, send)


class Watch:
    """Reads the replicas every ``LOOK_SECONDS`` and tells the desk what they hold."""

    def __init__(self, handle: DeploymentHandle, replicas: int, metrics: Metrics) -> None:
        self._handle = handle
        self._replicas = replicas
        self._metrics = metrics
        self._read = -math.inf
        self.info: EngineInfo | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether a replica with a living engine answered lately; not once all that answer have dead ones."""
        return time.monotonic() - self._read < STALE_SECONDS

    async def capacity(self) -> Capacity:
        """What the living engines of the replicas that answer hold together; none when none does."""
        if self.info is None:
            _, self.info = await self._handle.describe.remote()
        readings = await asyncio.gather(*(self._reading(lane) for lane in range(self._replicas)))
        read = [reading for reading in readings if reading is not None]
        if found := {name: stats for name, stats in read if stats.is_alive}:
            self._read = time.monotonic()
            self._metrics.read(found)
        elif read:
            self._read = -math.inf
        count = len(found)
        return Capacity(count * self.info.max_num_seqs, count * self.info.kv_cache_tokens, count)

    async def _reading(self, lane: int) -> tuple[str, EngineStats] | None:
        """A replica's name and its engine's reading, unless it is lost or slow."""
        with suppress(RayError, RayServeException, TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                found: tuple[str, EngineStats] = await self._handle.stats.remote(lane)
                return found
        return None

    async def keep(self, desk: Desk) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(RayError, RayServeException):
                desk.resize(await self.capacity())
            await asyncio.sleep(LOOK_SECONDS)


class Gateway:
    """One gateway process; Serve gives it requests by ASGI.

    It looks for itself where it is: nodes may have joined since the application was built.
    """

    async def __init__(  # type: ignore[misc]
        self, replicas: DeploymentHandle, config: GatewayConfig, model: ServedModel, application: AppConfig
    ) -> None:
        await asyncio.to_thread(check_database)
        self._config, self._model, self._application = config, model, application
        calls = streamed(replicas)
        self._metrics = Metrics(uuid.uuid4().hex[:8])
        self._watch = Watch(replicas, config.replicas, self._metrics)
        self._watching: asyncio.Task[None] | None = None
        self._desk = Desk(config.app, Capacity(0, 0))
        self._store = await asyncio.to_thread(open_store)
        self._directory = Directory(self._store.known)
        self._meter = await asyncio.to_thread(open_meter, self._store)
        fmt = await asyncio.to_thread(load_format, config.format, tokenizer_of=config.tokenizer)
        engines = Engines(model, fmt, config.tokenizer, calls.generate.remote, calls.stream.remote)
        self._service = FleetService(engines, self._desk, self._used, self._metrics)

    def _used(self, caller: Caller, model: str, usage: Usage, requests: int) -> None:
        self._meter.add(
            UsageRecord(
                caller.tenant,
                caller.key,
                model,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                time.time(),
                requests=requests,
            )
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._app()

    def _app(self) -> FastAPI:
        has_tenants = (lambda: bool(self._store.tenants())) if self._config.open_until_tenants else None
        door = Door(self._directory.caller, has_tenants=has_tenants)
        context = Context(self._config, self._service, door, self._store, self._meter, self._application)
        added = [_made(name, settings, context) for name, settings in self._application.routes.items()]
        made = application(
            self._service,
            door,
            self._metrics,
            is_healthy=lambda: self._watch.is_healthy,
            routers=[routes.router for routes in added],
            larger={path: most for routes in added for path, most in routes.larger.items()},
            lifespan=self._life,
        )
        made.add_middleware(Hearing)
        return made

    async def check_health(self) -> None:
        """Called by Serve; raises what ended the reading of the replicas, without which nobody is admitted."""
        watching = self._watching
        if watching is not None and watching.done() and not watching.cancelled():
            watching.result()

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        self._watching = asyncio.ensure_future(self._watch.keep(self._desk))
        yield
        self._watching.cancel()
        await self._desk.close()
        await asyncio.to_thread(self._meter.close)
        self._directory.close()
        await asyncio.to_thread(self._store.close)


def _made(name: str, settings: dict[str, Any], context: Context) -> Routes:
    """What another package adds, by the name of its function."""
    make: MakeRoutes = function_of(name)
    return make(context, settings)
