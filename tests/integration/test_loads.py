"""``bench loads`` from its command on, and many streams for long, with simulated engines."""

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from jobs.bench import from_clone
from tests.benchmarks.gateway import MODEL, parse, streams
from tests.server import running_server

pytestmark = pytest.mark.engine


def test_people_and_a_job_share_two_engines_and_all_figures_are_told(tmp_path: Path) -> None:
    told = tmp_path / "loads.json"
    arguments = ["--rate", "2", "--seconds", "8", "--warm-up", "3", "--job-rows", "6000", "--replicas", "2"]
    command, environment = from_clone("tests.benchmarks.loads", [*arguments, "--json", str(told)])
    assert subprocess.run(command, env=environment).returncode == 0
    found = json.loads(told.read_text())
    assert found["people alone"]["requests"] == found["people beside the job"]["requests"] > 5
    assert 0 < found["people alone"]["ttft p50"] < found["people alone"]["e2e p50"]
    assert 0 < found["idle while people are alone"] < 1
    assert 0.2 < found["job's share of its speed alone"] < 1.2
    assert found["job alone, rows/s"] > 5


def test_two_hundred_streams_at_once_for_a_minute_end_without_an_error(tmp_path: Path) -> None:
    with running_server(tmp_path, "--engine", "simulated", "--model", MODEL) as server:
        asked = parse(["--streams", "200", "--seconds", "60"])
        found = asyncio.run(streams(server, server.new_tenant("acme"), asked))
    assert found["errors"] == {}
    assert found["seconds"] >= 60
    assert found["streams"] > 200
