"""``/v1/jobs`` and ``/v1/usage``: Parquet in, Parquet out, for one's own tenant and from nowhere else."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from jobs.api.config import RoutesConfig
from jobs.api.order import WorkFolder
from jobs.api.parts import PartFile, part_files
from jobs.dispatch import Dispatcher
from jobs.spec import JobSpec
from serving.app_config import AppConfig
from serving.errors import ConfigError
from serving.protocol import Completion, MicroBatch, MicroBatchResult, Request, Result, Sampling
from serving.tenants.caller import Caller
from serving.tenants.store import open_store
from serving.tenants.usage import UsageRecord
from tests.jobs.routed import (
    SLOW,
    as_tenant,
    ask,
    create_batch,
    ended,
    lines_of,
    logs,
    routed,
    segments,
    until,
    upload,
)

pytestmark = pytest.mark.usefixtures("home")

ALLOWED = "s3://allowed/data/"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Of a gateway that runs nothing."""
    with routed(RoutesConfig(at_once=0, input_prefixes=(ALLOWED,))) as found:
        yield found


@pytest.fixture
def instant(cluster: None, checkpoint: Path) -> RoutesConfig:
    """A gateway whose engine answers at once, in this process's cluster."""
    return RoutesConfig(app=AppConfig(model=str(checkpoint), engine="instant"))


def parquet(**columns: Any) -> bytes:
    """Columns as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def create_job(client: TestClient, data: bytes, **options: Any) -> dict[str, Any]:
    """Upload rows and make a job of them."""
    sent = {"input": upload(client, data, purpose="job"), "options": options, "metadata": {"for": "ada"}}
    answer = client.post("/v1/jobs", json=sent)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def parts_of(client: TestClient, job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a job's results and errors."""
    found: dict[str, list[dict[str, Any]]] = {"data": [], "errors": []}
    for part in client.get(f"/v1/jobs/{job['id']}/results").json()["data"]:
        answer = client.get(f"/v1/jobs/{job['id']}/results/{part['folder']}/{part['name']}")
        assert (answer.status_code, len(answer.content)) == (200, part["bytes"])
        found[part["folder"]] += pq.read_table(io.BytesIO(answer.content)).to_pylist()
    return found


def made_by(found: dict[str, list[dict[str, Any]]]) -> int:
    """Tokens that the engine made, those that ended rows included."""
    return sum(row["completion_tokens"] + (row["finish_reason"] in ("eom", "eos")) for row in found["data"])


def test_a_new_job_is_told_and_listed(client: TestClient) -> None:
    told = create_job(client, parquet(prefix=["a"]), max_tokens=8, temperature=0.5, columns={"prefix": "prefix"})
    assert told["id"].startswith("job_")
    assert told | {"id": "", "input": "", "created_at": 0} == {
        "id": "",
        "object": "job",
        "status": "queued",
        "model": "demo",
        "input": "",
        "options": {"max_tokens": 8, "temperature": 0.5, "columns": {"prefix": "prefix"}},
        "metadata": {"for": "ada"},
        "progress": {
            "rows": 0, "total_rows": 0, "parts": 0, "total_parts": 0, "rows_per_second": 0.0, "eta_seconds": None,
            "errors": 0, "error_codes": {},
        },
        "usage": {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0},
        "error": None,
        "created_at": 0,
        "started_at": None,
        "ended_at": None,
        "expires_at": None,
    }  # fmt: skip
    assert client.get(f"/v1/jobs/{told['id']}").json() == told
    listed = client.get("/v1/jobs").json()
    assert (listed["data"], listed["first_id"], listed["has_more"]) == ([told], told["id"], False)


def test_an_unknown_option_is_answered_with_all_there_are(client: TestClient) -> None:
    file_id = upload(client, parquet(prefix=["a"]), purpose="job")
    answer = client.post("/v1/jobs", json={"input": file_id, "options": {"n": 2, "beams": 4}})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "options: beams is none; there are task, max_tokens, temperature" in message
    assert "{" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "instant"},
        {"engine_args": {"max_num_seqs": 1}},
        {"output": "/tmp/x"},
        {"model": "/etc"},
        {"tenant": "zeta"},
        {"replicas": 100},
        {"overwrite": True},
        {"order": "global"},
        {"rows_per_part": 1},
        {"max_tokens": 0},
        {"max_tokens": "8"},
        {"n": 2},
        {"trim": ["everything"]},
        {"columns": {"nothing": "x"}},
        {"task": "score", "max_tokens": 5},
    ],
)
def test_what_is_not_a_tenants_to_choose_is_refused(client: TestClient, options: dict[str, Any]) -> None:
    file_id = upload(client, parquet(prefix=["a"]), purpose="job")
    answer = client.post("/v1/jobs", json={"input": file_id, "options": options})
    assert answer.status_code == 400, answer.text
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    "address",
    [
        *("/etc/passwd", "./x.parquet", "../x", "file:///etc/passwd", "local:///etc", "memory://x", "~/x"),
        *("http://169.254.169.254/latest/meta-data", "https://intranet/x", "s3://other/x.parquet"),
        *("s3://allowed/database/x", "s3://allowed/data", "s3://allowed/data/../secret/x"),
        *(f"{ALLOWED}x?endpoint_override=localhost", f"{ALLOWED}x#y", f"{ALLOWED}x::file:///etc/passwd"),
        *(f"{ALLOWED}%2e%2e/x", f" {ALLOWED}x", f"{ALLOWED}x\n", ALLOWED.upper()),
    ],
)
def test_addresses_of_the_servers_disk_and_network_are_refused(client: TestClient, address: str) -> None:
    answer = client.post("/v1/jobs", json={"input": address})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("rest", ["x.parquet", "", "a/b/**/*.parquet", "a..b/x"])
