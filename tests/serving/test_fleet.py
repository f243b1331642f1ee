"""Being in a Ray that does not come up at once; clusters that run are in ``tests/integration``."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from serving import brood
from serving.errors import EngineError
from serving.fleet import connected

Fails = list[Exception]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fails]:
    """What Ray raises at its next starts; it starts when nothing is left, and nothing of it is real."""
    left: Fails = []
    running = [False]

    def init(**_: Any) -> None:
        if left:
            raise left.pop(0)
        running[0] = True

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: running[0])
    monkeypatch.setattr(ray, "shutdown", lambda: running.__setitem__(0, False))
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        yield left


@pytest.mark.parametrize("error", [RuntimeError("the node timed out"), OSError("no such file")])
def test_a_ray_that_does_not_start_is_started_again(fails: Fails, error: Exception) -> None:
    fails.append(error)
    with connected() as embedded:
        assert (embedded, ray.is_initialized()) == (True, True)
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_twice_is_one_sentence(fails: Fails) -> None:
    fails += [RuntimeError("first"), RuntimeError("the node\n timed out"), RuntimeError("never seen")]
    with pytest.raises(EngineError, match=r"^Ray does not start: the node timed out\."), connected():
        pass
    assert len(fails) == 1


def test_a_cluster_that_is_not_ours_is_asked_once(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    fails += [RuntimeError("no"), RuntimeError("never seen")]
    with pytest.raises(EngineError, match="no"), connected():
        pass
    assert len(fails) == 1


def test_what_a_failed_start_left_is_killed_and_nothing_else(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    started: list[subprocess.Popen[bytes]] = []
    init = ray.init

    def leave_a_daemon(**options: Any) -> None:
        if not started:
            started.append(subprocess.Popen([*sleep, str(Path(ray.__file__).with_name("daemon"))]))
            raise RuntimeError("the node timed out")
        init(**options)

    monkeypatch.setattr(ray, "init", leave_a_daemon)
    with subprocess.Popen(sleep) as other:
        with connected():
            assert started[0].wait(10) == -signal.SIGKILL
            assert other.poll() is None
        assert other.poll() is None, "not Ray's, however near it runs"
        other.kill()


def test_what_runs_below_rays_programs_ends_with_it(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose replica was killed before runs below nobody any more."""
    sleep = "import time; time.sleep(60)"
    engine = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleep}']); print(p.pid, flush=True)"
    )
    daemon = [sys.executable, "-c", f"{engine}; {sleep}", str(Path(ray.__file__).with_name("daemon"))]
    started: list[subprocess.Popen[str]] = []
    init = ray.init

    def with_a_daemon(**options: Any) -> None:
        started.append(subprocess.Popen(daemon, stdout=subprocess.PIPE, text=True))
        init(**options)

    monkeypatch.setattr(ray, "init", with_a_daemon)
    with connected():
        assert started[0].stdout is not None
        orphan = psutil.Process(int(started[0].stdout.readline()))
        brood.remember()
        started[0].kill()
        started[0].wait()
        assert orphan.status() != psutil.STATUS_ZOMBIE
    psutil.wait_procs([orphan], timeout=10)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    started[0].stdout.close()
