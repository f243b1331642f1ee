"""``/v1/batches`` from the upload to the result files, over a real job runner; and what survives a kill."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jobs.api.config import RoutesConfig
from jobs.api.database import Database
from serving.app_config import AppConfig
from serving.tenants.database import database_address
from serving.tenants.store import open_store
from serving.tenants.tables import WorkRow
from serving.tenants.usage import UsageFilter
from tests.jobs.routed import (
    SLOW,
    as_tenant,
    ask,
    create_batch,
    ended,
    gateway,
    jsonl,
    lines_of,
    logs,
    routed,
    segments,
    until,
    upload,
)
from tests.runs import answered, counting

pytestmark = pytest.mark.usefixtures("home")

COUNT = 1_500


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Of a gateway that runs nothing."""
    with routed() as found:
        yield found


@pytest.fixture
def instant(cluster: None, checkpoint: Path) -> RoutesConfig:
    """A gateway whose engine answers at once, in this process's cluster; it runs one work at a time."""
    return RoutesConfig(app=AppConfig(model=str(checkpoint), engine="instant"), at_once=1)


def many(count: int = COUNT) -> list[dict[str, Any]]:
    return [ask(f"line {number}", prompt=f"def f{number}(", max_tokens=24, temperature=0) for number in range(count)]


def refused(client: TestClient, **sent: Any) -> str:
    """What is said of a batch that is not taken."""
    usual = {"input_file_id": "file-" + "0" * 32, "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = client.post("/v1/batches", json=usual | sent)
    assert answer.status_code in (400, 404), answer.text
    return str(answer.json()["error"]["message"])


def test_a_new_batch_is_told_in_openais_shape(client: TestClient) -> None:
    told = create_batch(client, ask("a"), metadata={"for": "ada"})
    assert told["id"].startswith("batch_")
    empty = "errors output_file_id error_file_id usage in_progress_at finalizing_at completed_at failed_at expired_at"
    assert told == dict.fromkeys([*empty.split(), "cancelling_at", "cancelled_at"]) | {
        "id": told["id"],
        "object": "batch",
        "endpoint": "/v1/completions",
        "model": "demo",
        "input_file_id": told["input_file_id"],
        "completion_window": "24h",
        "status": "validating",
        "created_at": told["created_at"],
        "expires_at": told["created_at"] + 86_400,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"for": "ada"},
    }
    assert client.get(f"/v1/batches/{told['id']}").json() == told
    assert client.get("/v1/batches").json()["data"] == [told]