def test_an_address_below_an_allowed_prefix_is_taken(client: TestClient, rest: str) -> None:
    answer = client.post("/v1/jobs", json={"input": ALLOWED + rest})
    assert (answer.status_code, answer.json()["input"]) == (200, ALLOWED + rest)


def test_a_file_of_another_purpose_or_tenant_is_no_input(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json={"input": upload(client, b"x")})
    assert (answer.status_code, "purpose is batch" in answer.text) == (400, True)
    file_id = upload(client, parquet(prefix=["a"]), purpose="job")
    assert client.post("/v1/jobs", json={"input": file_id}, headers=as_tenant("zeta")).status_code == 404
    assert client.post("/v1/jobs", json={"input": file_id, "model": "other"}).status_code == 404


def test_other_tenants_jobs_are_not_there(client: TestClient) -> None:
    job, other = create_job(client, parquet(prefix=["a"])), as_tenant("zeta")
    path = f"/v1/jobs/{job['id']}"
    part = f"{path}/results/data/part-00000-0123456789ab.parquet"
    for answer in (
        *(client.get(place, headers=other) for place in (path, f"{path}/results", part)),
        client.post(f"{path}/cancel", headers=other),
        client.delete(path, headers=other),
        client.get("/v1/jobs", params={"after": job["id"]}, headers=other),
    ):
        assert answer.status_code == 404
    assert client.get("/v1/jobs", headers=other).json()["data"] == []
    assert client.get(path).json()["status"] == "queued"


@pytest.mark.parametrize("name", ["..%2f..%2forder.json", "data/..%2f..%2f..%2forder.json", "data/job.json"])
def test_a_parts_name_leads_nowhere_else(client: TestClient, name: str) -> None:
    job = create_job(client, parquet(prefix=["a"]))
    assert client.get(f"/v1/jobs/{job['id']}/results/{name}").status_code in (400, 404)


def test_parts_that_are_deleted_while_they_are_asked_for_are_not_told(
    client: TestClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, name = create_job(client, parquet(prefix=["a"])), "part-00000-0123456789ab.parquet"
    (tenant,) = home.glob("files/*")
    folder = WorkFolder(tenant / "works" / job["id"]).results() / "data"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"PAR1")
    path = f"/v1/jobs/{job['id']}/results"
    told = {"object": "part", "folder": "data", "name": name, "bytes": 4}
    assert client.get(path).json()["data"] == [told]
    assert client.get(f"{path}/data/{name}").content == b"PAR1"

    def found_and_gone(work: WorkFolder) -> list[PartFile]:
        found = part_files(work)
        (folder / name).unlink()
        return found

    monkeypatch.setattr("jobs.api.native.part_files", found_and_gone)
    assert client.get(path).status_code == 200
    monkeypatch.undo()
    assert client.get(path).json()["data"] == []


def test_a_job_that_has_not_ended_is_not_deleted_and_a_cancelled_one_ends(client: TestClient) -> None:
    job = create_job(client, parquet(prefix=["a"]))
    path = f"/v1/jobs/{job['id']}"
    assert client.delete(path).status_code == 400
    assert client.post(f"{path}/cancel").json()["status"] == "cancelling"
    with routed(RoutesConfig()) as other:
        told = ended(other, path)
        assert (told["status"], told["error"]) == ("cancelled", None)
        assert told["expires_at"] == pytest.approx(told["ended_at"] + 30 * 86_400, abs=1)
    assert client.delete(path).json() == {"id": job["id"], "object": "job", "deleted": True}
    assert client.get(path).status_code == 404


