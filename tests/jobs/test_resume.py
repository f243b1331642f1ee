"""A job killed at any write, any number of times, ends with the bytes of an undisturbed one.

``run_job`` runs without Ray, its feeder beside it in one process, which ends itself (``os._exit``, so nothing is
cleaned up) in the middle of a write, or just before or after a name changes in the file system; hypothesis chooses
which. What it left behind is all that the next one sees.
"""

import asyncio
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import feeder as feeder_module
from jobs import run_job, runner, store
from jobs.feeder import Feeder, Route
from jobs.job import feeder_config
from jobs.ledger import Ledger
from jobs.plan import Unit
from jobs.spec import JobSpec
from jobs.verify import verify
from serving.config import EngineConfig
from serving.protocol import MicroBatch, MicroBatchResult
from serving.simulated import SimulatedEngine
from tests.runs import contents, journaled, rows, write_pairs

ROWS, PER_PART = 96, 32
NULL = {40}
"""Rows of which no prompt can be made: error rows for good."""

LONG = {3, 41}
"""Rows that an engine of ``SMALL`` tokens refuses: error rows until there is a larger one."""

SMALL = 100
KILLED = 9


@dataclass(frozen=True)
class Kill:
    """Where a process ends: at its n-th piece of a file's content or change of a name, which still happens or not.

    Of a piece that does not happen half is written.
    """

    at: Literal["write", "name"]
    number: int
    after: bool


KILLS = st.one_of(
    st.builds(Kill, st.just("name"), st.integers(1, 40), st.booleans()),
    st.builds(Kill, st.just("write"), st.integers(1, 160), st.booleans()),
)


@dataclass(frozen=True)
class Doing:
    """How a process runs a job: its engine's context, if it is not the job's, and whether it sees finished parts.

    One that does not is a runner that listed them long ago, before another one wrote them.
    """

    context: int | None = SMALL
    blind: bool = False


class LocalFeeder(Feeder):
    """A feeder that calls an engine of its own process."""

    async def attach_engine(self, engine: EngineConfig) -> None:
        """Begin to call a simulated engine."""
        simulated = SimulatedEngine(engine)

        async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            asked = (simulated.generate(request, batch.sampling) for request in batch.requests)
            yield MicroBatchResult("local", tuple(await asyncio.gather(*asked)))

        self.connect(call, Route(replicas=1, window=2, batch_rows=4, block_size=16))


def run(values: dict[str, Any], doing: Doing, kill: Kill | None) -> None:
    """Run a job to its end or to its kill: all of ``run_job`` but the cluster."""

    def feed(run: Any, left: deque[Unit]) -> None:
        job = run.job
        engine = job.engine.model_copy(update={"max_model_len": doing.context or job.engine.max_model_len})

        async def work() -> None:
            feeder = LocalFeeder(feeder_config(job, beginning=run.ledger.beginning, lease=run.lease.number))
            await feeder.attach_engine(engine)
            await asyncio.gather(*(feeder.run(unit, job.inputs.files[unit.file]) for unit in left))

        asyncio.run(work())
        left.clear()
        run.ran = 1.0

    feeder_module.JOURNAL_SECONDS = 0.05
    runner._feed = feed
    if doing.blind:
        Ledger.done = lambda self: set()  # type: ignore[method-assign]
    if kill is not None:
        _end_at(kill)
    run_job(JobSpec.parse(values))


