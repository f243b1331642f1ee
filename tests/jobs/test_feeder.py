import asyncio
from collections.abc import AsyncIterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.feeder import Feeder, Route
from jobs.job import feeder_config, prepare_job
from jobs.lease import Lease
from jobs.ledger import Ledger
from jobs.plan import plan_units
from jobs.runner import run_job
from jobs.spec import JobSpec
from serving.protocol import MicroBatch, MicroBatchResult
from tests.conftest import WriteRows
from tests.jobs.test_score import use_this_process


def test_what_a_call_raises_ends_the_unit_whatever_it_is(write_rows: WriteRows) -> None:
    source = write_rows(prefix=["a", "b"])
    job = prepare_job(JobSpec(input=str(source), output=str(source.with_name("out")), engine="instant"))
    ledger = Ledger(job.output, job.fingerprint)
    lease = Lease.take(job.output, say=lambda _: None)
    ledger.open(job.identity, job.spec.model_dump(mode="json"), {}, resume=True, overwrite=False)

    def broken(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        raise LookupError("nobody expects this")

    async def main() -> None:
        feeder = Feeder(feeder_config(job, beginning=ledger.beginning, lease=lease.number))
        feeder.connect(broken, Route(replicas=1, window=2, batch_rows=64, block_size=16))
        (unit,) = plan_units(job.inputs.files, rows_per_part=10)
        await asyncio.wait_for(feeder.run(unit, job.inputs.files[0]), 20)

    try:
        with pytest.raises(LookupError, match="nobody expects this"):
            asyncio.run(main())
    finally:
        lease.release()


def test_a_row_whose_columns_its_samples_would_repeat_too_often_is_an_error_row(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.unit.BATCH_BYTES", 8_000)
    source = write_rows(
        prefix=["a", "b", "c"],
        blob=["x" * 10, "x" * 3_000, "x" * 900],
        few=pa.array(["y" * 3_000] * 3).dictionary_encode(),
    )
    told = {"input": str(source), "output": str(source.with_name("out")), "engine": "instant", "max_tokens": 1}
    spec = JobSpec.parse(told | {"n": 4, "temperature": 1.0, "most_text": 100, "max_error_rate": 1.0})
    use_this_process(monkeypatch)
    manifest = run_job(spec)
    (error,) = pq.read_table(source.with_name("out") / "errors").to_pylist()
    assert (manifest["rows"], manifest["errors"], error["source_row"]) == (8, 1, 1)
    assert "with n = 4, more than 8,000" in error["error_message"]
