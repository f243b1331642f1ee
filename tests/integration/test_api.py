"""Real clients against a real server: Ray Serve, its HTTP proxy, the gateway, the demo model on vLLM."""

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mistralai.client import Mistral
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from serving import infill
from tests.server import Server, running_server

pytestmark = pytest.mark.engine

PREFIX = "def add(a, b):\n    return "
SUFFIX = "\n\n\ndef sub(a, b):\n    return a - b\n"


@dataclass(frozen=True)
class Api:
    """A server and the keys of two tenants."""

    server: Server
    acme: str
    other: str

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    def client(self, key: str = "") -> OpenAI:
        """OpenAI's own."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.acme, max_retries=0)

    def post(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        """Plain HTTP."""
        headers = {"Authorization": f"Bearer {key or self.acme}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One server for the module."""
    with running_server(tmp_path_factory.mktemp("api"), "--model", "demo-codegen25") as server:
        keys = [json.loads(server.command("tenants", "create", name, "--json"))["key"] for name in ("acme", "other")]
        yield Api(server, *keys)


@pytest.fixture(scope="module")
def expected() -> str:
    """What the engine makes of the prompt without a server."""
    return infill(PREFIX, SUFFIX, model="demo-codegen25", max_tokens=24).text


def test_openais_package_infills(api: Api, expected: str) -> None:
    done = api.client().completions.create(
        model="demo-codegen25", prompt=PREFIX, suffix=SUFFIX, max_tokens=24, temperature=0
    )
    assert done.choices[0].text == expected
    assert done.usage is not None
    assert done.usage.prompt_tokens > 20