def _end_at(kill: Kill) -> None:
    """End this process where it says."""
    passed = itertools.count(1)

    def due(at: str) -> bool:
        return at == kill.at and next(passed) == kill.number

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            ends = due("name")
            if ends and not kill.after:
                os._exit(KILLED)
            result = change(*arguments, **options)
            if ends:
                os._exit(KILLED)
            return result

        return counted

    def opening(usual: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def opened(path: Path, *arguments: Any, **options: Any) -> Iterator[Any]:
            with usual(path, *arguments, **options) as stream:
                yield Pieces(stream) if stream.writable() else stream

        return opened

    class Pieces:
        """A stream that ends the process in the middle of a piece."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def write(self, data: Any) -> int:
            piece = bytes(data)
            ends = due("write")
            written = self._stream.write(piece[: len(piece) // 2] if ends and not kill.after else piece)
            if ends:
                self._stream.flush()
                os._exit(KILLED)
            return int(written)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    Path.open = opening(Path.open)  # type: ignore[method-assign]
    Path.replace = counting(Path.replace)  # type: ignore[method-assign]
    Path.unlink = counting(Path.unlink)  # type: ignore[method-assign]
    os.link = counting(os.link)
    store._delete = counting(store._delete)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Forks of a process that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.jobs.test_resume"])
    return context


def execute(
    processes: ForkServerContext, values: dict[str, Any], kill: Kill | None = None, doing: Doing | None = None
) -> int | None:
    process = processes.Process(target=run, args=(values, doing or Doing(), kill))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job of this module but its output: slow enough that its journal, quick here, is written in between."""
    source = write_pairs(tmp_path_factory.mktemp("resume") / "rows.parquet", ROWS, words=5)
    columns = pq.read_table(source).to_pydict()
    for row in LONG:
        columns["prefix"][row] = " ".join([columns["prefix"][row]] * SMALL)
    for row in NULL:
        columns["prefix"][row] = None
    pq.write_table(pa.table(columns), source, row_group_size=20)
    values: dict[str, Any] = {"input": str(source), "engine": "simulated"}
    values |= {"engine_args": {"time_scale": 20, "max_num_seqs": 4}}
    values |= {"max_tokens": 16, "rows_per_part": PER_PART, "batch_rows": 4, "max_error_rate": 1.0}
    return values | {"n": 2, "temperature": 0.8}


@pytest.fixture(scope="module")
def undisturbed(processes: ForkServerContext, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the job when nobody kills it."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert execute(processes, job | {"output": str(output)}) == 0
    assert len(contents(output)) == ROWS // PER_PART
    assert {row["id"]: row["error_code"] for row in rows(output, "errors")} == dict.fromkeys(
        LONG, "engine_error"
    ) | dict.fromkeys(NULL, "bad_input")
    return output


@pytest.fixture(scope="module")
def mended(
    processes: ForkServerContext, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The rows of the job when its engine has room for all of them."""
    output = tmp_path_factory.mktemp("mended") / "out"
    assert execute(processes, job | {"output": str(output)}, doing=Doing(context=None)) == 0
    return rows(output)


def parts(output: Path) -> dict[str, tuple[int, int, bytes]]:
    """The finished parts: what each is as a file, and its bytes."""
    found = sorted(output.glob("data/*"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def listed(output: Path) -> dict[str, str]:
    """What the manifest, if it is there, says that the files' sha256 are."""
    path = output / "_spanfill" / "manifest.json"
    return dict(json.loads(path.read_text())["parts"]) if path.exists() else {}


def is_true(output: Path) -> bool:
    """Whether the manifest, if it is there, is of the files as they are."""
    told = listed(output)
    there = {name: output / name for name in told if (output / name).exists()}
    return told == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}


def of_all(output: Path) -> dict[str, bytes]:
    """The bytes of parts and of error rows by their paths."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for folder in ("data", "errors")
        for path in (output / folder).iterdir()
    }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.tuples(KILLS, st.builds(Doing, blind=st.booleans())), min_size=1, max_size=4))
def test_kills_at_any_write_leave_no_trace_in_the_output(
    kills: list[tuple[Kill, Doing]], processes: ForkServerContext, job: dict[str, Any], undisturbed: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        values = job | {"output": str(output)}
        for kill, doing in kills:
            before = parts(output)
            assert execute(processes, values, kill, doing) in (0, KILLED)
            after = parts(output)
            assert before.items() <= after.items(), "a finished part has changed"
            whole = contents(undisturbed).items()
            assert {name: data for name, (*_, data) in after.items()}.items() <= whole, "a part appeared half written"
            assert is_true(output)
        before = parts(output)
        assert execute(processes, values) == 0
        assert before.items() <= parts(output).items(), "a finished part has changed"
        assert of_all(output) == of_all(undisturbed)
        assert verify(str(output)).problems == []
        assert not list(output.rglob("*.tmp"))


def test_a_runner_that_saw_no_part_leaves_those_that_are_there(
    processes: ForkServerContext, job: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    before = parts(output)
    assert execute(processes, job | {"output": str(output)}, doing=Doing(blind=True)) == 0
    assert parts(output) == before
    assert of_all(output) == of_all(undisturbed)
    assert is_true(output)


def test_a_kill_while_error_rows_are_done_again_loses_none(
    processes: ForkServerContext, job: dict[str, Any], undisturbed: Path, mended: list[Any], tmp_path: Path
) -> None:
    """One kill after each change of a name in turn."""
    doing = Doing(context=None)
    for number in itertools.count(1):
        output = tmp_path / str(number)
        shutil.copytree(undisturbed, output)
        before, values = parts(output), job | {"output": str(output), "retry_errors": True}
        code = execute(processes, values, Kill("name", number, after=True), doing)
        assert is_true(output)
        assert not (listed(output) and journaled(output)), "the manifest is there while rows are done again"
        assert code == 0 or execute(processes, values, doing=doing) == 0
        assert before.items() <= parts(output).items(), "a finished part has changed"
        assert sorted(rows(output), key=lambda row: (row["id"], row["sample"])) == mended
        assert {row["id"] for row in rows(output, "errors")} == NULL
        assert verify(str(output)).problems == []
        if code != KILLED:
            break
    assert (code, number > 20) == (0, True)


def test_a_kill_while_a_damaged_file_is_made_anew_leaves_no_manifest_of_it(
    processes: ForkServerContext, job: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    """One kill after each change of a name in turn, of a job that was finished."""
    victims = sorted(of_all(undisturbed))
    for number in itertools.count(1):
        output = tmp_path / str(number)
        shutil.copytree(undisturbed, output)
        damaged = output / victims[number % len(victims)]
        damaged.write_bytes(bytes(damaged.stat().st_size))
        code = execute(processes, job | {"output": str(output)}, Kill("name", number, after=True))
        assert all((output / name).exists() for name in listed(output)), "the manifest is there, a part is not"
        assert is_true(output) or not journaled(output), "the manifest is there while rows are done again"
        assert code == 0 or execute(processes, job | {"output": str(output)}) == 0
        assert of_all(output) == of_all(undisturbed)
        assert is_true(output)
        assert verify(str(output)).problems == []
        if code != KILLED:
            break
    assert (code, number > 10) == (0, True)
