"""The replicas of a cluster as a job sees them: connect, join or start, watch, release."""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from serving.app import DEPLOYMENT, build, place
from serving.config import EngineConfig, ReplicaConfig
from serving.errors import ConfigError, EngineError, ResourceError
from serving.protocol import EngineInfo, EngineStats

PRIVATE_PREFIX = "spanfill-run-"
"""Applications of this name belong to one job and are never joined by another."""

NAMESPACE = "spanfill"
LIFELINE_SECONDS = 45.0
"""Without a heartbeat for this long, a job's own application is deleted."""

RESOURCE_WAIT_SECONDS = 60.0


@contextmanager
def connected() -> Iterator[bool]:
    """Be in a Ray cluster: the one that this process is in already, else ``RAY_ADDRESS``'s, else one started here.

    Gives whether the cluster was started here, and so ends here. Raises ``ConfigError`` when none answers.
    """
    if ray.is_initialized():
        _start_serve()
        yield False
        return
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False, "object_store_memory": 512 << 20}
    try:
        ray.init(address=address or "local", logging_level="ERROR", log_to_driver=False, **local)
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS = {address!r}: {error}", remedy="Check the address, or unset it.") from error
    try:
        _start_serve(**({} if address else {"proxy_location": "Disabled"}))
        yield not address
    finally:
        ray.shutdown()


def _start_serve(**options: str) -> None:
    serve.start(logging_config={"log_level": "ERROR", "enable_access_log": False}, **options)


@dataclass(frozen=True)
class Fleet:
    """A running application: its name, a handle for calls, what its engines are, whose it is.

    ``own``: this job started it. ``guarded``: a ``Lifeline`` deletes it unless it hears from the job.
    """

    name: str
    handle: DeploymentHandle
    info: EngineInfo
    own: bool = False
    guarded: bool = False

    async def stats(self, replicas: int) -> dict[str, EngineStats]:
        """Readings by replica; asks twice as often as there are replicas, since Serve chooses who answers."""
        answers = await asyncio.gather(*(self.handle.stats.remote() for _ in range(2 * replicas)))
        return dict(answers)

    def beat(self) -> None:
        """Tell the cluster that the job is alive."""
        if self.guarded:
            _lifeline(self.name).beat.remote()

    def release(self) -> None:
        """Delete the application if this job started it."""
        if self.own:
            _delete(self.name, self.guarded)


def join_or_start(
    engine: EngineConfig,
    replica: ReplicaConfig,
    *,
    embedded: bool,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Fleet:
    """Join a running application with the same engine, else start one; returns when every replica is ready.

    ``check`` is called several times a second and may raise to give up. In a cluster that outlives this process (not
    ``embedded``) a started application is guarded by a ``Lifeline``. Raises ``ResourceError`` when resources do not
    suffice within a minute, ``EngineError`` when the engine does not start, both in words.
    """
    joined = _running_fleet(engine)
    if joined is not None:
        say(f"joined the running application {joined.name}")
        return joined
    replica = place(replica, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    name = f"{PRIVATE_PREFIX}{uuid.uuid4().hex[:8]}"
    if not embedded:
        ray.remote(Lifeline).options(
            name=_lifeline_name(name), namespace=NAMESPACE, lifetime="detached", num_cpus=0
        ).remote(name)
    target = serve.RunTarget(target=build(engine, replica), name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        _wait_until_running(name, engine, replica, embedded, say, check)
    except BaseException:
        _delete(name, guarded=not embedded)
        raise
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=name)
    _, info = handle.describe.remote().result()
    return Fleet(name, handle, info, own=True, guarded=not embedded)


def _running_fleet(engine: EngineConfig) -> Fleet | None:
    for name, app in serve.status().applications.items():
        if name.startswith(PRIVATE_PREFIX) or app.status != "RUNNING" or DEPLOYMENT not in app.deployments:
            continue
        handle = serve.get_deployment_handle(DEPLOYMENT, app_name=name)
        fingerprint, info = handle.describe.remote().result(timeout_s=30)
        if fingerprint == engine.fingerprint:
            return Fleet(name, handle, info)
    return None


def _wait_until_running(
    name: str,
    engine: EngineConfig,
    replica: ReplicaConfig,
    embedded: bool,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    patience = time.monotonic() + RESOURCE_WAIT_SECONDS
    seen = False
    while True:
        check()
        if not embedded:
            _lifeline(name).beat.remote()
        app = serve.status().applications.get(name)
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        if app and app.status == "RUNNING":
            return
        if app and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise EngineError(
                f"the engine did not start: {_last_words(deployment.message if deployment else app.message)}",
                remedy="The replica's log is in Ray's session folder, under logs/serve.",
            )
        if seen and app is None:
            raise EngineError(f"the application {name} was deleted while it started.", remedy="Run again to resume.")
        seen = seen or app is not None
        if time.monotonic() > patience and _unplaced(name):
            shortage = _shortage(engine, replica)
            if embedded:
                raise ResourceError(shortage, remedy="Ask for fewer replicas, or for fewer cores each.")
            say(f"still waiting: {shortage}")
            patience = time.monotonic() + RESOURCE_WAIT_SECONDS
        time.sleep(0.1)


def _unplaced(name: str) -> bool:
    """Whether Ray still looks for room for a replica of the application."""
    groups = ray.util.placement_group_table().values()
    return any(name in group["name"] and group["state"] == "PENDING" for group in groups)


def _shortage(engine: EngineConfig, replica: ReplicaConfig) -> str:
    kind, per = ("GPU", engine.tensor_parallel_size) if replica.use_gpu else ("CPU", max(1, replica.cores))
    free, total = ray.available_resources().get(kind, 0), ray.cluster_resources().get(kind, 0)
    others = [n for n, a in serve.status().applications.items() if a.status == "RUNNING"]
    held = f"; held by {', '.join(others)}" if others else ""
    return f"{replica.replicas} replicas ask for {per} {kind} each; {free:g} of {total:g} {kind} are free{held}."


def _last_words(message: str) -> str:
    """The line of a replica's traceback that says what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line.split(":")[0]]
    return (told or lines or ["no reason was given"])[-1]


def _lifeline_name(app: str) -> str:
    return f"{app}-lifeline"


def _lifeline(app: str) -> ActorHandle:
    return ray.get_actor(_lifeline_name(app), NAMESPACE)


def _delete(app: str, guarded: bool) -> None:
    """Delete an application and, last since it may be who calls, its ``Lifeline``."""
    serve.delete(app, _blocking=False)
    if guarded:
        ray.kill(_lifeline(app))


class Lifeline:
    """Deletes a job's application when the job's driver has been silent for too long, then ends itself."""

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
        await asyncio.to_thread(_delete, self._app, True)
