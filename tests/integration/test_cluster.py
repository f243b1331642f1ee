"""Jobs on a Ray cluster of two nodes: replicas on both, a fleet that stays, a driver that dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray._private.state import GcsClientOptions, GlobalState
from ray.cluster_utils import Cluster

from jobs.verify import verify
from serving.fleet import PRIVATE_PREFIX
from serving.lifeline import LIFELINE_SECONDS
from tests.conftest import WriteRows
from tests.runs import contents, journaled, write_pairs

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
Ask = Callable[[str], Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes of one core each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def address(nodes: Cluster) -> str:
    """Where the cluster is."""
    return str(nodes.address)


@pytest.fixture
def ask(address: str) -> Ask:
    """Evaluate an expression in a process that is in the cluster."""

    def evaluate(expression: str) -> Any:
        script = (
            f"import json, ray, serving.fleet as f\nfrom ray import serve\nray.init({address!r}, log_to_driver=False)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script + f"print(json.dumps({expression}))"],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return evaluate


def start(address: str, source: Path, output: Path, *options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", source, "--output", output, "--json", *options]
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(1)


def test_replicas_are_placed_on_both_nodes(
    address: str, ask: Ask, write_rows: WriteRows, tmp_path: Path, safe_checkpoint: Path
) -> None:
    source = write_rows(prefix=[f"def f{i}(x):\n    " for i in range(200)], id=list(range(200)))
    options = ["--model", safe_checkpoint, "--replicas", 2, "--max-tokens", 8, "--batch-rows", 8]
    job = start(address, source, tmp_path / "out", *options)
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stderr
    manifest = json.loads(stdout)
    assert (manifest["rows"], manifest["errors"], len(manifest["replicas"])) == (200, 0, 2)
    groups = ask("list(ray.util.placement_group_table().values())")
    hosts = {node for g in groups if PRIVATE_PREFIX in g["name"] for node in g["bundles_to_node_id"].values()}
    assert len(hosts) == 2, groups


def test_an_application_outlives_its_killed_driver_by_less_than_a_minute(
    address: str, ask: Ask, write_rows: WriteRows, tmp_path: Path, safe_checkpoint: Path
) -> None:
    source = write_rows(prefix=[f"row {i}" for i in range(200_000)])
    job = start(address, source, tmp_path / "out", "--model", safe_checkpoint, "--engine", "instant")
    until(lambda: job.poll() is not None or bool(list((tmp_path / "out").glob("data/*"))), 120)
    assert job.poll() is None, job.communicate()
    applications = "[n for n, a in serve.status().applications.items() if a.status == 'RUNNING']"
    assert [name.startswith(PRIVATE_PREFIX) for name in ask(applications)] == [True]
    job.send_signal(signal.SIGKILL)
    job.wait()
    until(lambda: ask(applications) == [], LIFELINE_SECONDS + 15)


def test_a_job_joins_the_fleet_of_serve_yaml(address: str, ask: Ask, write_rows: WriteRows, tmp_path: Path) -> None:
    environment = os.environ | {"RAY_ADDRESS": address}
    serve = Path(sys.executable).with_name("serve")
    with (tmp_path / "serve.log").open("w") as log:
        fleet = subprocess.Popen(
            [serve, "run", "--address", address, str(ROOT / "deploy" / "serve.yaml")],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=ROOT,
        )
    try:
        running = "serve.status().applications.get('spanfill') and serve.status().applications['spanfill'].status"
        until(lambda: fleet.poll() is not None or ask(running) == "RUNNING", 200)
        assert fleet.poll() is None, (tmp_path / "serve.log").read_text()
        source = write_rows(prefix=["import o"] * 20, suffix=["\n"] * 20)
        job = start(address, source, tmp_path / "out", "--max-tokens", 8)
        stdout, stderr = job.communicate(timeout=200)
        assert job.returncode == 0, stderr
        assert "joined the running application spanfill" in stderr
        assert json.loads(stdout)["rows"] == pq.read_table(tmp_path / "out" / "data").num_rows == 20
        assert ask(running) == "RUNNING"
    finally:
        fleet.send_signal(signal.SIGINT)
        fleet.wait(60)


DEPLOY = """
import sys, ray
from ray import serve
from jobs.job import prepare_job
from jobs.spec import JobSpec
from serving.app import build, place
from serving.config import ReplicaConfig

