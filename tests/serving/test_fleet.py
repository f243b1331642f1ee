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

from serving import brood, fleet
from serving.app import DEPLOYMENT
from serving.config import EngineConfig, ReplicaConfig
from serving.errors import EngineError, ResourceError
from serving.fleet import connected, join_or_start

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


ENGINE = EngineConfig(kind="instant", model="m", max_model_len=64)


@pytest.fixture
def full_cluster(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster whose only GPU is held by a running fleet of ``ENGINE``; the names of what was deleted in it."""
    house = SimpleNamespace(status="RUNNING", deployments={DEPLOYMENT: SimpleNamespace(replica_states={"RUNNING": 1})})
    waiting = SimpleNamespace(status="DEPLOYING", deployments={}, message="")
    applications, deleted = {"house": house}, list[str]()

    def run_many(targets: list[SimpleNamespace], **_: object) -> None:
        applications.update({target.name: waiting for target in targets})

    told: dict[str, Any] = {"status": lambda: SimpleNamespace(applications=applications), "run_many": run_many}
    told |= {"RunTarget": SimpleNamespace, "get_deployment_handle": lambda *_, **__: None}
    monkeypatch.setattr(fleet, "serve", SimpleNamespace(**told))
    for name in ("build", "guard", "beat"):
        monkeypatch.setattr(fleet, name, lambda *_: None)
    monkeypatch.setattr(fleet, "delete_app", lambda name, **_: deleted.append(name))
    monkeypatch.setattr(fleet, "_described", lambda *_: (ENGINE.fingerprint, None))
    monkeypatch.setattr(fleet, "_unplaced", lambda _: True)
    monkeypatch.setattr(fleet, "RESOURCE_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": 1.0}}])
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    return deleted


def test_who_is_to_run_alone_joins_no_fleet_and_fails_where_that_holds_the_machine(full_cluster: list[str]) -> None:
    said: list[str] = []
    how: dict[str, Any] = {"embedded": False, "say": said.append, "check": lambda: None}
    assert join_or_start(ENGINE, ReplicaConfig(), **how).name == "house"
    with pytest.raises(ResourceError, match=r"0 of 1 GPU are free; held by house.*Stop the fleet or job that holds"):
        join_or_start(ENGINE, ReplicaConfig(), alone=True, **how)
    assert said == ["joined the running application house"]
    assert len(full_cluster) == 1


def test_others_wait_for_room_in_a_cluster_that_outlives_them(full_cluster: list[str]) -> None:
    said: list[str] = []

    def check() -> None:
        if len(said) > 1:
            raise InterruptedError

    other = ENGINE.model_copy(update={"max_model_len": 128})
    with pytest.raises(InterruptedError):
        join_or_start(other, ReplicaConfig(), embedded=False, say=said.append, check=check)
    assert all("still waiting: 1 replicas ask for 1 GPU each" in words for words in said)
    assert len(full_cluster) == 1
