"""The gateway: a Ray Serve deployment that answers HTTP with the replicas of its application."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serving.api import llamacpp, mistral, ollama, openai
from serving.api.ask import ServedModel, Service, Usage
from serving.api.edge import Edge
from serving.api.metrics import Metrics
from serving.api.parts import WhoCalls
from serving.api.replies import install
from serving.api.service import Engines, FleetService
from serving.app import AppConfig, function_of
from serving.config import Frozen
from serving.engine_args import installed_version
from serving.errors import AuthenticationError
from serving.formats import load_format
from serving.models import Model
from serving.protocol import EngineInfo, EngineStats
from serving.tenants.caller import Caller
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

OPEN_CALLER = Caller(tenant="local", key="none", role="admin")
"""Everybody, on loopback before there is any tenant."""

HOW_TO_MAKE_ONE = "Make a tenant and its key with: spanfill tenants create NAME"

logger = logging.getLogger(__name__)


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


class Door:
    """Tells who calls: by ``Authorization: Bearer``, ``x-api-key`` or ``api-key``, or nobody on an open server."""

    def __init__(self, directory: Directory, store: TenantStore, *, open_until_tenants: bool) -> None:
        self._directory = directory
        self._store = store
        self._open = open_until_tenants

    async def __call__(self, request: Request) -> Caller:
        """The FastAPI dependency; raises ``AuthenticationError``."""
        key = _key_of(request)
        if key is not None:
            return await self._directory.caller(key)
        if self._open and not await asyncio.to_thread(self._store.tenants):
            return OPEN_CALLER
        raise AuthenticationError("no key was sent.", remedy=f"Send Authorization: Bearer KEY. {HOW_TO_MAKE_ONE}")


def _key_of(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key") or request.headers.get("api-key") or None


class Watch:
    """Reads the replicas every ``LOOK_SECONDS`` and tells the desk what they hold."""

    def __init__(self, handle: DeploymentHandle, replicas: int, metrics: Metrics) -> None:
        self._handle = handle
        self._replicas = replicas
        self._metrics = metrics
        self._read = -STALE_SECONDS
        self.info: EngineInfo | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether a replica answered lately."""
        return time.monotonic() - self._read < STALE_SECONDS

    async def capacity(self) -> Capacity:
        """What the replicas that answer hold together; none when none does."""
        if self.info is None:
            _, self.info = await self._handle.describe.remote()
        answers = [self._handle.stats.remote(lane) for lane in range(self._replicas)]
        found: dict[str, EngineStats] = {}
        for answer in answers:
            with suppress(RayError, RayServeException, TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    found |= dict([await answer])
        if found:
            self._read = time.monotonic()
            self._metrics.read(found)
        return Capacity(len(found) * self.info.max_num_seqs, len(found) * self.info.kv_cache_tokens)

    async def keep(self, desk: Desk) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(RayError, RayServeException):
                desk.resize(await self.capacity())
            await asyncio.sleep(LOOK_SECONDS)


class Gateway:
    """One gateway process; Serve gives it requests by ASGI."""

    async def __init__(  # type: ignore[misc]
        self, replicas: DeploymentHandle, config: GatewayConfig, model: ServedModel, application: AppConfig
    ) -> None:
        self._config, self._model, self._application = config, model, application
        streamed = replicas.options(
            stream=True, _by_reference=False, request_serialization="pickle", response_serialization="pickle"
        )
        self._metrics = Metrics()
        self._watch = Watch(replicas, config.replicas, self._metrics)
        self._desk = Desk(config.app, Capacity(0, 0))
        self._store = await asyncio.to_thread(open_store)
        self._directory = Directory(self._store.known)
        self._meter = await asyncio.to_thread(open_meter, self._store)
        fmt = await asyncio.to_thread(load_format, config.format, tokenizer_of=config.tokenizer)
        engines = Engines(model, fmt, config.tokenizer, streamed.generate.remote, streamed.stream.remote)
        self._service = FleetService(engines, self._desk, self._used, self._metrics)

    def _used(self, caller: Caller, model: str, usage: Usage) -> None:
        self._meter.add(
            UsageRecord(
                caller.tenant,
                caller.key,
                model,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                time.time(),
            )
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._app()

    def _app(self) -> FastAPI:
        @asynccontextmanager
        async def life(_: FastAPI) -> AsyncIterator[None]:
            watching = asyncio.ensure_future(self._watch.keep(self._desk))
            yield
            watching.cancel()
            await self._desk.close()
            await asyncio.to_thread(self._meter.close)
            self._directory.close()

        door = Door(self._directory, self._store, open_until_tenants=self._config.open_until_tenants)
        app = FastAPI(title="spanfill", version=installed_version("spanfill"), lifespan=life)
        install(app)
        for dialect in (openai, mistral, llamacpp, ollama):
            app.include_router(dialect.router(self._service, door))
        context = Context(self._config, self._service, door, self._store, self._meter, self._application)
        larger: dict[str, int] = {}
        for name, settings in self._application.routes.items():
            make: MakeRoutes = function_of(name)
            added = make(context, settings)
            app.include_router(added.router)
            larger |= added.larger
        app.add_middleware(Edge, metrics=self._metrics, larger=larger)
        self._add_own(app)
        return app

    def _add_own(self, app: FastAPI) -> None:
        @app.get("/health", tags=["Operation"], responses={503: {"description": "No engine is ready."}})
        async def health() -> Response:
            """Whether an engine answers."""
            healthy = self._watch.is_healthy
            return JSONResponse({"status": "ok" if healthy else "loading model"}, 200 if healthy else 503)

        @app.get("/metrics", tags=["Operation"], response_class=Response)
        async def metrics() -> Response:
            """Figures in Prometheus' text format."""
            return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")
