"""The real engine is killed while it infills: vLLM's core process, its replica, the command itself."""

import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from jobs.demo import cut_demo_pairs
from jobs.verify import verify
from tests.runs import Run, journaled, rows, running

pytestmark = pytest.mark.engine
COUNT = 600
"""Half a minute for four sequences of a fast machine, so that the first journal, after 4 s, is far from the end."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pairs, each with its row as id."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    cut_demo_pairs(path, rows=COUNT, seed=0)
    table = pq.read_table(path)
    table = table.drop_columns(["id"]) if "id" in table.column_names else table
    pq.write_table(table.add_column(0, "id", [list(range(table.num_rows))]), path)
    return path


@pytest.fixture(scope="module")
def options(source: Path) -> list[object]:
    """Sampled, so that seeds must hold too; in float32, so that a row's sums do not depend on its neighbours."""
    chosen: list[object] = ["--input", source, "--dtype", "float32", "--max-tokens", 24, "--batch-rows", 16]
    return [*chosen, "--temperature", 0.8, "--rows-per-part", 300, "--engine-arg", "max_num_seqs=4"]


@pytest.fixture(scope="module")
def undisturbed(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(folder / "log", *options, "--output", folder / "out") as run:
        run.manifest()
    return rows(folder / "out")


def engine_but(run: Run, others: list[psutil.Process]) -> psutil.Process:
    """The run's core process that is none of ``others``, of which one may still be about to end, once there is one."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found.extend(process for process in run.processes("engine") if process not in others)
        return bool(found)

    run.until(look)
    return found[0]


def test_kills_of_core_replica_and_driver_change_no_infill(
    options: list[object], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A core dies, the replica of the next one and, once there is a third, the driver: nothing of the run is left."""
    draw, output = random.Random(1), tmp_path / "out"
    with running(tmp_path / "log", *options, "--output", output) as run:
        run.until(lambda: journaled(output) or list(output.glob("data/*")))
        killed: list[psutil.Process] = []
        for kind in ("engine", "replica"):
            engine = engine_but(run, killed)
            owner = engine if kind == "engine" else engine.parent()
            assert owner is not None
            owner.kill()
            killed.append(engine)
        killed.append(engine_but(run, killed))
        working = [process for kind in ("engine", "replica", "feeder") for process in run.processes(kind)]
        run.kill("driver", draw)
        assert run.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs([*killed, *working], timeout=60)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    with running(tmp_path / "log", *options, "--output", output) as run:
        manifest = run.manifest()
    assert (manifest["rows"], manifest["errors"]) == (COUNT, 0)
    assert rows(output) == undisturbed
    assert verify(str(output)).problems == []
