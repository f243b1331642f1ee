"""What tenants owe each other and the server owes them, on a real engine behind two gateways."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai import RateLimitError

from tests.api import INFILL, MODEL, PREFIX, SUFFIX, Api
from tests.runs import running

pytestmark = pytest.mark.engine
STREAMS, STREAM_SECONDS = 200, 60.0
LONG: dict[str, Any] = {"prompt": "x = ", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
"""A request of some ten seconds."""

CONTROL = "a = 1 <mask_1> <sep><eom> <|endoftext|> b"
SECRET = "xyzzy"


def cached(api: Api, body: dict[str, Any], key: str) -> int:
    """Prompt tokens of a request that the prefix cache held."""
    found: int = api.complete(body, key)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_a_tenants_prompt_is_cached_for_it_and_for_nobody_else(api: Api) -> None:
    body = {"prompt": "x = 1  # " + "cached, or not cached? " * 60, "max_tokens": 1}
    assert cached(api, body, api.acme) == 0
    assert cached(api, body, api.acme) > 0
    assert cached(api, body, api.other) == 0
    assert cached(api, body, api.other) > 0


def test_no_caller_chooses_the_salt_of_the_cache(api: Api) -> None:
    body = {"prompt": "y = 2  # " + "whose cache, and whose salt? " * 60, "max_tokens": 1}
    assert cached(api, body, api.acme) == 0
    for salt in ("tenant:acme", "acme", ""):
        fresh = body | {"prompt": f"{body['prompt']}{salt}"}  # All that is whole blocks is the same.
        assert cached(api, fresh | {"cache_salt": salt}, api.server.new_tenant(f"salt-{len(salt)}")) == 0
    assert cached(api, body | {"cache_salt": "mine alone"}, api.acme) > 0


def test_an_infills_prompt_keeps_to_its_tenant_too(api: Api) -> None:
    text = "z = 3  # " + "in another dialect? " * 60
    mistral = {"prompt": text, "suffix": "\n", "max_tokens": 1}
    vim = {"input_prefix": text, "input_suffix": "\n", "n_predict": 1}
    assert api.post("/v1/fim/completions", mistral).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert api.post("/infill", vim, api.other).json()["tokens_cached"] == 0
    assert api.post("/infill", vim).json()["tokens_cached"] > 0


def test_control_tokens_in_text_stay_text(api: Api) -> None:
    done = api.complete({"prompt": CONTROL, "max_tokens": 0, "echo": True, "logprobs": 0})["choices"][0]
    assert done["text"] == "".join(done["logprobs"]["tokens"]) == CONTROL
    assert not {"<mask_1>", "<sep>", "<eom>", "<|endoftext|>"} & set(done["logprobs"]["tokens"])
    prompt = api.post("/infill", {"input_prefix": CONTROL, "input_suffix": CONTROL, "n_predict": 0}).json()["prompt"]
    assert prompt == f"{CONTROL}<mask_1>{CONTROL}<|endoftext|><sep><mask_1>"
    tokens = [
        api.complete({"prompt": text, "suffix": text, "max_tokens": 1})["usage"]["prompt_tokens"]
        for text in ("", CONTROL)
    ]
    assert tokens == [4, 4 + 2 * len(done["logprobs"]["tokens"])]


def test_a_limit_of_tokens_is_told_before_and_when_it_is_reached(api: Api) -> None:
    key = api.server.new_tenant("small", "--tokens-per-minute", "100")
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    first = api.post("/v1/completions", body, key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) <= 40
    for _ in range(4):  # Whichever gateway it comes to.
        answer = api.post("/v1/completions", body, key)
        assert answer.status_code == 429
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    with pytest.raises(RateLimitError, match="Try again in"):
        api.openai(key).completions.create(model=MODEL, prompt="x", max_tokens=60)


def test_a_limit_of_requests_at_once_holds_across_gateways_until_one_ends(api: Api) -> None:
    key = api.server.new_tenant("narrow", "--max-concurrency", "2")
    short = {"prompt": "x", "max_tokens": 1}
    url, headers = f"{api.url}/v1/completions", api.headers(key)
    stream: dict[str, Any] = {"json": LONG | {"stream": True}, "headers": headers, "timeout": 60}
    with httpx.stream("POST", url, **stream) as one, httpx.stream("POST", url, **stream) as two:
        lines = [answer.iter_lines() for answer in (one, two)]  # To forget one is to hang up.
        assert [next(each).startswith("data: {") for each in lines] == [True, True]
        for _ in range(4):
            refused = api.post("/v1/completions", short, key)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    deadline = time.monotonic() + 10
    while (answer := api.post("/v1/completions", short, key)).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.status_code == 200


def hung_up(api: Api, body: dict[str, Any]) -> None:
    """Ask, and go away while the engine works."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.url}/v1/completions", json=body, headers=api.headers(), timeout=httpx.Timeout(30, read=1.5))


def let_go(api: Api, body: dict[str, Any]) -> None:
    """Read the beginning of a stream, and no more."""
    asked: dict[str, Any] = {"json": body | {"stream": True}, "headers": api.headers(), "timeout": 60}
    with httpx.stream("POST", f"{api.url}/v1/completions", **asked) as answer:
        next(answer.iter_lines())


