"""A real ``spanfill serve`` in a process of its own, for tests and benchmarks."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import ray

START_SECONDS = 240.0
STOP_SECONDS = 60.0
AUTH = "RAY_AUTH_MODE"
GATEWAY = "ray::ServeReplica:spanfill:Gateway"
"""What a gateway's process is called."""

JOINED_BY = re.compile(r"(RAY_\w+)=(\S+)")


@dataclass(frozen=True)
class Server:
    """Where it listens, where its state, its log and its Ray's files are, its process; ``health`` while it started;
    ``watcher`` has the key by which its figures are read, once there is one."""

    url: str
    home: Path
    log: Path
    ray: Path
    process: "subprocess.Popen[bytes]"
    health: list[int] = field(default_factory=list)
    watcher: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        """What it printed."""
        return " ".join(self.log.read_text(errors="replace").split())

    @property
    def environment(self) -> dict[str, str]:
        """That of commands which look into its state."""
        return os.environ | {"SPANFILL_HOME": str(self.home)}

    @property
    def job_environment(self) -> dict[str, str]:
        """That of jobs which join its engines, by what it says of that."""
        told = dict(JOINED_BY.findall(self.told))
        assert "RAY_ADDRESS" in told, self.told
        return self.environment | {AUTH: "disabled"} | told

    def command(self, *arguments: str) -> str:
        """What ``spanfill`` prints on its state."""
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def new_tenant(self, name: str, *options: str) -> str:
        """A new tenant's key."""
        key: str = json.loads(self.command("tenants", "create", name, *options, "--json"))["key"]
        return key

    def tree(self) -> list[psutil.Process]:
        """Its process and all that it started, as they are now."""
        mine = psutil.Process(self.process.pid)
        return [mine, *mine.children(recursive=True)]

    def called(self, title: str) -> list[psutil.Process]:
        """Those of its processes in whose command line that stands."""
        found = []
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def reading(self, name: str) -> float:
        """One of the engines' sums, as a gateway has read it within its last two seconds; an admin of its own asks."""
        if not self.watcher and httpx.get(f"{self.url}/metrics").status_code == 401:
            self.watcher.append(self.new_tenant("watcher", "--role", "admin"))
        headers = {"Authorization": f"Bearer {self.watcher[0]}"} if self.watcher else {}
        lines = httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines()
        (found,) = [line for line in lines if line.startswith(f'spanfill_engine{{reading="{name}"}}')]
        return float(found.split()[-1])


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that answers, and whose engines can be joined; ended by SIGTERM.

    Unless ``env`` says so, its Ray asks for a token where this process sends one, which cannot change once Ray is used.
    """
    port, log, home = free_port(), folder / "serve.log", folder / "home"
    command = [sys.executable, "-m", "jobs.cli", "serve", "--port", str(port), *arguments]
    # Not in the folder: the path of a Unix socket has a hundred characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="sf-", dir="/tmp", ignore_cleanup_errors=True) as scratch,
        log.open("wb") as out,
    ):
        own = {"SPANFILL_HOME": str(home), "RAY_TMPDIR": scratch, AUTH: os.environ.get(AUTH, "disabled")}
        process = subprocess.Popen(command, env=os.environ | own | dict(env or {}), stdout=out, stderr=out)
        server = Server(f"http://127.0.0.1:{port}", home, log, Path(scratch), process)
        try:
            _wait(server)
            yield server
        finally:
            _end(process)


@contextmanager
def joined(server: Server) -> Iterator[None]:
    """This process is in the server's Ray, with or without a token as that one."""
    ray.init(address=server.job_environment["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def is_healthy(url: str) -> bool:
    """Whether a server answers that all is well."""
    return _health(url) == 200


def _health(url: str) -> int:
    """The status that a server answers with, 0 where none listens."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=30).status_code
    return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}: {server.told[-2_000:]}")
        if status := _health(server.url):
            server.health.append(status)
        if server.health[-1:] == [200] and JOINED_BY.search(server.told):
            return
        time.sleep(0.1)
    raise TimeoutError(f"the server is not healthy after {START_SECONDS:g} s: {server.told[-2_000:]}")
