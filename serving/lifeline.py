"""A job's own application must not outlive its driver: a detached actor deletes it when the driver falls silent."""

import asyncio
import time
from contextlib import suppress

import ray
from ray import serve

NAMESPACE = "spanfill"
LIFELINE_SECONDS = 40.0
"""Without a heartbeat for this long, a job's own application is deleted."""


class Lifeline:
    """Deletes a job's application when the job's driver has been silent for too long, then ends itself.

    Ray starts it again on another node when its own is lost; it then begins to wait anew.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self._last = time.monotonic()
        self._watch = asyncio.get_event_loop().create_task(self._run())

    async def beat(self) -> None:
        """The driver is alive."""
        self._last = time.monotonic()

    async def _run(self) -> None:
        silent = 0.0
        while silent < LIFELINE_SECONDS:
            await asyncio.sleep(LIFELINE_SECONDS - silent)
            silent = time.monotonic() - self._last
        await asyncio.to_thread(delete_app, self._app, guarded=True)


def guard(app: str) -> None:
    """Start the lifeline of an application."""
    options = {"name": _name(app), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
    ray.remote(Lifeline).options(**options).remote(app)


def beat(app: str) -> None:
    """Tell an application's lifeline that its driver is alive; nobody waits for an answer."""
    with suppress(ValueError):  # Its node is lost and Ray has not started it elsewhere yet.
        ray.get_actor(_name(app), NAMESPACE).beat.remote()


def delete_app(app: str, *, guarded: bool) -> None:
    """Delete an application and, last since it may be who calls, its lifeline."""
    serve.delete(app, _blocking=False)
    if guarded:
        with suppress(ValueError):
            ray.kill(ray.get_actor(_name(app), NAMESPACE))


def _name(app: str) -> str:
    return f"{app}-lifeline"
