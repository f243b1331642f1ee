import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from jobs.unit import FeederConfig
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


@pytest.mark.parametrize(("tenant", "most"), [(None, None), ("acme", (256 << 20) // 4)])
def test_of_what_a_tenant_has_sent_no_more_is_read_at_once_than_memory_allows(
    tenant: str | None, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.unit.UnitReader", lambda *_, most_bytes: most_bytes)
    spec = JobSpec(input="", output="", tenant=tenant, n=4, temperature=1.0)
    config: Any = SimpleNamespace(spec=spec, input=None, schema=pa.schema([]))
    reader: Any = FeederConfig.reader(config)
    assert reader == most


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
    spec = JobSpec.parse(told | {"n": 4, "temperature": 1.0, "tenant": "acme", "most_text": 100, "max_error_rate": 1.0})
    use_this_process(monkeypatch)
    manifest = run_job(spec)
    (error,) = pq.read_table(source.with_name("out") / "errors").to_pylist()
    assert (manifest["rows"], manifest["errors"], error["source_row"]) == (8, 1, 1)
    assert "with n = 4, more than 8,000" in error["error_message"]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view()], ids=str)
def test_rows_of_long_texts_are_written_a_few_at_a_time_and_one_alone_by_samples(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    """All 1,024 rows of a batch, 64 times each, are more than a column of text can hold."""
    texts = ["x" * 10, "y" * 3_000, *("z" * 900 for _ in range(6))]
    source = write_rows(id=range(8), prefix=list("abcdefgh"), text=pa.array(texts).cast(kind))
    use_this_process(monkeypatch)
    found = []
    for most in (256 << 20, 8_000):
        monkeypatch.setattr("jobs.unit.BATCH_BYTES", most)
        told = {"input": str(source), "output": str(tmp_path / f"out-{most}"), "engine": "instant", "max_tokens": 1}
        run_job(JobSpec.parse(told | {"n": 4, "temperature": 1.0}))
        (part,) = (tmp_path / f"out-{most}" / "data").iterdir()
        groups = pq.ParquetFile(part)
        found.append([groups.read_row_group(number) for number in range(groups.num_row_groups)])
    (whole,), pieces = found
    assert pa.concat_tables(pieces).equals(whole)
    assert whole["text"].to_pylist() == [text for text in texts for _ in range(4)]
    assert [piece.num_rows for piece in pieces] == [4, 2, 2, 8, 8, 8]
    assert all(piece.nbytes < 9_000 for piece in pieces)


def test_units_of_many_samples_are_small_and_a_begun_job_keeps_its_own(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_rows(prefix=list("abcdefgh")), tmp_path / "out"
    told = {"input": str(source), "output": str(output), "engine": "instant", "max_tokens": 1, "temperature": 1.0}
    spec = JobSpec.parse(told | {"n": 4})
    monkeypatch.setattr("jobs.spec.UNIT_TOKENS", 3 * 4 * 65)
    use_this_process(monkeypatch, calls=1)
    with pytest.raises(LookupError):
        run_job(spec)
    for tokens, parts in ((2 * 4 * 65, 3), (64 << 20, 3)):
        monkeypatch.setattr("jobs.spec.UNIT_TOKENS", tokens)
        use_this_process(monkeypatch)
        run_job(spec)
        assert len(list((output / "data").iterdir())) == parts
    run_job(spec.model_copy(update={"overwrite": True}))
    assert len(list((output / "data").iterdir())) == 1
