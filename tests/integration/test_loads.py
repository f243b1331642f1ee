"""``bench loads`` from its command on, with simulated engines."""

import json
from pathlib import Path

import pytest

from jobs.bench import from_clone

pytestmark = pytest.mark.engine


def test_people_and_a_job_share_two_engines_and_all_figures_are_told(tmp_path: Path) -> None:
    told = tmp_path / "loads.json"
    arguments = ["--rate", "2", "--seconds", "8", "--warm-up", "3", "--job-rows", "6000", "--replicas", "2"]
    assert from_clone("tests.benchmarks.loads", [*arguments, "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert found["people alone"]["requests"] == found["people beside the job"]["requests"] > 5
    assert 0 < found["people alone"]["ttft p50"] < found["people alone"]["e2e p50"]
    assert 0 < found["idle while people are alone"] < 1
    assert 0.2 < found["job's share of its speed alone"] < 1.2
    assert found["job alone, rows/s"] > 5
