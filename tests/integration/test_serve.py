"""``spanfill serve`` as a process: its start and its end, and the batches and jobs of real clients, kills included."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from openai import APIStatusError, NotFoundError, OpenAI
from openai.types import Batch

from tests.server import GATEWAY, Server, free_port, is_healthy, running_server

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
COUNT = 1_500
SLOW = ("--engine", "simulated", "--engine-arg", "max_num_seqs=8")
"""Some twenty seconds for ``COUNT`` lines."""

OTHERS = ("--engine-arg", "max_num_seqs=12", "--dtype", "float32", "--gateways", "2")
"""What makes another engine of it, whose infills would be others."""

ENDED = ("completed", "failed", "cancelled", "expired")
WORKER = "jobs.api.worker"
LONG = {"prompt": "x = ", "max_tokens": 900, "ignore_eos": True, "n": 4, "temperature": 1.0}
"""4 ms a token."""

LOOK_SECONDS = 2.0
"""How often the gateway reads the engines."""

PENALTY = {"repetition_penalty": 1.5}


class Tenant:
    """A tenant of a server, by its key."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.key = server.new_tenant(name)
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key=self.key)
        self.http = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def batch(self, count: int, **options: Any) -> Batch:
        """A new batch of so many lines."""
        asked = {"method": "POST", "url": "/v1/completions"}
        lines = [{"custom_id": f"line {number}", "body": body(number) | options} | asked for number in range(count)]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = self.openai.files.create(file=("lines.jsonl", data), purpose="batch")
        return self.openai.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"for": "ada"}
        )

    def job(self, count: int, **options: Any) -> dict[str, Any]:
        """A new job of so many rows."""
        sink = io.BytesIO()
        pq.write_table(pa.table({"prefix": [f"def f{n}(" for n in range(count)], "number": range(count)}), sink)
        form = {"file": ("rows.parquet", sink.getvalue())}
        file = self.http.post("/v1/files", files=form, data={"purpose": "job"}).json()
        answer = self.http.post("/v1/jobs", json={"input": file["id"], "options": {"max_tokens": 24} | options})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def text(self, asked: dict[str, Any]) -> str:
        """The answer to what somebody asks."""
        answer = self.http.post("/v1/completions", json=asked).json()
        text: str = answer["choices"][0]["text"]
        return text

    def told(self, path: str) -> dict[str, Any]:
        """What is told of a batch or job; asked again while a gateway is started anew."""
        answer: list[httpx.Response] = []

        def is_told() -> bool:
            with suppress(httpx.TransportError):
                answer[:] = [self.http.get(path)]
            return bool(answer) and answer[0].status_code == 200

        until(is_told, self.server)
        told: dict[str, Any] = answer[0].json()
        return told

    def ended(self, path: str) -> dict[str, Any]:
        """What is told of it once it has ended."""
        until(lambda: self.told(path)["status"] in ENDED, self.server)
        return self.told(path)

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """A result file's lines; none where there is no file."""
        return [json.loads(line) for line in self.openai.files.content(file_id).iter_lines()] if file_id else []

    def parts(self, job_id: str) -> list[str]:
        """The names of a job's parts that are out."""
        return [part["name"] for part in self.http.get(f"/v1/jobs/{job_id}/results").json()["data"]]

    def column(self, job_id: str, name: str) -> list[Any]:
        """A column of a job's results, none of which are errors."""
        paths = [f"/v1/jobs/{job_id}/results/data/{part}" for part in self.parts(job_id)]
        tables = [pq.read_table(io.BytesIO(self.http.get(path).content)) for path in paths]
        return [value for table in tables for value in table[name].to_pylist()]


def body(number: int) -> dict[str, Any]:
    """What a line asks; a job's row of this number asks the same."""
    return {"model": "demo-codegen25", "prompt": f"def f{number}(", "max_tokens": 24, "temperature": 0}


def until(condition: Callable[[], Any], server: Server, seconds: float = 240) -> None:
    """Wait until it holds, while the server lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert server.process.poll() is None, server.told[-3_000:]
        assert time.monotonic() < deadline, f"waited in vain: {server.told[-1_000:]}\n{logs(server)}"
        time.sleep(0.1)


def logs(server: Server) -> str:
    """What the processes of works that have not ended printed."""
    return "\n".join(path.read_text()[-3_000:] for path in server.home.glob("files/*/works/*/log"))


def segments(server: Server, work: str = "*") -> list[Path]:
    """The journal segments of a work that runs, or of all."""
    return list(server.home.glob(f"files/*/works/{work}/groups/*/out/_spanfill/journal/*/*.arrow"))


def kill(server: Server, title: str, count: int) -> None:
    """SIGKILL the processes that are called so."""
    processes = server.called(title)
    assert len(processes) == count
    for process in processes:
        process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the module, of an engine that takes its time."""
    with running_server(tmp_path_factory.mktemp("serve"), *SLOW) as found:
        yield found


@pytest.fixture(scope="module")
def acme(server: Server) -> Tenant:
    return Tenant(server, "acme")