@pytest.mark.engine
def test_a_job_comes_out_as_spanfill_run_writes_it(instant: RoutesConfig, home: Path) -> None:
    count = 2_500
    data = parquet(
        prefix=[None if number == 7 else f"def f{number}(" for number in range(count)],
        suffix=["\n"] * count,
        extra=list(range(count)),
    )
    with routed(instant) as client:
        job = create_job(client, data, max_tokens=4, rows_per_part=1_000)
        told = ended(client, f"/v1/jobs/{job['id']}")
        assert told["status"] == "completed", (told, logs())
        found = parts_of(client, job)
        usage = client.get("/v1/usage", params={"job": job["id"], "by": "job"}).json()["data"]
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    assert [row["extra"] for row in found["data"]] == [number for number in range(count) if number != 7]
    (error,) = found["errors"]
    assert (error["extra"], error["source_file"], error["source_row"]) == (7, "input.parquet", 7)
    assert (told["progress"]["rows"], told["progress"]["total_rows"], told["progress"]["parts"]) == (count, count, 3)
    assert told["progress"]["error_codes"] == {"bad_input": 1}
    sums = {"prompt_tokens": sum(row["prompt_tokens"] for row in found["data"]), "completion_tokens": made_by(found)}
    assert told["usage"] | sums == told["usage"]
    assert usage[0] | told["usage"] | {"requests": count - 1} == usage[0]
    (works,) = home.glob("files/*/works")
    assert list(works.iterdir()) == []


@pytest.mark.engine
def test_a_batch_and_a_job_count_the_tokens_that_end_samples_as_requests_do(instant: RoutesConfig) -> None:
    prompts = [f"def f{number}(" for number in range(50)]
    with routed(instant) as client:
        job = create_job(client, parquet(prefix=prompts), max_tokens=8)
        asked = [ask(prompt, prompt=prompt, max_tokens=8, temperature=0) for prompt in prompts]
        batch = ended(client, f"/v1/batches/{create_batch(client, *asked)['id']}")
        told, found = ended(client, f"/v1/jobs/{job['id']}"), parts_of(client, job)
        lines = lines_of(client, batch["output_file_id"])
    stopped = [row["finish_reason"] == "eom" for row in found["data"]]
    made = [row["completion_tokens"] + ended for row, ended in zip(found["data"], stopped, strict=True)]
    assert 0 < sum(stopped) < len(prompts)
    assert [line["response"]["body"]["usage"]["completion_tokens"] for line in lines] == made
    assert told["usage"]["completion_tokens"] == batch["usage"]["output_tokens"] == sum(made)


@pytest.mark.engine
def test_a_job_that_cannot_run_says_why_without_the_servers_paths(instant: RoutesConfig, home: Path) -> None:
    with routed(instant) as client:
        jobs = [create_job(client, data) for data in (b"this is no Parquet", parquet(other=["a"]))]
        told = [ended(client, f"/v1/jobs/{job['id']}") for job in jobs]
    assert [one["status"] for one in told] == ["failed", "failed"]
    assert "input.parquet is no readable Parquet file" in told[0]["error"]["message"]
    assert "column prefix is missing" in told[1]["error"]["message"]
    for one in told:
        assert one["error"]["code"] == "bad_input"
        assert str(home) not in one["error"]["message"]


@pytest.mark.engine
def test_a_small_file_that_would_fill_the_memory_fails_its_job_and_a_long_text_its_row(instant: RoutesConfig) -> None:
    bomb = parquet(prefix=["x" * (129 << 20)])
    assert len(bomb) < 10 << 20
    with routed(instant) as client:
        jobs = [create_job(client, data) for data in (bomb, parquet(prefix=["x" * (5 << 20), "a"]))]
        told = [ended(client, f"/v1/jobs/{job['id']}") for job in jobs]
        found = parts_of(client, jobs[1])
    assert [one["status"] for one in told] == ["failed", "completed"]
    assert told[0]["error"]["code"] == "bad_input"
    assert "input.parquet, row group 0" in told[0]["error"]["message"]
    (row,), (error,) = found["data"], found["errors"]
    assert row["prefix"] == "a"
    assert "5,242,880 bytes" in error["error_message"]


@pytest.mark.engine
def test_finished_parts_of_a_cancelled_job_stay(cluster: None) -> None:
    with routed(SLOW) as client:
        job = create_job(
            client, parquet(prefix=[f"def f{n}(" for n in range(4_000)]), max_tokens=16, rows_per_part=1_000
        )
        path = f"/v1/jobs/{job['id']}"
        until(lambda: client.get(f"{path}/results").json()["data"])
        running = client.get(path).json()
        client.post(f"{path}/cancel")
        told = ended(client, path)
        found = parts_of(client, job)
    assert running["status"] == "in_progress"
    assert running["progress"]["total_rows"] == 4_000
    assert told["status"] == "cancelled"
    assert 1_000 <= len(found["data"]) < 4_000
    assert told["usage"]["completion_tokens"] >= made_by(found)


