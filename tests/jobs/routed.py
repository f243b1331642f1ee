"""The routes of files, batches and jobs over a real SQLite file; as a process, a gateway without a port, to be killed.

Its state is in ``SPANFILL_HOME``. Callers are named by their key: ``Bearer acme`` is a user of the tenant acme,
``Bearer acme/admin`` an admin.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
from fastapi import FastAPI, Header
from starlette.testclient import TestClient

from jobs.api.config import RoutesConfig
from jobs.routes import make_routes
from serving.api.gateway import Context, GatewayConfig
from serving.api.replies import install
from serving.app_config import AppConfig
from serving.tenants.caller import Caller
from serving.tenants.metering import open_meter
from serving.tenants.store import open_store
from tests.serving.api.scripted import Scripted

ROOT = Path(__file__).parents[2]
GATEWAY = GatewayConfig(app="none", model="demo", tokenizer="demo-codegen25", format="codegen25", replicas=1)
IDLE = RoutesConfig(at_once=0)
"""Takes works and runs none."""

SLOW = RoutesConfig(app=AppConfig(model="demo-codegen25", engine="simulated", engine_args={"max_num_seqs": 8}))
"""Some twenty seconds for 1,500 lines or rows."""

ENDED = ("completed", "failed", "cancelled", "expired")


async def who_calls(authorization: Annotated[str, Header()] = "Bearer acme") -> Caller:
    """A caller by the name in the key."""
    tenant, _, role = authorization.removeprefix("Bearer ").partition("/")
    return Caller(tenant, f"key-of-{tenant}", "admin" if role == "admin" else "user")


@contextmanager
def routing(config: RoutesConfig = IDLE) -> Iterator[FastAPI]:
    """A gateway that serves the routes, and whose agent runs what is queued while it does."""
    with closing(open_store()) as store, closing(open_meter(store)) as meter:
        app = FastAPI()
        install(app)
        app.include_router(make_routes(Context(GATEWAY, Scripted(), who_calls, store, meter), config))
        yield app


@contextmanager
def routed(config: RoutesConfig = IDLE) -> Iterator[TestClient]:
    """A client of such a gateway."""
    with routing(config) as app, TestClient(app) as client:
        yield client


def as_tenant(name: str) -> dict[str, str]:
    """The headers of a caller."""
    return {"Authorization": f"Bearer {name}"}


def upload(client: TestClient, data: bytes, *, purpose: str = "batch", tenant: str = "acme") -> str:
    """Store a file; its id."""
    answer = client.post(
        "/v1/files", files={"file": ("some name", data)}, data={"purpose": purpose}, headers=as_tenant(tenant)
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def jsonl(*lines: Any) -> bytes:
    """Values as lines of JSON."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def ask(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """A line of a batch."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "demo", "prompt": "a"} | body}


def create_batch(client: TestClient, *lines: Any, tenant: str = "acme", **more: Any) -> dict[str, Any]:
    """Upload lines and make a batch of them."""
    sent = {"input_file_id": upload(client, jsonl(*lines), tenant=tenant), "completion_window": "24h"}
    answer = client.post("/v1/batches", json=sent | {"endpoint": "/v1/completions"} | more, headers=as_tenant(tenant))
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def ended(client: TestClient, path: str, *, seconds: float = 180) -> dict[str, Any]:
    """What is told of a batch or job once it has ended."""
    deadline = time.monotonic() + seconds
    while (told := client.get(path).json())["status"] not in ENDED:
        assert time.monotonic() < deadline, f"{told}\n{logs()}"
        time.sleep(0.2)
    return dict(told)


def lines_of(client: TestClient, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a result file; none where there is no file."""
    if file_id is None:
        return []
    answer = client.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def logs() -> str:
    """What the processes of works that have not ended printed."""
    return "\n".join(path.read_text() for path in home().glob("files/*/works/*/log"))


def home() -> Path:
    """Where the state is."""
    return Path(os.environ["SPANFILL_HOME"])


def segments() -> list[Path]:
    """The journal segments of all works that run."""
    return list(home().glob("files/*/works/*/groups/*/out/_spanfill/journal/*/*.arrow"))


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain\n{logs()}"
        time.sleep(0.05)


class GatewayProcess:
    """A gateway in a process of its own, with the same state as this one's."""

    def __init__(self, config: RoutesConfig, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.jobs.routed", config.model_dump_json()]
        self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env})

    def kill(self, *, all_of_it: bool) -> None:
        """SIGKILL it, or all that it started too, as when the machine dies."""
        mine = psutil.Process(self._process.pid)
        started = mine.children(recursive=True) if all_of_it else []
        for process in [mine, *started]:
            process.kill()
        self._process.wait()

    def end(self) -> None:
        """Ask it to stop, and wait."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(120)


@contextmanager
def gateway(config: RoutesConfig, env: Mapping[str, str]) -> Iterator[GatewayProcess]:
    """A gateway process that is over when the block is."""
    process = GatewayProcess(config, env)
    try:
        yield process
    finally:
        process.end()


def main() -> None:
    """Serve until SIGINT."""
    signal.signal(signal.SIGINT, lambda *_: None)
    with routed(RoutesConfig.model_validate_json(sys.argv[1])):
        signal.pause()


if __name__ == "__main__":
    main()