address, source, replicas = sys.argv[1:]
ray.init(address, log_to_driver=False)
engine = prepare_job(JobSpec(input=source, output=source + ".out", engine="simulated", max_tokens=64)).engine
replica = place(ReplicaConfig(replicas=int(replicas)), [node["Resources"] for node in ray.nodes()])
serve.run(build(engine, replica), name="growing", route_prefix=None)
"""
"""A fleet of simulated engines for the jobs of a file."""


def test_replicas_that_are_added_to_a_fleet_work_for_the_job_that_runs(
    address: str, ask: Ask, write_rows: WriteRows, tmp_path: Path
) -> None:
    source = write_rows(prefix=[f"def f{i}(x):\n    " + "x = x + 1\n    " * 60 for i in range(6_000)])

    def deploy(replicas: int) -> None:
        told = [sys.executable, "-c", DEPLOY, address, str(source), str(replicas)]
        done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    deploy(1)
    try:
        job = start(address, source, tmp_path / "out", "--engine", "simulated", "--max-tokens", 64)
        until(lambda: job.poll() is not None or bool(journaled(tmp_path / "out")), 120)
        deploy(2)
        stdout, stderr = job.communicate(timeout=300)
    finally:
        ask("serve.delete('growing')")
    assert job.returncode == 0, stderr
    assert "joined the running application growing" in stderr
    assert "the fleet has 2 replicas now" in stderr
    manifest = json.loads(stdout)
    assert manifest["rows"] == 6_000
    assert 1 < manifest["engines"]["replicas"] < 2, "in the mean"
    assert sorted(manifest["replicas"].values())[-2] > 500
    assert verify(str(tmp_path / "out")).problems == []


def actors_on(address: str, node: str) -> list[str]:
    """The classes of the live actors on a node, as Ray's head knows them."""
    state = GlobalState()
    state._initialize_global_state(GcsClientOptions.create(address, None, True, False))
    try:
        table = state.actor_table(None, actor_state_name="ALIVE").values()
        return [actor["ActorClassName"] for actor in table if actor["Address"]["NodeID"] == node]
    finally:
        state.disconnect()


def test_a_lost_node_costs_nothing_but_seconds(nodes: Cluster, address: str, tmp_path: Path) -> None:
    """A node with replicas, and perhaps a feeder, loses its raylet and all its workers at a random moment."""
    draw = random.Random(11)
    source = write_pairs(tmp_path / "rows.parquet", 6_000)
    options = ["--engine", "simulated", "--max-tokens", 32, "--rows-per-part", 1_000]
    calm = start(address, source, tmp_path / "calm", *options, "--engine-arg", "time_scale=100")
    _, stderr = calm.communicate(timeout=300)
    assert calm.returncode == 0, stderr
    options += ["--engine-arg", "max_num_seqs=8", "--batch-rows", 8, "--replicas", 4, "--feeders", 2]
    lost = nodes.add_node(num_cpus=1)
    try:
        job = start(address, source, tmp_path / "out", *options)
        until(lambda: job.poll() is not None or bool(journaled(tmp_path / "out")), 120)
        time.sleep(draw.uniform(0, 6))
        assert job.poll() is None, job.communicate()
        working = actors_on(address, lost.node_id)
    finally:
        nodes.remove_node(lost, allow_graceful=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("data/*")}
    assert len(before) < 6, "all was done before the node was lost"
    stdout, stderr = job.communicate(timeout=300)
    assert job.returncode == 0, stderr
    assert any(name == "Feeder" or name.startswith("ServeReplica:spanfill-run") for name in working), working
    manifest = json.loads(stdout)
    assert (manifest["rows"], manifest["errors"]) == (6_000, 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert verify(str(tmp_path / "out")).problems == []
