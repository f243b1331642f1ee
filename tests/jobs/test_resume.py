"""A job killed at any write, any number of times, ends with the bytes of an undisturbed one.

The feeder runs without Ray, in a process that ends itself (``os._exit``, so nothing is cleaned up) just before or just
after one of its writes reaches the disk; hypothesis chooses which. What it left behind is all that the next one sees.
"""

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import feeder as feeder_module
from jobs import store
from jobs.feeder import Feeder, Route
from jobs.job import feeder_config, prepare_job
from jobs.lease import Lease
from jobs.ledger import Ledger
from jobs.plan import plan_units
from jobs.spec import JobSpec
from jobs.verify import verify
from serving.config import EngineConfig
from serving.protocol import MicroBatch, MicroBatchResult
from serving.simulated import SimulatedEngine
from tests.runs import contents, write_pairs

ROWS, PER_PART = 96, 32
KILLED = 9
Kill = tuple[int, bool]
"""The write at which the process ends, and whether it still happens."""


class LocalFeeder(Feeder):
    """A feeder that calls an engine of its own process."""

    async def attach_engine(self, engine: EngineConfig) -> None:
        """Begin to call a simulated engine."""
        simulated = SimulatedEngine(engine)

        async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            asked = (simulated.generate(request, batch.sampling) for request in batch.requests)
            yield MicroBatchResult("local", tuple(await asyncio.gather(*asked)))

        self.connect(call, Route(replicas=1, window=2, block_size=16))


def run(values: dict[str, Any], kill: Kill | None) -> None:
    """Run a job to its end or to its kill; the order of its steps is that of ``jobs.runner``."""
    feeder_module.JOURNAL_SECONDS = 0.05
    spec = JobSpec.parse(values)
    job = prepare_job(spec)
    if kill is not None:
        _end_at(kill)
    lease = Lease.take(job.output, say=lambda _: None)
    ledger = Ledger(job.output, job.fingerprint)
    ledger.open(job.identity, spec.model_dump(mode="json"), {}, resume=True, overwrite=False)
    units = ledger.plan(job.inputs.files, plan_units(job.inputs.files, rows_per_part=spec.rows_per_part))
    done = ledger.done()

    async def feed() -> None:
        feeder = LocalFeeder(feeder_config(job, beginning=ledger.beginning, lease=lease.number))
        await feeder.attach_engine(job.engine)
        await asyncio.gather(*(feeder.run(u, job.inputs.files[u.file]) for u in units if u.index not in done))

    asyncio.run(feed())
    ledger.write_manifest({"parts": {}, "bytes": {}})
    lease.release()


def _end_at(kill: Kill) -> None:
    """End this process at its n-th change of a name in the file system."""
    left, after = kill

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os._exit(KILLED)
            result = change(*arguments, **options)
            if left == 0:
                os._exit(KILLED)
            return result

        return counted

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


def execute(processes: ForkServerContext, values: dict[str, Any], kill: Kill | None) -> int | None:
    process = processes.Process(target=run, args=(values, kill))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job of this module but its output: slow enough that its journal, quick here, is written in between."""
    source = write_pairs(tmp_path_factory.mktemp("resume") / "rows.parquet", ROWS, words=5, row_group_size=20)
    values = {"input": str(source), "engine": "simulated", "engine_args": {"time_scale": 20, "max_num_seqs": 4}}
    return values | {"max_tokens": 16, "rows_per_part": PER_PART, "batch_rows": 4}


@pytest.fixture(scope="module")
def undisturbed(
    processes: ForkServerContext, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the job writes when nobody kills it."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert execute(processes, job | {"output": str(output)}, None) == 0
    assert len(contents(output)) == ROWS // PER_PART
    return contents(output)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4))
def test_kills_at_any_write_leave_no_trace_in_the_output(
    kills: list[Kill], processes: ForkServerContext, job: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        values = job | {"output": str(output)}
        for kill in kills:
            before = contents(output) if (output / "data").exists() else {}
            assert execute(processes, values, kill) in (0, KILLED)
            after = contents(output) if (output / "data").exists() else {}
            assert before.items() <= after.items(), "a finished part has changed"
            assert after.items() <= undisturbed.items(), "a part appeared that is not whole"
        assert execute(processes, values, None) == 0
        assert contents(output) == undisturbed
        (output / "_spanfill" / "manifest.json").unlink()
        assert verify(str(output)).problems == []
        assert not list(output.rglob("*.tmp"))