@pytest.fixture(scope="module")
def zeta(server: Server) -> Tenant:
    return Tenant(server, "zeta")


def test_a_server_without_tenants_says_how_to_make_one_and_asks_for_keys_then(server: Server) -> None:
    assert "spanfill tenants create NAME" in server.told
    body = {"prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    server.command("tenants", "create", "first")
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert (answer.status_code, "tenants create NAME" in answer.text) == (401, True)


def test_openais_package_runs_a_batch(acme: Tenant, zeta: Tenant) -> None:
    batch = acme.batch(20)
    assert batch.status == "validating"
    assert acme.openai.batches.list(limit=1).data[0].id == batch.id
    acme.ended(f"/v1/batches/{batch.id}")
    done = acme.openai.batches.retrieve(batch.id)
    assert (done.status, done.metadata, done.error_file_id) == ("completed", {"for": "ada"}, None), logs(acme.server)
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed) == (20, 20)
    assert done.usage is not None
    assert [line["custom_id"] for line in acme.lines(done.output_file_id)] == [f"line {n}" for n in range(20)]
    assert done.output_file_id in [file.id for file in acme.openai.files.list(purpose="batch_output")]
    with pytest.raises(NotFoundError):
        zeta.openai.files.content(str(done.output_file_id))
    with pytest.raises(NotFoundError):
        zeta.openai.batches.retrieve(batch.id)
    with pytest.raises(APIStatusError, match="completed"):
        acme.openai.batches.cancel(batch.id)
    assert acme.openai.files.delete(batch.input_file_id).deleted


def test_openais_package_cancels_a_batch(acme: Tenant) -> None:
    batch = acme.batch(COUNT)
    until(lambda: segments(acme.server), acme.server)
    assert acme.openai.batches.cancel(batch.id).status == "cancelling"
    told = acme.ended(f"/v1/batches/{batch.id}")
    assert told["status"] == "cancelled"
    output, errors = (acme.lines(told[f"{name}_file_id"]) for name in ("output", "error"))
    assert output
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert sorted(line["custom_id"] for line in output + errors) == sorted(f"line {n}" for n in range(COUNT))


def test_a_job_runs_beside_those_who_are_served_and_others_batches(acme: Tenant, zeta: Tenant) -> None:
    job = acme.job(COUNT)
    until(lambda: segments(acme.server), acme.server)
    batch = zeta.batch(3)
    answers = [acme.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    told = acme.ended(f"/v1/jobs/{job['id']}")
    assert (told["status"], told["progress"]["rows"]) == ("completed", COUNT), told
    small = zeta.ended(f"/v1/batches/{batch.id}")
    assert small["status"] == "completed"
    assert small["in_progress_at"] <= told["ended_at"]
    assert acme.column(job["id"], "number") == list(range(COUNT))
    (used,) = acme.http.get("/v1/usage", params={"job": job["id"], "by": "job"}).json()["data"]
    assert used["completion_tokens"] == told["usage"]["completion_tokens"] > 0
    assert acme.http.get(f"{acme.server.url}/v1/jobs").json()["data"][0]["id"] == job["id"]


def reading(server: Server, name: str) -> float:
    """One of the engines' figures, read after now."""
    time.sleep(2 * LOOK_SECONDS + 0.5)
    return server.reading(name)


@pytest.mark.parametrize("streams", [True, False])
def test_whoever_goes_away_frees_the_engine_within_a_second(acme: Tenant, streams: bool) -> None:
    """Of a simulated engine; the same of a real one is in ``api/test_tenants.py``."""
    whole = time.monotonic()
    acme.http.post("/v1/completions", json=LONG, timeout=120).raise_for_status()
    whole = time.monotonic() - whole
    before, began = reading(acme.server, "busy_seconds"), time.monotonic()
    if streams:
        with acme.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            acme.http.post("/v1/completions", json=LONG, timeout=whole / 8)
    stayed = time.monotonic() - began
    worked = reading(acme.server, "busy_seconds") - before
    assert worked < stayed + 1.0
    assert reading(acme.server, "running") == 0
    assert stayed < whole / 2


@pytest.mark.parametrize(("title", "count"), [(GATEWAY, 1), (WORKER, 2)], ids=["the gateway", "the workers"])
def test_batches_and_jobs_outlive_a_kill(acme: Tenant, zeta: Tenant, title: str, count: int) -> None:
    batch, job = acme.batch(COUNT), zeta.job(COUNT, rows_per_part=1_000)
    until(lambda: segments(acme.server, batch.id) and segments(acme.server, job["id"]), acme.server)
    kill(acme.server, title, count)
    told = acme.ended(f"/v1/batches/{batch.id}")
    assert (told["status"], told["error_file_id"]) == ("completed", None), told
    output = acme.lines(told["output_file_id"])
    assert [line["custom_id"] for line in output] == [f"line {number}" for number in range(COUNT)]
    made = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in output)
    (used,) = acme.http.get("/v1/usage", params={"job": batch.id, "by": "job"}).json()["data"]
    assert (used["requests"], used["completion_tokens"]) == (COUNT, made)
    told = zeta.ended(f"/v1/jobs/{job['id']}")
    assert (told["status"], told["progress"]["rows"], told["error"]) == ("completed", COUNT, None), told
    assert zeta.column(job["id"], "number") == list(range(COUNT))


