"""A real ``spanfill serve`` in a process of its own, for tests and benchmarks."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 240.0
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """Where it listens, where its state and its log are, and its process."""

    url: str
    home: Path
    log: Path
    process: "subprocess.Popen[bytes]"

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
        """That of jobs which join its engines."""
        found = re.search(r"RAY_ADDRESS=(\S+)", self.told)
        assert found, self.told
        return self.environment | {"RAY_ADDRESS": found[1]}

    def command(self, *arguments: str) -> str:
        """What ``spanfill`` prints on its state."""
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that answers; ended by SIGTERM."""
    port, log = free_port(), folder / "serve.log"
    home = folder / "home"
    command = [sys.executable, "-m", "jobs.cli", "serve", "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | {"SPANFILL_HOME": str(home)} | dict(env or {}), stdout=out, stderr=out
        )
    server = Server(f"http://127.0.0.1:{port}", home, log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}: {server.told[-2_000:]}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise TimeoutError(f"the server is not healthy after {START_SECONDS:g} s: {server.told[-2_000:]}")
