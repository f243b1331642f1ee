"""The replicas of a cluster as a job sees them: connect, join or start, watch, release."""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from serving import brood
from serving.app import DEPLOYMENT, build, place
from serving.config import EngineConfig, ReplicaConfig
from serving.errors import ConfigError, EngineError, ResourceError, TerminatedJobError
from serving.lifeline import beat, delete_app, guard
from serving.protocol import EngineInfo, EngineStats

PRIVATE_PREFIX = "spanfill-run-"
"""Applications of this name belong to one job and are never joined by another."""

RESOURCE_WAIT_SECONDS = 60.0
KNOCK_SECONDS = 10.0
LOOK_SECONDS = 2.0
STATS_SECONDS = 5.0
DESCRIBE_SECONDS = 60.0
COUNT_SECONDS = 10.0
"""How often a job that has joined a fleet counts its replicas."""

QUIET_SECONDS = 30.0
"""A job whose rows have not grown for this long asks whether its engines run."""

HOPELESS_SECONDS = 900.0
RAY_FOLDER = str(Path(ray.__file__).parent)
UNSTARTED = "The machine may be too busy: run again. Ray's logs are in /tmp/ray, or where RAY_TMPDIR says."
UNREACHED = "Check the address, or unset it; where Ray asks for a token, set RAY_AUTH_MODE=token."

FEWER = "Ask for fewer replicas, or for fewer cores each."
STOP_OTHERS = "Stop the fleet or job that holds the engines' GPUs or cores, or add a machine, and run again."

UNREAD = ("/log_monitor.py", "/monitor.py", "/dashboard.py")
"""Ray's programs for logs, autoscaling and its own API, of which an embedded cluster has no reader: 1 % of a core."""

EMBEDDED = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_worker_niceness": "0",
}
"""The environment of a Ray that lives and dies with one job: without it its clockwork takes 5 % of a core more.

Nobody reads its metrics or task events, and there is no other node whose resources could change. Serve's loop starts
replicas as well: with one a second an engine is healthy four seconds later than with two.
"""


@contextmanager
def connected() -> Iterator[bool]:
    """Be in a Ray cluster: the one that this process is in already, else ``RAY_ADDRESS``'s, else one started here.

    Gives whether the cluster was started here, and so ends here. Raises ``ConfigError`` when none answers,
    ``EngineError`` when none starts, ``TerminatedJobError`` on SIGTERM meanwhile.
    """
    if ray.is_initialized():
        yield False
        return
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            _init(address)
        except OSError as error:
            raise ConfigError(f"RAY_ADDRESS = {address!r}: {error}.", remedy=UNREACHED) from error
    else:
        _start()
    try:
        yield not address
    finally:
        if not address and brood.is_headless():
            brood.end()  # Ray would wait for its head, and then end this process in the middle.
        ray.shutdown()
        if not address:
            brood.end()


def _start() -> None:
    """Start a cluster of this machine, twice if need be.

    Of a process that had one before Ray's daemons do not always come up: 2 of 12 times in one run of ``spanfill tune``.
    """
    before, init = _daemons(), partial(_init, "local", include_dashboard=False, object_store_memory=512 << 20)
    with _defaults(EMBEDDED):
        try:
            init()
        except (EngineError, OSError):
            brood.kill(_daemons() - before)  # Ray forgets those of a start that fails.
            init()
    brood.begin(_daemons() - before, ray.get_runtime_context().gcs_address)
    brood.kill(_daemons(UNREAD) - before)


def _daemons(names: str | tuple[str, ...] = "") -> set[psutil.Process]:
    """The processes below this one that run Ray's own programs, or those whose paths end so."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word.startswith(RAY_FOLDER) and word.endswith(names) for word in process.cmdline()):
                found.add(process)
    return found


def _init(address: str, **options: Any) -> None:
    """Be in the cluster; raises ``OSError``, ``EngineError``, ``TerminatedJobError`` on SIGTERM meanwhile."""
    try:
        with _own_signal_handlers():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
    except OSError:
        ray.shutdown()
        raise
    except SystemExit as error:
        # Ray's own handler of SIGTERM is in place until ``ray.init`` has returned.
        ray.shutdown()
        if error.code != signal.SIGTERM:
            raise
        raise TerminatedJobError from None
    except Exception as error:  # Ray raises no class of its own when a node's processes do not come up in time.
        ray.shutdown()
        words = " ".join(str(error).split())[:300]
        raise EngineError(f"Ray does not start: {words}.", remedy=UNSTARTED) from error


def _knock(address: str) -> None:
    """Raise ``OSError`` when nothing listens at ``host:port``, which Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


