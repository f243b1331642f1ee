import asyncio
from collections.abc import AsyncIterator

import pytest

from jobs.feeder import Feeder, Route
from jobs.job import feeder_config, prepare_job
from jobs.lease import Lease
from jobs.ledger import Ledger
from jobs.plan import plan_units
from jobs.spec import JobSpec
from serving.protocol import MicroBatch, MicroBatchResult
from tests.conftest import WriteRows


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
        feeder.connect(broken, Route(replicas=1, window=2, block_size=16))
        (unit,) = plan_units(job.inputs.files, rows_per_part=10)
        await asyncio.wait_for(feeder.run(unit, job.inputs.files[0]), 20)

    try:
        with pytest.raises(LookupError, match="nobody expects this"):
            asyncio.run(main())
    finally:
        lease.release()
