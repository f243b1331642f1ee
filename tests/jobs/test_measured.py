import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from jobs.measured import StartUp, cpu_seconds, occupancy
from jobs.process import since_birth
from jobs.tally import Tally, timed
from serving.occupancy import Occupancy
from serving.protocol import EngineInfo, EngineStats
from tests.jobs.conftest import JobFolder

INFO = EngineInfo("simulated", "m", max_model_len=100, max_num_seqs=8, block_size=16, kv_cache_tokens=400)
TALLY = Tally(samples=10, prompt_tokens=900, completion_tokens=100)


def test_running_rows_are_added_up_over_time() -> None:
    times = iter([0.0, 1.0, 3.0, 7.0, 8.0])
    told = Occupancy(clock=lambda: next(times))
    for running in (2, 5, 0, 1):
        told.tell(running)
    assert (told.busy_seconds, told.row_seconds) == (6.0, 2 * 2 + 4 * 5)


def test_occupancy_counts_what_fits_into_the_kv_cache() -> None:
    before = {"a": EngineStats(busy_seconds=5, row_seconds=10)}
    after = {"a": EngineStats(busy_seconds=15, row_seconds=50), "b": EngineStats(busy_seconds=10, row_seconds=40)}
    found = occupancy(INFO, before, after, 10.0, TALLY)
    assert found == {"busy_share": 1.0, "mean_running": 4.0, "occupancy": 1.0}, "4 rows of 100 tokens fit into 400"
    assert (
        occupancy(INFO, {}, {}, 10.0, TALLY) == occupancy(replace(INFO, kind="instant"), before, after, 10, TALLY) == {}
    )


def test_what_feeders_do_beside_their_work_is_dispatch() -> None:
    tally = Tally(cpu_seconds={"read": 1.0, "tokenize": 2.0})
    found = cpu_seconds(5.0, {"a": EngineStats(cpu_seconds=1)}, {"a": EngineStats(cpu_seconds=4)}, tally)
    assert found == {"read": 1.0, "tokenize": 2.0, "dispatch": 2.0, "replica": 3.0}
    with timed(tally, "read"):
        sum(range(200_000))
    assert tally.cpu_seconds["read"] > 1.0


def test_a_commands_start_counts_from_its_process_birth() -> None:
    begun = time.monotonic()
    code = "import time; time.sleep(0.3); from jobs.process import since_birth; print(since_birth())"
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= told <= time.monotonic() - begun + 0.1

    startup = StartUp.of_command()
    startup.reached("plan")
    startup.reached("plan")
    assert list(startup.seconds) == ["imports", "plan"]
    assert startup.seconds["imports"] == pytest.approx(since_birth(), abs=1)
    assert startup.seconds["plan"] < 1


def test_a_call_from_python_tells_every_part_of_its_start_but_imports(clean: JobFolder) -> None:
    manifest = json.loads(clean.state("manifest.json").read_text())
    assert list(manifest["startup_seconds"]) == ["plan", "ray", "serve", "engine", "first rows"]
