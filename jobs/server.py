"""``spanfill serve`` without its options: an application with HTTP, from its start to a signal."""

import os
import socket
import time
from collections.abc import Callable

import ray
from ray import serve

from jobs.signals import Signals, interruptible
from serving import brood
from serving.app import APP, DEPLOYMENT, assemble
from serving.app_config import AppConfig
from serving.errors import ConfigError, EngineError
from serving.fleet import RESOURCE_WAIT_SECONDS, connected, last_words
from serving.tenants.store import open_store

POLL_SECONDS = 0.25
REMEMBER_SECONDS = 10.0
QUIET_LOGS = {"log_level": "ERROR", "enable_access_log": False}


def serve_until_stopped(config: AppConfig, *, host: str, port: int, say: Callable[[str], None]) -> int:
    """Start the application, say where it listens, and end it at SIGINT or SIGTERM, when what runs has ended.

    Returns the exit code that the signal asks for, 130 or 143. Raises ``ConfigError`` for a port that is taken or a
    server for others without a tenant, ``EngineError`` when the engine does not start.
    """
    _check_port(host, port)
    has_tenants = _has_tenants()
    if not has_tenants and not config.open_until_tenants:
        raise ConfigError(
            f"there is no tenant, and {host} is not only for this machine.",
            remedy="Make one first: spanfill tenants create NAME. Or listen on 127.0.0.1.",
        )
    with interruptible() as stop, connected():
        application = assemble(config, app=APP)
        say("starting the engine")
        # Last: until there is an application, Serve answers that there is nothing, even where its health is asked.
        serve.start(logging_config=QUIET_LOGS, http_options={"host": host, "port": port})
        target = serve.RunTarget(target=application, name=APP, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        try:
            if _is_running(stop, config.replicas.replicas, say):
                say(f"{config.model} at http://{f'[{host}]' if ':' in host else host}:{port} (OpenAPI: /docs)")
                say(f"jobs join with {_way_in()}")
                if not has_tenants:
                    say("no key is asked for yet. Make a tenant and its key: spanfill tenants create NAME")
                looked = -REMEMBER_SECONDS
                while not stop.came:
                    time.sleep(POLL_SECONDS)
                    if time.monotonic() - looked >= REMEMBER_SECONDS:
                        looked = time.monotonic()
                        brood.remember()
            say("stopping: what runs may finish")
        finally:
            brood.attended(lambda: serve.delete(APP))
    return stop.exit_code


def _way_in() -> str:
    """The environment of a job that joins: Ray sends its token to an address that is named only when it is told to."""
    token = " RAY_AUTH_MODE=token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"RAY_ADDRESS={ray.get_runtime_context().gcs_address}{token}"


def _has_tenants() -> bool:
    """Whether there is a tenant: a revoked one is one, since then a gateway asks for keys."""
    store = open_store()
    try:
        return bool(store.tenants())
    finally:
        store.close()


def _is_running(stop: Signals, replicas: int, say: Callable[[str], None]) -> bool:
    """Wait until the application runs; False when it is to stop before. Raises ``EngineError``."""
    patience = time.monotonic() + RESOURCE_WAIT_SECONDS
    while not stop.came:
        time.sleep(POLL_SECONDS)
        app = serve.status().applications.get(APP)
        if app is not None and app.status == "RUNNING":
            return True
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            words = [d.message for d in app.deployments.values() if d.message] or [app.message]
            raise EngineError(f"the application did not start: {last_words(words[0])}", remedy="Ray's logs say more.")
        if time.monotonic() > patience:
            deployment = app.deployments.get(DEPLOYMENT) if app else None
            running = deployment.replica_states.get("RUNNING", 0) if deployment else 0
            say(f"still waiting: {running} of {replicas} engines run; {_room()}")
            patience = time.monotonic() + RESOURCE_WAIT_SECONDS
    return False


def _room() -> str:
    """What of the cluster nobody holds."""
    free, total = ray.available_resources(), ray.cluster_resources()
    return ", ".join(
        f"{free.get(kind, 0):g} of {total[kind]:g} {kind} are free" for kind in ("CPU", "GPU") if kind in total
    )


def _check_port(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}.", remedy="Give an address of this machine.") from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(f"{host}:{port}: {error.strerror}.", remedy="Choose another --port.") from None
