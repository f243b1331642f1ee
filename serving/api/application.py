"""The gateway's ASGI application from its parts; it needs neither Ray nor an engine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute
from starlette.types import Lifespan

from serving.api import llamacpp, mistral, ollama, openai
from serving.api.ask import Service
from serving.api.door import Door
from serving.api.edge import Edge
from serving.api.metrics import Metrics
from serving.api.replies import READ, UNAVAILABLE, WAITS, documented, install, wait_headers
from serving.engine_args import installed_version
from serving.errors import ForbiddenError
from serving.tenants.caller import Caller

DESCRIPTION = (
    "Code infilling and completion in the words of OpenAI's, Mistral's, llama.cpp's and Ollama's clients. "
    "Errors say what is wrong and what to do about it."
)


class Health(BaseModel):
    """Whether an engine answers."""

    status: Literal["ok", "loading model"]


def application(
    service: Service,
    door: Door,
    metrics: Metrics,
    *,
    is_healthy: Callable[[], bool],
    routers: Sequence[APIRouter] = (),
    larger: Mapping[str, int] | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """All dialects, ``routers`` behind them, ``/health`` and ``/metrics``.

    ``door`` is the dependency that tells who calls; no route that has it reads a body before it knows. ``larger`` gives
    the bytes that bodies may have at some paths.
    """
    app = FastAPI(title="spanfill", version=installed_version("spanfill"), description=DESCRIPTION, lifespan=lifespan)
    install(app)
    for dialect in (openai, mistral, llamacpp, ollama):
        app.include_router(dialect.router(service, door))
    for router in (*routers, _operation(metrics, is_healthy, door)):
        app.include_router(router)
    guarded = [route for route in app.routes if _asks(route, door)]
    app.add_middleware(Edge, metrics=metrics, door=door, guarded=guarded, larger=larger)
    return app


def _asks(route: BaseRoute, door: Door) -> bool:
    """Whether a route asks for a key."""
    return isinstance(route, APIRoute) and any(needed.call is door for needed in route.dependant.dependencies)


def _operation(metrics: Metrics, is_healthy: Callable[[], bool], door: Door) -> APIRouter:
    """What operators and their machines look at; the figures of all tenants together tell one of two the other's."""
    routes = APIRouter(tags=["Operation"])

    none = {"model": Health, "description": "No engine yet.", "headers": WAITS}

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", response_model=Health, responses={503: none})
    async def health() -> Response:
        """Whether an engine answers."""
        if is_healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "loading model"}, UNAVAILABLE, wait_headers())

    text = {"description": "The figures.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    @routes.get("/metrics", response_class=Response, responses={200: text, **documented(*READ)})
    async def told(caller: Annotated[Caller, Depends(door)]) -> Response:
        """Figures in Prometheus' text format, for admins."""
        if caller.role != "admin":
            raise ForbiddenError("Only an admin sees the server's figures.", remedy="Send the key of one.")
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    return routes