def test_what_is_no_batch_is_refused(client: TestClient) -> None:
    assert "file-000" in refused(client)
    assert "endpoint" in refused(client, endpoint="/v1/chat/completions")
    assert "completion_window" in refused(client, completion_window="48h")
    assert "purpose is job" in refused(client, input_file_id=upload(client, b"x", purpose="job"))
    assert "input_file_id" in refused(client, input_file_id=None)
    wrong: list[Any] = [{str(n): "x" for n in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, []]
    for metadata in wrong:
        assert "metadata" in refused(client, metadata=metadata)


def test_a_deep_body_is_refused(client: TestClient) -> None:
    answer = client.post(
        "/v1/batches", content=b'{"metadata":' + b"[" * 200_000, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400


def test_a_file_beyond_a_batchs_bytes_is_refused() -> None:
    with routed(RoutesConfig(at_once=0, batch_bytes=10)) as client:
        assert "10 bytes" in refused(client, input_file_id=upload(client, b"x" * 11))


def test_a_tenant_with_too_many_batches_is_told_to_wait() -> None:
    with routed(RoutesConfig(at_once=0, unfinished=1)) as client:
        create_batch(client, ask("a"))
        sent = {"input_file_id": upload(client, jsonl(ask("a"))), "completion_window": "24h"}
        answer = client.post("/v1/batches", json=sent | {"endpoint": "/v1/completions"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
        create_batch(client, ask("a"), tenant="zeta")


def test_other_tenants_batches_are_not_there(client: TestClient) -> None:
    batch, other = create_batch(client, ask("a")), as_tenant("zeta")
    sent = {"input_file_id": batch["input_file_id"], "completion_window": "24h", "endpoint": "/v1/completions"}
    for answer in (
        client.get(f"/v1/batches/{batch['id']}", headers=other),
        client.post(f"/v1/batches/{batch['id']}/cancel", headers=other),
        client.get("/v1/batches", params={"after": batch["id"]}, headers=other),
        client.post("/v1/batches", json=sent, headers=other),
        client.get(f"/v1/jobs/{batch['id']}"),
    ):
        assert answer.status_code == 404
    assert client.get("/v1/batches", headers=other).json()["data"] == []
    assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "validating"


def test_an_admin_lists_and_cancels_batches_of_all_tenants(client: TestClient) -> None:
    """And does nothing else with them: they are read by their tenant alone."""
    ids = {tenant: create_batch(client, ask("a"), tenant=tenant)["id"] for tenant in ("acme", "zeta")}

    def listed(caller: str, **params: str) -> Any:
        answer = client.get("/v1/batches", params=params, headers=as_tenant(caller))
        return [batch["id"] for batch in answer.json()["data"]] if answer.status_code == 200 else answer.status_code

    assert listed("acme/admin") == listed("acme", tenant="acme") == [ids["acme"]]
    assert listed("acme/admin", tenant="zeta") == [ids["zeta"]]
    assert listed("acme/admin", tenant="*") == [ids["zeta"], ids["acme"]]
    assert listed("acme/admin", tenant="*", after=ids["zeta"]) == [ids["acme"]]
    assert listed("acme", tenant="zeta") == listed("acme", tenant="nobody") == listed("acme", tenant="*") == 403
    path = f"/v1/batches/{ids['zeta']}"
    assert client.get(path, headers=as_tenant("acme/admin")).status_code == 404
    assert client.post(f"{path}/cancel", headers=as_tenant("acme")).status_code == 404
    told = client.post(f"{path}/cancel", headers=as_tenant("acme/admin")).json()
    assert (told["id"], told["status"]) == (ids["zeta"], "cancelling")
    assert client.get(path, headers=as_tenant("zeta")).json() == told


@pytest.mark.parametrize("batch_id", ["..", "..%2f..", "batch_..%2fx", "batch_" + "0" * 32, "%00"])
def test_an_id_leads_nowhere_but_to_a_row(client: TestClient, batch_id: str) -> None:
    assert client.get(f"/v1/batches/{batch_id}").status_code in (400, 404)


def test_lines_that_are_no_part_of_a_batch_fail_it_by_their_numbers(home: Path) -> None:
    with routed(RoutesConfig()) as client:
        lines = [ask("a"), ask("a"), ask("c", "/v1/embeddings"), ask("d", model="other"), {"method": "POST"}]
        told = ended(client, f"/v1/batches/{create_batch(client, *lines)['id']}")
        assert (told["status"], told["output_file_id"], told["error_file_id"]) == ("failed", None, None)
        assert told["failed_at"] >= told["created_at"]
        found = [(error["line"], error["code"]) for error in told["errors"]["data"]]
        assert found == [
            *((2, "duplicate_custom_id"), (3, "mismatched_url"), (4, "mismatched_model")),
            (5, "missing_required_parameter"),
        ]
    (works,) = home.glob("files/*/works")
    assert list(works.iterdir()) == []


def test_a_batch_that_is_cancelled_before_it_begins_is_delivered_as_cancelled(client: TestClient) -> None:
    batch = create_batch(client, ask("a"), ask("b", logprobs=2))
    told = client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert told["status"] == "cancelling"
    with routed(RoutesConfig()) as other:
        told = ended(other, f"/v1/batches/{batch['id']}")
        assert (told["status"], told["output_file_id"]) == ("cancelled", None)
        first, second = lines_of(other, told["error_file_id"])
    assert (first["custom_id"], first["response"], first["error"]["code"]) == ("a", None, "batch_cancelled")
    assert (second["custom_id"], second["response"]["status_code"]) == ("b", 400)
    assert client.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "cancelled"


@pytest.mark.engine
def test_every_line_is_answered_in_its_place(instant: RoutesConfig) -> None:
    lines = [
        ask("first", prompt="def a(", suffix="\n", max_tokens=8, temperature=0),
        ask("two prompts", prompt=["x", "y"], max_tokens=4, temperature=0),
        ask("samples", prompt="z", n=3, temperature=0.7, seed=1),
        ask("refused", logit_bias={"5": 1}),
        ask("same seed", prompt="z", n=3, temperature=0.7, seed=1),
        ask("last", prompt="def a(", suffix="\n", max_tokens=8, temperature=0),
    ]
    with routed(instant) as client:
        batch = create_batch(client, *lines, metadata={"for": "ada"})
        told = ended(client, f"/v1/batches/{batch['id']}")
        assert told["status"] == "completed", (told, logs())
        output, errors = (lines_of(client, told[f"{name}_file_id"]) for name in ("output", "error"))
        stored = client.get(f"/v1/files/{told['output_file_id']}").json()
        usage = client.get("/v1/usage", params={"job": batch["id"], "by": "tenant,model,key,job"}).json()["data"]
        assert client.get(f"/v1/files/{told['output_file_id']}", headers=as_tenant("zeta")).status_code == 404
    assert told["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert stored["purpose"] == "batch_output"
    assert [line["custom_id"] for line in output] == ["first", "two prompts", "samples", "same seed", "last"]
    check_shapes(output, batch["id"])
    bodies = {line["custom_id"]: line["response"]["body"] for line in output}
    assert [len(bodies[name]["choices"]) for name in bodies] == [1, 2, 3, 3, 1]
    texts = {name: [choice["text"] for choice in body["choices"]] for name, body in bodies.items()}
    assert texts["samples"] == texts["same seed"]
    assert len(set(texts["samples"])) == 3
    assert texts["first"] == texts["last"]
    (error,) = errors
    assert (error["custom_id"], error["response"]["status_code"], error["error"]) == ("refused", 400, None)
    assert "logit_bias" in error["response"]["body"]["error"]["message"]
    check_usage(told["usage"], bodies, usage)
    times = ("created_at", "in_progress_at", "finalizing_at", "completed_at")
    assert [told[name] for name in times] == sorted(told[name] for name in times)


def check_shapes(output: list[dict[str, Any]], batch_id: str) -> None:
    """Every result line is what OpenAI's clients read, and has ids of its own."""
    for line in output:
        assert line.keys() == {"id", "custom_id", "response", "error"}
        assert line["error"] is None
        assert line["response"].keys() == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
        body = line["response"]["body"]
        assert (body["object"], body["model"]) == ("text_completion", "demo")
        assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    assert len({line["id"] for line in output}) == len(output)
    assert batch_id not in str(output)


def check_usage(told: dict[str, Any], bodies: dict[str, Any], metered: list[dict[str, Any]]) -> None:
    """The batch's usage is the sum of its answers', and what was metered."""
    sums = {
        name: sum(body["usage"][name] for body in bodies.values()) for name in ("prompt_tokens", "completion_tokens")
    }
    assert (told["input_tokens"], told["output_tokens"]) == (sums["prompt_tokens"], sums["completion_tokens"])
    assert told["total_tokens"] == sum(sums.values())
    assert told["output_tokens_details"] == {"reasoning_tokens": 0}
    (line,) = metered
    assert (line["tenant"], line["model"], line["key"]) == ("acme", "demo", "key-of-acme")
    assert {name: line[name] for name in sums} == sums
    assert line["cached_tokens"] == told["input_tokens_details"]["cached_tokens"]


@pytest.mark.engine
def test_mistrals_endpoint_is_answered_in_its_own_shape(instant: RoutesConfig) -> None:
    url = "/v1/fim/completions"
    with routed(instant) as client:
        batch = create_batch(client, ask("a", url, suffix="b", max_tokens=4), endpoint=url)
        told = ended(client, f"/v1/batches/{batch['id']}")
        (line,) = lines_of(client, told["output_file_id"])
    body = line["response"]["body"]
    assert (body["object"], body["id"][:4]) == ("chat.completion", "fim-")
    assert body["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.engine
@pytest.mark.parametrize("all_of_it", [False, True], ids=["the gateway", "the machine"])
def test_a_batch_goes_on_where_a_killed_gateway_left_it(client: TestClient, tmp_path: Path, all_of_it: bool) -> None:
    """Its journal is all that is kept of one part; every line comes out once, and few were generated again."""
    counts = tmp_path / "counts"
    batch = create_batch(client, *many())
    env = counting(counts)
    with gateway(SLOW, env) as first:
        until(segments)
        first.kill(all_of_it=all_of_it)
    path = f"/v1/batches/{batch['id']}"
    assert client.get(path).json()["status"] == "in_progress"
    with gateway(SLOW, env):
        told = ended(client, path, seconds=300)
    assert told["status"] == "completed", told
    assert told["request_counts"] == {"total": COUNT, "completed": COUNT, "failed": 0}
    output = lines_of(client, told["output_file_id"])
    assert [line["custom_id"] for line in output] == [f"line {number}" for number in range(COUNT)]
    assert COUNT <= answered(counts) < 2 * COUNT
    with closing(open_store()) as store:
        (used,) = store.usage(["job"], UsageFilter(job=batch["id"]))
    assert (used.requests, used.completion_tokens) == (COUNT, told["usage"]["output_tokens"])


@pytest.mark.engine
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_what_is_done_of_a_batch_that_is_cut_short_is_delivered(end: str) -> None:
    with routed(SLOW) as client:
        batch = create_batch(client, *many())
        path = f"/v1/batches/{batch['id']}"
        until(segments)
        if end == "cancelled":
            assert client.post(f"{path}/cancel").json()["status"] == "cancelling"
        else:
            expire(batch["id"])
        told = ended(client, path)
        output, errors = (lines_of(client, told[f"{name}_file_id"]) for name in ("output", "error"))
        (used,) = client.get("/v1/usage", params={"job": batch["id"], "by": "job"}).json()["data"]
    assert told["status"] == end
    assert told[f"{end}_at"] >= told["in_progress_at"]
    assert 0 < len(output) < COUNT
    assert Counter(line["error"]["code"] for line in errors) == {f"batch_{end}": COUNT - len(output)}
    assert {line["custom_id"] for line in output + errors} == {f"line {number}" for number in range(COUNT)}
    assert told["request_counts"] == {"total": COUNT, "completed": len(output), "failed": len(errors)}
    assert used["requests"] == len(output)
    made = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in output)
    assert used["completion_tokens"] == told["usage"]["output_tokens"] == made


def expire(batch_id: str) -> None:
    """Let a batch's time be over."""
    database = Database(database_address())
    with database.session(writes=True) as session:
        session.get_one(WorkRow, batch_id).expires = 1.0
    database.close()


@pytest.mark.engine
def test_a_gateway_that_ends_lets_another_go_on(cluster: None) -> None:
    with routed(SLOW) as client:
        batch = create_batch(client, *many(600))
        until(segments)
    with routed(SLOW) as client:
        told = ended(client, f"/v1/batches/{batch['id']}")
        output = lines_of(client, told["output_file_id"])
    assert told["status"] == "completed"
    assert [line["custom_id"] for line in output] == [f"line {number}" for number in range(600)]


@pytest.mark.engine
def test_tenants_take_turns_and_nobody_runs_two_at_once(instant: RoutesConfig) -> None:
    with routed() as idle:
        batches = [create_batch(idle, ask("a"), tenant=tenant) for tenant in ("acme", "acme", "zeta")]
    with routed(instant) as client:
        paths = [f"/v1/batches/{batch['id']}" for batch in batches]
        told = [ended_of(client, path, tenant) for path, tenant in zip(paths, ("acme", "acme", "zeta"), strict=True)]
    assert [one["status"] for one in told] == ["completed"] * 3
    assert told[2]["completed_at"] <= told[1]["in_progress_at"]


@pytest.mark.engine
@pytest.mark.usefixtures("cluster")
def test_a_long_batch_makes_way_for_a_tenant_who_waits_and_goes_on_where_it_was() -> None:
    """Even where one runs at a time."""
    with routed(SLOW.model_copy(update={"at_once": 1, "turn_seconds": 12.0})) as client:
        long = create_batch(client, *many(2 * COUNT))
        until(segments)
        short = create_batch(client, ask("a"), tenant="zeta")
        told = ended_of(client, f"/v1/batches/{short['id']}", "zeta")
        assert told["status"] == "completed"
        whole = ended_of(client, f"/v1/batches/{long['id']}", "acme")
        output = lines_of(client, whole["output_file_id"])
    assert (whole["status"], whole["request_counts"]["completed"]) == ("completed", 2 * COUNT)
    assert whole["in_progress_at"] < told["in_progress_at"] < told["completed_at"] < whole["completed_at"]
    assert [line["custom_id"] for line in output] == [f"line {number}" for number in range(2 * COUNT)]


def ended_of(client: TestClient, path: str, tenant: str) -> dict[str, Any]:
    """As ``ended``, for a tenant."""
    client.headers.update(as_tenant(tenant))
    return ended(client, path)