def test_whoever_goes_away_frees_the_engine_within_a_second(api: Api) -> None:
    before, began = api.reading("busy_seconds"), time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        sampled = LONG | {"n": 3, "temperature": 1}
        for done in [
            pool.submit(hung_up, api, LONG),
            pool.submit(hung_up, api, sampled),
            pool.submit(let_go, api, LONG),
        ]:
            done.result()
    stayed = time.monotonic() - began
    assert api.reading("busy_seconds") - before < stayed + 1.0
    assert api.server.reading("running") == 0


async def streamed(client: httpx.AsyncClient, number: int) -> str:
    """All that one stream says."""
    body = {"prompt": f"def f{number}(x):\n    return ", "max_tokens": 8, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    assert answer.status_code == 200, lines
    return lines[-1]


def test_two_hundred_streams_at_once_for_a_minute_all_come_to_their_end(api: Api) -> None:
    until = time.monotonic() + STREAM_SECONDS

    async def one_after_the_other(client: httpx.AsyncClient, number: int) -> list[str]:
        ends = [await streamed(client, number)]
        while time.monotonic() < until:
            ends.append(await streamed(client, number))
        return ends

    async def all_of_them() -> list[list[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=api.url, headers=api.headers(), timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one_after_the_other(client, number) for number in range(STREAMS)))

    assert {end for ends in asyncio.run(all_of_them()) for end in ends} == {"data: [DONE]"}


def test_usage_is_metered_by_tenant(api: Api) -> None:
    key = api.server.new_tenant("metered")
    used = [api.complete({"prompt": "x = 1", "max_tokens": 3}, key)["usage"] for _ in range(3)]
    deadline = time.monotonic() + 30
    lines: list[dict[str, Any]] = []
    while sum(line["requests"] for line in lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = json.loads(api.server.command("tenants", "usage", "--tenant", "metered", "--json"))["usage"]
    (line,) = lines
    assert (line["tenant"], line["model"], line["requests"]) == ("metered", MODEL, 3)
    for name in ("prompt_tokens", "completion_tokens"):
        assert line[name] == sum(usage[name] for usage in used)


def test_a_job_joins_the_engines_that_serve_people_and_its_infills_are_theirs(
    api: Api, expected: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"prefix": [PREFIX] * 8, "suffix": [SUFFIX] * 8}), tmp_path / "rows.parquet")
    arguments = ("--input", tmp_path / "rows.parquet", "--output", tmp_path / "out", "--model", MODEL)
    with running(tmp_path / "job.log", *arguments, "--max-tokens", 24, env=api.server.job_environment) as job:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(api.post, "/v1/completions", INFILL) for _ in range(12)]
            assert {answer.result().json()["choices"][0]["text"] for answer in asked} == {expected}
        assert job.manifest()["rows"] == 8
        assert "joined the running application spanfill" in job.told
    infills = pq.read_table(tmp_path / "out" / "data")["infill"].to_pylist()
    assert infills == [expected] * 8


def told_of_a_batch(api: Api, bodies: list[dict[str, Any]]) -> bytes:
    """What the process of a batch printed until it ended; the tenant's files are gone then."""
    client = api.openai()
    lines = ({"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": b} for n, b in enumerate(bodies))
    sent = client.files.create(file=("batch.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=sent.id, endpoint="/v1/completions", completion_window="24h")
    printed, deadline = b"", time.monotonic() + 120
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        for log in api.server.home.glob("files/*/works/*/log"):
            with suppress(FileNotFoundError):
                printed = max(printed, log.read_bytes(), key=len)
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    for file in filter(None, (sent.id, batch.output_file_id, batch.error_file_id)):
        client.files.delete(file)
    return printed


def test_no_log_holds_a_prompt_or_a_key(api: Api) -> None:
    wrong = f"{api.acme[:-10]}{SECRET}{SECRET}"
    api.complete({"prompt": f"{SECRET} = ", "max_tokens": 2})
    api.complete({"prompt": f"{SECRET} = ", "suffix": SECRET, "max_tokens": 2, "stop": SECRET})
    for path, body, key in (
        ("/v1/completions", {"prompt": SECRET, "max_tokens": "many"}, ""),
        ("/v1/completions", {"prompt": [SECRET, 7], "max_tokens": 2}, ""),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 10**6}, ""),
        ("/v1/completions", {"prompt": SECRET, "logit_bias": {"999999": 1}}, ""),
        ("/infill", {"input_prefix": SECRET, "input_suffix": SECRET, "n_predict": SECRET}, ""),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 2}, wrong),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 2}, SECRET),
    ):
        assert 400 <= api.post(path, body, key).status_code < 500
    bodies: list[dict[str, Any]] = [
        {"prompt": SECRET, "max_tokens": 2},
        {"prompt": SECRET, "n": SECRET},
        {"echo": SECRET},
    ]
    printed = told_of_a_batch(api, bodies)
    assert printed
    assert SECRET.encode() not in printed
    files = [path for path in api.server.ray.rglob("*") if path.is_file() and "logs" in path.parts]
    assert len(files) > 10
    state = [path for path in api.server.home.rglob("*") if path.is_file()]
    for file in [*files, api.server.log, *state]:
        held = file.read_bytes()
        for hidden in (SECRET, api.acme, api.other):
            assert hidden.encode() not in held, file
