"""A job's processes are killed at random moments (seeded); the output is what an undisturbed run would have written.

The simulated engine has the volume: some 300 rows a second on the clock of an H100.
"""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from jobs import JobSpec, run_job
from jobs.verify import verify
from tests.runs import Run, answered, contents, counting, journaled, rows, running, write_pairs

pytestmark = pytest.mark.engine
COUNT = 6_000
REPEATED_SECONDS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input of every test here."""
    return write_pairs(tmp_path_factory.mktemp("kills") / "rows.parquet", COUNT)


@pytest.fixture(scope="module")
def undisturbed(cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of a run that nobody disturbed."""
    return parts_of(source, tmp_path_factory.mktemp("undisturbed") / "out", rows_per_part=1_500)


@pytest.fixture(scope="module")
def undisturbed_in_one(cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The one part of a run that nobody disturbed."""
    return parts_of(source, tmp_path_factory.mktemp("in-one") / "out", rows_per_part=COUNT)


def parts_of(source: Path, output: Path, *, rows_per_part: int) -> dict[str, bytes]:
    """What a run in one go writes."""
    values = {"input": str(source), "output": str(output), "engine": "simulated", "engine_args": {"time_scale": 100}}
    run_job(JobSpec.parse(values | {"max_tokens": 32, "rows_per_part": rows_per_part}))
    return contents(output)


@pytest.fixture
def options(source: Path, tmp_path: Path) -> list[object]:
    """Of the command; without the output it is the undisturbed run's job."""
    chosen: list[object] = ["--input", source, "--output", tmp_path / "out", "--max-tokens", 32, "--batch-rows", 16]
    return [*chosen, "--rows-per-part", 1_500, "--engine", "simulated", "--engine-arg", "max_num_seqs=32"]


def progressed(output: Path) -> Callable[[], bool]:
    """Whether something was finished since now."""
    before = set(output.glob("data/*")) | set(journaled(output))
    return lambda: bool((set(output.glob("data/*")) | set(journaled(output))) - before)


@pytest.mark.parametrize(
    ("count", "kinds"),
    [(2, ("controller", "replica", "feeder", "controller")), (1, ("feeder", "replica", "feeder", "replica"))],
    ids=["of two", "the only ones"],
)
def test_killed_processes_are_replaced_and_the_output_is_the_same(
    count: int, kinds: tuple[str, ...], options: list[object], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Who is killed the second time took the place of the first one."""
    draw = random.Random(str(kinds))
    with running(tmp_path / "log", *options, "--replicas", count, "--feeders", count) as run:
        run.until(progressed(tmp_path / "out"))
        for kind in kinds:
            time.sleep(draw.uniform(0, 2))
            run.until(partial(run.kill, kind, draw))
        manifest = run.manifest()
    assert (manifest["rows"], manifest["errors"]) == (COUNT, 0)
    assert contents(tmp_path / "out") == undisturbed
    assert verify(str(tmp_path / "out")).problems == []


def kill_between_segments(run: Run, output: Path, counts: Path, segments: int, draw: random.Random) -> float:
    """Kill a driver after so many segments more, far from the next; returns for how long its engines had answered."""
    answers, before = answered(counts), len(journaled(output))
    run.until(lambda: answered(counts) > answers)
    started = time.monotonic()
    run.until(lambda: len(journaled(output)) >= before + segments)
    time.sleep(draw.uniform(1, 3))
    run.kill("driver", draw)
    seconds = time.monotonic() - started
    assert run.wait() == -signal.SIGKILL
    return seconds


def test_a_killed_driver_loses_seconds_and_the_same_command_resumes(
    source: Path, undisturbed_in_one: dict[str, bytes], tmp_path: Path
) -> None:
    """One part of all rows, so that nothing but the journal keeps what was done; killed between two segments of it."""
    draw, output, counts = random.Random(5), tmp_path / "out", tmp_path / "counts"
    options: list[object] = ["--input", source, "--output", output, "--max-tokens", 32, "--batch-rows", 16]
    options += ["--rows-per-part", COUNT, "--engine", "simulated", "--engine-arg", "max_num_seqs=16"]
    seconds = 0.0
    for segments in (4, 2):
        with running(tmp_path / "log", *options, env=counting(counts)) as run:
            seconds += kill_between_segments(run, output, counts, segments, draw)
            assert not list(output.glob("data/*"))
    rate = answered(counts) / seconds
    with running(tmp_path / "log", *options, env=counting(counts)) as run:
        manifest = run.manifest()
        assert "taking over from process" in run.told
        assert "resuming" in run.told
    assert manifest["rows"] == COUNT
    repeated = (answered(counts) - COUNT) / rate
    assert 0 < repeated < 2 * REPEATED_SECONDS
    assert manifest["tally"]["replayed"] > COUNT / 4
    assert contents(output) == undisturbed_in_one
    assert verify(str(output)).problems == []


def test_a_notice_of_thirty_seconds_is_enough(
    options: list[object], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Spot pre-emption: SIGTERM, and SIGKILL 30 s later."""
    output = tmp_path / "out"
    with running(tmp_path / "log", *options, "--replicas", 2) as run:
        run.until(progressed(output))
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(30) == 128 + signal.SIGTERM
        assert "Run the same command again to resume" in run.told
        assert not [p for p in run.processes("replica") if p.is_running()]
    assert not (output / "_spanfill" / "manifest.json").exists()
    assert journaled(output)
    with running(tmp_path / "log2", *options) as run:
        assert run.manifest()["rows"] == COUNT
        assert "taking over" not in run.told
    assert contents(output) == undisturbed


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_notice_while_ray_starts_ends_the_run_like_any_other(
    options: list[object], tmp_path: Path, seconds: float
) -> None:
    with running(tmp_path / "log", *options) as run:
        run.until(lambda: len(run.tree()) > 1)
        time.sleep(seconds)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert "Run the same command again to resume" in run.told


def test_a_notice_to_all_processes_of_a_machine_costs_nothing_either(
    options: list[object], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """A machine that shuts down: SIGTERM to whatever runs, Ray's own processes too, and SIGKILL a little later."""
    draw, output = random.Random(7), tmp_path / "out"
    with running(tmp_path / "log", *options, "--replicas", 2) as run:
        run.until(progressed(output))
        time.sleep(draw.uniform(0, 4))
        run.until(lambda: len(run.tree()) > 5)
        processes = run.tree()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in draw.sample(processes, len(processes)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            if number == signal.SIGTERM:
                time.sleep(draw.uniform(1, 5))
        assert run.wait() != 0
    assert not (output / "_spanfill" / "manifest.json").exists()
    assert {path.name: path.read_bytes() for path in output.glob("data/*")}.items() < undisturbed.items()
    with running(tmp_path / "log2", *options) as run:
        assert run.manifest()["rows"] == COUNT
    assert contents(output) == undisturbed
    assert verify(str(output)).problems == []


def test_a_second_runner_is_refused_while_the_first_one_lives_and_its_processes_are_gone_when_it_does_not(
    options: list[object], tmp_path: Path
) -> None:
    with running(tmp_path / "log", *options) as first:
        first.until(progressed(tmp_path / "out"))
        with running(tmp_path / "log2", *options) as second:
            assert second.wait(60) == 2
            assert f"is being written by process {first.process.pid}" in second.told
        assert first.process.poll() is None
        working = [process for kind in ("replica", "feeder", "controller") for process in first.processes(kind)]
        assert len(working) == 3
        first.kill("driver", random.Random(0))
        first.wait()
        _, alive = psutil.wait_procs(working, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize(("replicas", "feeders", "batch_rows"), [(1, 3, 64), (3, 1, 7)])
def test_replicas_feeders_and_micro_batches_leave_no_trace_in_the_output(
    replicas: int, feeders: int, batch_rows: int, undisturbed: dict[str, bytes], source: Path, tmp_path: Path
) -> None:
    values = {"input": str(source), "output": str(tmp_path / "out"), "engine": "simulated", "max_tokens": 32}
    values |= {"rows_per_part": 1_500, "engine_args": {"time_scale": 200}, "order": "input"}
    run_job(JobSpec.parse(values | {"replicas": replicas, "feeders": feeders, "batch_rows": batch_rows}))
    assert contents(tmp_path / "out") == undisturbed
    assert [row["id"] for row in rows(tmp_path / "out")] == list(range(COUNT))


def test_a_runner_that_was_stopped_and_overwritten_leaves_nothing_in_the_new_job(source: Path, tmp_path: Path) -> None:
    """Its driver sleeps (SIGSTOP) while another job begins anew in its folder; then it wakes."""
    output, log = tmp_path / "out", tmp_path / "log"
    options: list[object] = ["--input", source, "--output", output, "--engine", "simulated", "--rows-per-part", 1_500]
    slow, quick = ["--engine-arg", "max_num_seqs=8"], ["--engine-arg", "time_scale=5"]
    with running(log, *options, *slow, "--max-tokens", 64) as first:
        first.until(lambda: len(journaled(output)) > 3)
        first.process.send_signal(signal.SIGSTOP)
        with running(tmp_path / "log2", *options, *quick, "--max-tokens", 4, "--overwrite") as second:
            assert second.manifest()["rows"] == COUNT
        first.process.send_signal(signal.SIGCONT)
        assert first.wait(60) == 1
        assert "was taken over by" in first.told
    assert max(row["completion_tokens"] for row in rows(output)) <= 4
    assert verify(str(output)).problems == []
