"""The gateway's routes for files, batches, jobs and usage, and the agent that runs what they queue.

``AppConfig.routes`` names ``jobs.routes:routes``. Imports run one way: ``serving`` knows nothing of it.
"""

import asyncio
import platform
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI

from jobs.api import batches, files, native, usage
from jobs.api.agent import Agent
from jobs.api.config import DEFAULT, RoutesConfig
from jobs.api.database import Database
from jobs.api.office import Office
from jobs.api.queue import Queue
from jobs.api.shelf import Shelf
from serving.api.gateway import Context, Routes
from serving.home import home_folder
from serving.tenants.database import database_address

FRAME_BYTES = 1 << 20
"""What a form adds to the file in it."""


def routes(context: Context, settings: dict[str, Any]) -> Routes:
    """What ``AppConfig.routes`` names; ``settings`` are those of ``RoutesConfig``. Raises ``ConfigError``."""
    config = RoutesConfig.parse(settings | {"app": context.application}, where="routes")
    return Routes(make_routes(context, config), {"/v1/files": config.upload_bytes + FRAME_BYTES})


def make_routes(context: Context, config: RoutesConfig = DEFAULT) -> APIRouter:
    """The routes; while they are served, the agent runs."""
    database = Database(database_address())
    office = _office(database, context, config)
    agent = Agent(office, home_folder() / "places")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        agent.start()
        yield
        await asyncio.to_thread(agent.close)
        database.close()

    routes = APIRouter(lifespan=life)
    common = (context.caller, config)
    routes.include_router(files.router(office.shelf, *common))
    routes.include_router(batches.router(context.service, office.shelf, office.queue, *common))
    routes.include_router(native.router(context.service, office.shelf, office.queue, *common))
    routes.include_router(usage.router(context.store, context.caller))
    return routes


def _office(database: Database, context: Context, config: RoutesConfig) -> Office:
    root = Path(config.folder).absolute() if config.folder else home_folder() / "files"
    return Office(
        queue=Queue(database, unfinished=config.unfinished),
        shelf=Shelf(database, root, most_bytes=config.tenant_bytes, most_files=config.tenant_files),
        add_usage=context.store.add_usage,
        gateway=context.config,
        service=context.service,
        config=config,
        holder=f"{platform.node()} {uuid.uuid4().hex}",
        stopping=threading.Event(),
    )