def test_openais_package_streams(api: Api, expected: str) -> None:
    chunks = list(
        api.client().completions.create(
            model="demo-codegen25",
            prompt=PREFIX,
            suffix=SUFFIX,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None


def test_mistrals_package_infills_and_streams(api: Api, expected: str) -> None:
    with Mistral(api_key=api.acme, server_url=api.url) as client:
        done = client.fim.complete(model="demo-codegen25", prompt=PREFIX, suffix=SUFFIX, max_tokens=24, temperature=0)
        assert done.choices[0].message is not None
        assert done.choices[0].message.content == expected
        events = client.fim.stream(model="demo-codegen25", prompt=PREFIX, suffix=SUFFIX, max_tokens=24, temperature=0)
        assert "".join(str(event.data.choices[0].delta.content or "") for event in events) == expected


def test_litellm_completes(api: Api, expected: str) -> None:
    import litellm

    done = litellm.text_completion(
        model="text-completion-openai/demo-codegen25",
        prompt=PREFIX,
        suffix=SUFFIX,
        max_tokens=24,
        temperature=0,
        api_base=f"{api.url}/v1",
        api_key=api.acme,
    )
    assert done.choices[0].text == expected


def test_curl_infills_as_llama_vim_does(api: Api, expected: str) -> None:
    asked = {
        "input_prefix": PREFIX,
        "input_suffix": SUFFIX,
        "prompt": "",
        "n_predict": 24,
        "response_fields": ["content"],
    }
    command = ["curl", "-s", f"{api.url}/infill", "-H", f"Authorization: Bearer {api.acme}", "-d", json.dumps(asked)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == {"content": expected}


def test_ollamas_form_streams_lines(api: Api, expected: str) -> None:
    options = {"temperature": 0, "num_predict": 24}
    answer = api.post(
        "/api/generate", {"model": "demo-codegen25", "prompt": PREFIX, "suffix": SUFFIX, "options": options}
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["response"] for line in lines) == expected
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_the_first_tenants_prompt_is_cached_for_it_and_for_nobody_else(api: Api) -> None:
    body = {"model": "demo-codegen25", "prompt": "x = 1  # " + "cached, or not cached? " * 60, "max_tokens": 1}

    def cached(key: str) -> int:
        found: int = api.post("/v1/completions", body, key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(api.acme) == 0
    assert cached(api.acme) > 0
    assert cached(api.other) == 0
    assert (
        api.post("/v1/completions", body | {"cache_salt": "tenant:acme"}, api.other).json()["usage"][
            "prompt_tokens_details"
        ]["cached_tokens"]
        > 0
    )  # Its own blocks, from the request before.


def test_keys_and_models_that_are_not_there(api: Api) -> None:
    with pytest.raises(AuthenticationError):
        api.client("sf_wrong").completions.create(model="demo-codegen25", prompt="x", max_tokens=1)
    with pytest.raises(NotFoundError):
        api.client().completions.create(model="gpt-5", prompt="x", max_tokens=1)
    with pytest.raises(BadRequestError):
        api.client().completions.create(model="demo-codegen25", prompt="x", max_tokens=100_000)


def test_scores_are_an_echos_logprobs(api: Api) -> None:
    done = api.client().completions.create(
        model="demo-codegen25", prompt="x = 1\ny = 2\n", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert done.choices[0].text == "x = 1\ny = 2\n"
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_a_limit_is_told_before_and_when_it_is_reached(api: Api) -> None:
    key = json.loads(api.server.command("tenants", "create", "small", "--tokens-per-minute", "100", "--json"))["key"]
    first = api.post("/v1/completions", {"prompt": "x", "max_tokens": 60}, key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    answers = [api.post("/v1/completions", {"prompt": "x", "max_tokens": 60}, key) for _ in range(3)]
    assert answers[-1].status_code == 429
    assert float(answers[-1].headers["retry-after"]) > 0
    assert answers[-1].headers["x-ratelimit-limit-tokens"] == "100"
    with pytest.raises(RateLimitError, match="Try again in"):
        api.client(key).completions.create(model="demo-codegen25", prompt="x", max_tokens=60)


def test_whoever_goes_away_frees_the_engine(api: Api) -> None:
    body = {"prompt": "x = ", "max_tokens": 900, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {api.acme}"}
    with httpx.stream("POST", f"{api.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    time.sleep(4)  # The gateway reads the replicas every two seconds.
    running = [line for line in httpx.get(f"{api.url}/metrics").text.splitlines() if 'reading="running"' in line]
    assert [float(line.split()[-1]) for line in running] == [0.0]


def test_usage_is_metered_by_tenant(api: Api) -> None:
    api.post("/v1/completions", {"prompt": "x", "max_tokens": 3}, api.other)
    time.sleep(3)
    told = json.loads(api.server.command("tenants", "usage", "--json"))
    lines = {line["tenant"]: line for line in told["usage"]}
    assert lines["other"]["requests"] >= 1
    assert lines["acme"]["prompt_tokens"] > lines["other"]["prompt_tokens"]


def test_a_job_joins_the_engines_that_serve_people(api: Api, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.runs import running

    pq.write_table(pa.table({"prefix": [PREFIX] * 8, "suffix": [SUFFIX] * 8}), tmp_path / "rows.parquet")
    arguments = ("--input", tmp_path / "rows.parquet", "--output", tmp_path / "out", "--model", "demo-codegen25")
    with running(tmp_path / "job.log", *arguments, "--max-tokens", 24, env=api.server.job_environment) as job:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(api.post, "/v1/completions", {"prompt": "x", "max_tokens": 5}) for _ in range(12)]
            assert {answer.result().status_code for answer in asked} == {200}
        assert job.manifest()["rows"] == 8


def test_no_log_holds_a_prompt_or_a_key(api: Api) -> None:
    secret = "xyzzy_is_in_this_prompt"
    api.post("/v1/completions", {"prompt": secret, "max_tokens": 2})
    api.post("/v1/completions", {"prompt": secret, "max_tokens": "many"})
    api.post("/v1/completions", {"prompt": secret}, "sf_wrong_key_xyzzy")
    logs = [*Path("/tmp/ray/session_latest/logs").rglob("*"), api.server.log]
    told = [path.read_text(errors="replace") for path in logs if path.is_file()]
    assert told
    for text in told:
        assert "xyzzy" not in text
        assert api.acme not in text