@contextmanager
def _defaults(environment: dict[str, str]) -> Iterator[None]:
    """Environment variables where they are not set, for processes that the block starts, and gone after it."""
    added = environment.keys() - os.environ.keys()
    os.environ.update({name: environment[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the caller's handlers: ``ray.init`` sets one of its own, which ends the process at SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_serve(*, embedded: bool) -> None:
    """Start Serve unless it runs; in a cluster that ends with this process it has no HTTP proxy."""
    options = {"proxy_location": "Disabled"} if embedded else {}
    serve.start(logging_config={"log_level": "ERROR", "enable_access_log": False}, **options)


@dataclass
class Fleet:
    """A running application: its name, a handle for calls, its replicas and what their engines are, whose it is.

    ``own``: this job started it. ``guarded``: a ``Lifeline`` deletes it unless it hears from the job.
    """

    name: str
    handle: DeploymentHandle
    info: EngineInfo
    replicas: int
    own: bool = False
    guarded: bool = False
    vigil: "Vigil" = field(default_factory=lambda: Vigil())

    def stats(self) -> dict[str, EngineStats]:
        """A reading of each replica that answers at once, by its name."""
        asked = [self.handle.stats.remote(lane) for lane in range(self.replicas)]
        found: dict[str, EngineStats] = {}
        for answer in asked:
            with suppress(RayError, TimeoutError, RayServeException):
                found |= dict([answer.result(timeout_s=STATS_SECONDS)])
        return found

    def watch(self, rows: int, say: Callable[[str], None]) -> None:
        """Tell the cluster that the job is alive and, when its ``rows`` do not grow, look whether an engine still runs.

        Cheap enough to be called several times a second. Raises ``EngineError`` when no engine has run for
        ``HOPELESS_SECONDS``: Serve starts lost ones again, and some come back only when a machine does.
        """
        now = time.monotonic()
        if now < self.vigil.next_look:
            return
        self.vigil.next_look = now + LOOK_SECONDS
        if self.guarded:
            beat(self.name)
        if rows != self.vigil.rows:
            self.vigil.rows, self.vigil.since = rows, now
        elif now - self.vigil.since > QUIET_SECONDS:
            self._look(now, say)

    def has_grown(self) -> bool:
        """Whether somebody has started more ``replicas`` of a fleet that was joined; looks now and then."""
        vigil, now = self.vigil, time.monotonic()
        if not self.own and vigil.counting is None and now >= vigil.next_count:
            vigil.next_count, vigil.counting = now + COUNT_SECONDS, _Counting(self.name)
        if vigil.counting is None or vigil.counting.is_alive():
            return False
        running, vigil.counting = vigil.counting.running, None
        has_grown, self.replicas = running > self.replicas, max(running, self.replicas)
        return has_grown

    def _look(self, now: float, say: Callable[[str], None]) -> None:
        try:
            app = serve.status().applications.get(self.name)
        except RayError as error:
            say(f"Serve does not answer: {str(error).splitlines()[0]}")
            return
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        if app and _running(app):
            self.vigil.down = None
            return
        words = last_words(deployment.message) if deployment else f"the application {self.name} is gone"
        if self.vigil.down is None:
            self.vigil.down = now
            say(f"no engine is running, waiting for one: {words}")
        if now - self.vigil.down > HOPELESS_SECONDS or app is None:
            raise EngineError(f"no engine runs any more: {words}", remedy="Mend that and run again to resume.")

    def release(self) -> None:
        """Delete the application if this job started it."""
        if self.vigil.counting is not None:
            self.vigil.counting.join(STATS_SECONDS)
        if self.own:
            brood.attended(lambda: delete_app(self.name, guarded=self.guarded))


@dataclass
class Vigil:
    """What a ``Fleet`` remembers: the rows it saw last, since when, since when no engine runs, when it looks again."""

    rows: int = -1
    since: float = 0.0
    next_look: float = 0.0
    next_count: float = 0.0
    counting: "_Counting | None" = None
    down: float | None = None


class _Counting(threading.Thread):
    """Asks Serve how many replicas an application has, for as long as that takes; nobody waits for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name="spanfill-count", daemon=True)
        self._app = name
        self.running = 0
        self.start()

    def run(self) -> None:
        """None where Serve does not answer."""
        with suppress(RayError, RayServeException):
            app = serve.status().applications.get(self._app)
            self.running = _running(app) if app else 0


def join_or_start(
    engine: EngineConfig,
    replica: ReplicaConfig,
    *,
    embedded: bool,
    alone: bool = False,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Fleet:
    """Join a running application with the same engine, else start one; returns when every replica is ready.

    ``check`` is called several times a second and may raise to give up. In a cluster that outlives this process (not
    ``embedded``) a started application is guarded by a ``Lifeline``, and waits for room unless it is to run ``alone``,
    which joins nobody. Raises ``ResourceError`` when resources do not suffice within a minute, ``EngineError`` when the
    engine does not start, both in words.
    """
    joined = None if alone else _running_fleet(engine)
    if joined is not None:
        say(f"joined the running application {joined.name}")
        return joined
    replica = place(replica, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    name = f"{PRIVATE_PREFIX}{uuid.uuid4().hex[:8]}"
    if not embedded:
        guard(name)
    target = serve.RunTarget(target=build(engine, replica), name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        remedy = FEWER if embedded else STOP_OTHERS if alone else None
        _wait_until_running(name, engine, replica, say, check, guarded=not embedded, remedy=remedy)
        handle = serve.get_deployment_handle(DEPLOYMENT, app_name=name)
        _, info = _described(name, handle)
    except BaseException:
        delete_app(name, guarded=not embedded)
        raise
    return Fleet(name, handle, info, replica.replicas, own=True, guarded=not embedded)


def _running_fleet(engine: EngineConfig) -> Fleet | None:
    for name, app in serve.status().applications.items():
        if name.startswith(PRIVATE_PREFIX) or app.status != "RUNNING" or DEPLOYMENT not in app.deployments:
            continue
        handle = serve.get_deployment_handle(DEPLOYMENT, app_name=name)
        fingerprint, info = _described(name, handle)
        if fingerprint == engine.fingerprint:
            return Fleet(name, handle, info, max(1, _running(app)))
    return None


def _running(app: ApplicationStatusOverview) -> int:
    """Replicas that can be called."""
    deployment = app.deployments.get(DEPLOYMENT)
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0


def _described(name: str, handle: DeploymentHandle) -> tuple[str, EngineInfo]:
    """What a replica says of its engine; raises ``EngineError`` when none can be reached."""
    try:
        told: tuple[str, EngineInfo] = handle.describe.remote().result(timeout_s=DESCRIBE_SECONDS)
        return told
    except TimeoutError as error:
        raise EngineError(
            f"the replicas of {name} do not answer within {DESCRIBE_SECONDS:g} s.",
            remedy="Their node may be too busy; and RAY_AUTH_MODE must say here what it says in the cluster.",
        ) from error


def _wait_until_running(
    name: str,
    engine: EngineConfig,
    replica: ReplicaConfig,
    say: Callable[[str], None],
    check: Callable[[], None],
    *,
    guarded: bool,
    remedy: str | None,
) -> None:
    """Return once the replicas run; where nobody is to wait for room, there is a ``remedy`` for want of it."""
    patience = time.monotonic() + RESOURCE_WAIT_SECONDS
    seen = False
    while True:
        check()
        if guarded:
            beat(name)
        app = serve.status().applications.get(name)
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        if app and app.status == "RUNNING":
            return
        if app and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise EngineError(
                f"the engine did not start: {last_words(deployment.message if deployment else app.message)}",
                remedy="The replica's log is in Ray's session folder, under logs/serve.",
            )
        if seen and app is None:
            raise EngineError(f"the application {name} was deleted while it started.", remedy="Run again to resume.")
        seen = seen or app is not None
        if time.monotonic() > patience and _unplaced(name):
            shortage = _shortage(engine, replica)
            if remedy is not None:
                raise ResourceError(shortage, remedy=remedy)
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


def last_words(message: str) -> str:
    """The line of a replica's traceback that says what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line.split(":")[0]]
    return (told or lines or ["no reason was given"])[-1]