@pytest.mark.engine
@pytest.mark.usefixtures("cluster")
def test_what_a_cancelled_job_without_a_part_used_is_metered() -> None:
    with routed(SLOW) as client:
        job = create_job(client, parquet(prefix=[f"def f{n}(" for n in range(4_000)]), max_tokens=16)
        path = f"/v1/jobs/{job['id']}"
        until(segments)
        client.post(f"{path}/cancel")
        told = ended(client, path)
        (used,) = client.get("/v1/usage", params={"job": job["id"], "by": "job"}).json()["data"]
        assert parts_of(client, job) == {"data": [], "errors": []}
    rows = [row for path in segments() for row in pa.ipc.open_file(path).read_all().to_pylist()]
    assert told["status"] == "cancelled"
    assert used["requests"] == len({row["row"] for row in rows}) == len(rows)
    assert used["completion_tokens"] == sum(len(row["token_ids"]) + (row["stop_token_id"] is not None) for row in rows)
    assert used["prompt_tokens"] > used["cached_tokens"] == sum(row["cached_tokens"] for row in rows)
    assert told["usage"] == {name: used[name] for name in told["usage"]}


def test_an_admin_lists_and_cancels_jobs_of_all_tenants(client: TestClient) -> None:
    job = create_job(client, parquet(prefix=["a"]))
    path, admin, other = f"/v1/jobs/{job['id']}", as_tenant("zeta/admin"), as_tenant("zeta")
    for tenant in ("acme", "*"):
        assert client.get("/v1/jobs", params={"tenant": tenant}, headers=admin).json()["data"] == [job]
        assert client.get("/v1/jobs", params={"tenant": tenant}, headers=other).status_code == 403
    assert client.get("/v1/jobs", headers=admin).json()["data"] == []
    assert client.post(f"{path}/cancel", headers=other).status_code == 404
    for method, rest in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        assert client.request(method, f"{path}{rest}", headers=admin).status_code == 404
    assert client.post(f"{path}/cancel", headers=admin).json()["status"] == "cancelling"
    assert client.get(path).json()["status"] == "cancelling"


def test_usage_is_ones_own_unless_one_is_an_admin(client: TestClient) -> None:
    now = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
    store = open_store()
    for tenant in ("acme", "zeta"):
        record = UsageRecord(tenant, f"key-of-{tenant}", "demo", 10, 4, 5, now)
        store.add_usage(tenant, [(1, record)])
    store.close()

    def seen(caller: str, **params: str) -> Any:
        answer = client.get("/v1/usage", params=params, headers=as_tenant(caller))
        return [line["tenant"] for line in answer.json()["data"]] if answer.status_code == 200 else answer.status_code

    assert seen("acme") == seen("acme", tenant="acme") == seen("acme/admin") == ["acme"]
    assert seen("acme", tenant="zeta") == seen("acme", tenant="nobody") == seen("acme", tenant="*") == 403
    assert seen("acme/admin", tenant="zeta") == ["zeta"]
    assert seen("acme/admin", tenant="*") == ["acme", "zeta"]
    assert seen("acme/admin", tenant="nobody") == []
    assert seen("acme", since="2026-11-26") == seen("acme", until="2026-11-24") == seen("acme", job="job_x") == []
    assert seen("acme", by="weather") == seen("acme", since="soon") == seen("acme", key="a b") == 400
    line = client.get("/v1/usage").json()["data"][0]
    assert line == {
        "tenant": "acme", "day": "2026-11-25", "model": "demo", "key": "key-of-acme", "job": "", "prompt_tokens": 10,
        "cached_tokens": 4, "completion_tokens": 5, "requests": 1,
    }  # fmt: skip


def test_a_tenants_rows_keep_to_its_own_prefix_cache() -> None:
    salts: list[str | None] = []

    async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        salts.append(batch.cache_salt)
        yield MicroBatchResult("r", tuple(Result(r.key, (Completion([1], "stop", 7),)) for r in batch.requests))

    async def main(tenant: str | None) -> None:
        spec = JobSpec(input="in", output="out", tenant=tenant)
        sent = Dispatcher(call, max_attempts=3, cache_salt=spec.cache_salt)
        async for _ in sent.send([Request(0, [1])], Sampling(4)):
            pass

    for tenant in ("acme", "zeta", None):
        asyncio.run(main(tenant))
    assert salts == [Caller("acme", "k").cache_salt, Caller("zeta", "k").cache_salt, None]
    with pytest.raises(ConfigError, match="tenant"):
        JobSpec.parse({"input": "in", "output": "out", "tenant": "a/b"})
