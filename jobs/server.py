"""``spanfill serve`` without its options: an application with HTTP, from its start to a signal."""

import socket
import time
from collections.abc import Callable

import ray
from ray import serve

from jobs.signals import Signals, interruptible
from serving.app import APP, AppConfig, assemble
from serving.errors import ConfigError, EngineError
from serving.fleet import connected
from serving.tenants.database import refuse_embedded
from serving.tenants.store import open_store

POLL_SECONDS = 0.25
QUIET_LOGS = {"log_level": "ERROR", "enable_access_log": False}


def serve_until_stopped(config: AppConfig, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Start the application, say where it listens, and end it at SIGINT or SIGTERM, when what runs has ended.

    Raises ``ConfigError`` for a port that is taken or a server for others without a tenant, ``EngineError`` when the
    engine does not start.
    """
    _check_port(host, port)
    store = open_store()
    tenants = [tenant for tenant in store.tenants() if tenant.revoked is None]
    store.close()
    if not tenants and not config.open_until_tenants:
        raise ConfigError(
            f"there is no tenant, and {host} is not only for this machine.",
            remedy="Make one first: spanfill tenants create NAME. Or listen on 127.0.0.1.",
        )
    with interruptible() as stop, connected():
        refuse_embedded(None, len([node for node in ray.nodes() if node["Alive"]]) if config.gateways > 1 else 1)
        serve.start(logging_config=QUIET_LOGS, http_options={"host": host, "port": port})
        say("starting the engine")
        application = assemble(config, app=APP)
        target = serve.RunTarget(target=application, name=APP, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        try:
            if _is_running(stop):
                say(f"{config.model} at http://{host}:{port} (OpenAPI: /docs)")
                say(f"jobs join with RAY_ADDRESS={ray.get_runtime_context().gcs_address}")
                if not tenants:
                    say("no key is asked for yet. Make a tenant and its key: spanfill tenants create NAME")
                while not stop.came:
                    time.sleep(POLL_SECONDS)
            say("stopping: what runs may finish")
        finally:
            serve.delete(APP)


def _is_running(stop: Signals) -> bool:
    """Wait until the application runs; False when it is to stop before. Raises ``EngineError``."""
    while not stop.came:
        time.sleep(POLL_SECONDS)
        app = serve.status().applications.get(APP)
        if app is not None and app.status == "RUNNING":
            return True
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            words = [d.message for d in app.deployments.values() if d.message] or [app.message]
            raise EngineError(f"the application did not start: {words[0]}", remedy="Ray's logs say more.")
    return False


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{host}:{port}: {error.strerror}.", remedy="Choose another --port.") from None