@pytest.mark.parametrize("others", [(), OTHERS], ids=["the same engines", "others"])
def test_a_signal_ends_it_in_the_middle_of_works_which_the_next_server_goes_on_with(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    with running_server(tmp_path, *SLOW) as server:
        tenant = Tenant(server, "acme")
        batch, job = tenant.batch(COUNT), tenant.job(COUNT, rows_per_part=1_000)
        until(lambda: segments(server, batch.id) and tenant.parts(job["id"]), server)
        (first,) = tenant.parts(job["id"])
        end(server, signal.SIGTERM, 143)
    with running_server(tmp_path, *SLOW, *others) as server:
        tenant.openai = OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key)
        tenant.http = httpx.Client(base_url=server.url, headers=tenant.http.headers, timeout=60)
        tenant.server = server
        told = tenant.ended(f"/v1/batches/{batch.id}")
        assert told["status"] == "completed"
        assert [line["custom_id"] for line in tenant.lines(told["output_file_id"])] == [
            f"line {number}" for number in range(COUNT)
        ]
        assert tenant.ended(f"/v1/jobs/{job['id']}")["status"] == "completed"
        assert tenant.column(job["id"], "number") == list(range(COUNT))
        kinds = {name.rsplit("-", 1)[1] for name in tenant.parts(job["id"])}
        assert len(kinds) == 1, "one kind of engine has made all of it"
        assert (first.rsplit("-", 1)[1] in kinds) == (not others)
        for work in (batch.id, job["id"]):
            (used,) = tenant.http.get("/v1/usage", params={"job": work, "by": "job"}).json()["data"]
            assert used["requests"] == COUNT
        end(server, signal.SIGINT, 130)


def end(server: Server, number: signal.Signals, code: int) -> None:
    """End a server by a signal; nothing that it started is left."""
    started = server.tree()
    server.process.send_signal(number)
    assert server.process.wait(90) == code, server.told
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left, left


@contextmanager
def running_process(command: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with its state in ``folder``, which SIGTERM ends."""
    with (folder / "log").open("wb") as log:
        env = os.environ | {"SPANFILL_HOME": str(folder / "home")}
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


def test_a_real_engine_is_healthy_once_it_is_loaded_and_gives_batches_jobs_and_people_the_same(tmp_path: Path) -> None:
    """Who asks meanwhile is told so, but for the moment in which Serve listens and knows no application yet."""
    with running_server(tmp_path, "--model", "demo-codegen25") as server:
        assert set(server.health) - {404} == {503, 200}
        assert server.health.count(404) < 10
        tenant = Tenant(server, "acme")
        batch, job = tenant.batch(4, **PENALTY), tenant.job(4, **PENALTY)
        plain, texts = ([tenant.text(body(number) | more) for number in range(4)] for more in ({}, PENALTY))
        assert plain != texts
        told = tenant.ended(f"/v1/batches/{batch.id}")
        assert told["status"] == "completed", told
        lines = tenant.lines(told["output_file_id"])
        assert [line["response"]["body"]["choices"][0]["text"] for line in lines] == texts
        assert any(texts)
        assert tenant.ended(f"/v1/jobs/{job['id']}")["status"] == "completed"
        assert tenant.column(job["id"], "infill") == texts
        end(server, signal.SIGTERM, 143)


def test_serve_run_starts_what_the_file_says(tmp_path: Path) -> None:
    port, env = free_port(), os.environ | {"SPANFILL_HOME": str(tmp_path / "home")}
    told = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    told["http_options"] = {"host": "127.0.0.1", "port": port}
    told["applications"][0]["args"]["engine"] = "instant"
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(told))
    command = [sys.executable, "-m", "jobs.cli", "tenants", "create", "acme"]
    key = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    serve = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "serve.yaml")]
    url, body = f"http://127.0.0.1:{port}", {"prompt": "x", "max_tokens": 2}
    with running_process(serve, tmp_path) as process:
        deadline = time.monotonic() + 240
        while not is_healthy(url):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3_000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        assert httpx.get(f"{url}/v1/batches", headers=headers, timeout=60).json()["data"] == []
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(90)
        _, left = psutil.wait_procs(started, timeout=20)
        assert not left, left


def test_a_signal_to_all_of_its_processes_ends_it_at_once_and_leaves_none(tmp_path: Path) -> None:
    """As a service manager or ``timeout`` sends it: Ray's head ends before it could be asked for anything."""
    with running_server(tmp_path, "--engine", "simulated", "--model", "demo-codegen25") as server:
        everybody = server.tree()
        for process in reversed(everybody):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        assert server.process.wait(40) == 143, logs(server)
        _, left = psutil.wait_procs(everybody, timeout=20)
        assert left == []
