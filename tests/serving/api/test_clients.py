"""The clients' own packages, and curl, against the application at a real socket, on a simulated engine."""

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import httpx
import pytest
import uvicorn
from mistralai.client import Mistral
from mistralai.client.errors import SDKError
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from serving.api.application import application
from serving.api.door import Door
from serving.errors import AuthenticationError as UnknownKeyError
from serving.tenants.caller import Caller
from tests.serving.api.house import MODEL, House

ASKED = {"model": "demo", "prompt": "def f():\n    return ", "suffix": "\n", "max_tokens": 24, "temperature": 0}
SECONDS = 60.0


async def find(key: str) -> Caller:
    """One key is known."""
    if key != "right":
        raise UnknownKeyError("the key is not valid.", remedy="Send another.")
    return Caller("acme", "k1")


@dataclass(frozen=True)
class Site:
    """Where the application listens, and what it runs on."""

    url: str
    house: House

    def openai(self, key: str = "right") -> OpenAI:
        """OpenAI's client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def running(self) -> int:
        """Samples in the engine."""
        stats = self.house.engine.stats()
        return stats.running + stats.waiting


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The application in a thread."""
    house = House(instant=False, model=replace(MODEL, context=2_048))
    app = application(house.service, Door(find), house.metrics, is_healthy=lambda: True)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    yield Site(f"http://{host}:{port}", house)
    server.should_exit = True
    thread.join(SECONDS)


def until(condition: object) -> None:
    """Wait until it holds."""
    assert callable(condition)
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_openais_client_completes_streams_and_counts(site: Site) -> None:
    client = site.openai().completions
    whole = client.create(**ASKED)  # type: ignore[call-overload]
    assert whole.choices[0].text
    assert whole.usage.prompt_tokens > 5
    chunks = list(client.create(**ASKED, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openais_client_reads_limits_models_and_scores(site: Site) -> None:
    raw = site.openai().completions.with_raw_response.create(model="demo", prompt="x", max_tokens=1)
    assert raw.headers["x-ratelimit-remaining-tokens"] == "60"
    assert [model.id for model in site.openai().models.list()] == ["demo"]
    assert site.openai().models.retrieve("demo").id == "demo"
    scored = site.openai().completions.create(model="demo", prompt="x = 1\n", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == [None, -1.0, -1.0, -1.0]


def test_openais_client_knows_the_errors(site: Site) -> None:
    with pytest.raises(AuthenticationError, match="not valid"):
        site.openai("wrong").completions.create(model="demo", prompt="x")
    with pytest.raises(NotFoundError, match="There is: demo"):
        site.openai().completions.create(model="gpt-5", prompt="x")
    with pytest.raises(BadRequestError, match="n = 2 at temperature 0") as refused:
        site.openai().completions.create(model="demo", prompt="x", n=2, temperature=0)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(APIError, match="larger than"):
        site.openai().completions.create(model="demo", prompt="x" * (5 << 20))
    site.house.desk.refuses = True
    try:
        with pytest.raises(RateLimitError) as limited:
            site.openai().completions.create(model="demo", prompt="x")
        with pytest.raises(RateLimitError):
            list(site.openai().completions.create(model="demo", prompt="x", stream=True))
    finally:
        site.house.desk.refuses = False
    headers = limited.value.response.headers
    assert (headers["retry-after-ms"], headers["x-ratelimit-remaining-tokens"]) == ("2000", "0")


def test_mistrals_client_completes_and_streams(site: Site) -> None:
    with Mistral(api_key="right", server_url=site.url) as client:
        whole = client.fim.complete(**ASKED)
        assert whole.choices[0].message is not None
        events = list(client.fim.stream(**ASKED))
    assert all(event.data.choices for event in events)
    streamed = "".join(str(event.data.choices[0].delta.content or "") for event in events)
    assert streamed == whole.choices[0].message.content
    assert events[-1].data.choices[0].finish_reason == whole.choices[0].finish_reason
    with Mistral(api_key="wrong", server_url=site.url) as stranger, pytest.raises(SDKError, match="401"):
        stranger.fim.complete(**ASKED)


def curl(site: Site, path: str, body: object) -> str:
    """What curl prints, which calls its body a form."""
    command = ["curl", "--silent", f"{site.url}{path}", "--data", "@-", "--header", "Authorization: Bearer right"]
    return subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True).stdout


def test_curl_warms_and_infills_as_llama_vim_does(site: Site) -> None:
    fields = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "t_max_predict_ms": 1}
    assert curl(site, "/infill", fields | {"response_fields": [""]}) == "{}"
    asked = {"input_prefix": "def f():\n", "input_suffix": "\n", "prompt": "    ret", "n_predict": 24}
    told = curl(
        site, "/infill", asked | {"t_max_predict_ms": 60_000, "response_fields": ["content", "timings/prompt_ms"]}
    )
    assert told.startswith('{"content":"')
    assert json.loads(told)["timings/prompt_ms"] > 0
    whole = json.loads(curl(site, "/infill", asked))
    assert whole["content"] == json.loads(told)["content"]
    assert whole["timings"]["predicted_per_second"] > 0
    events = [json.loads(line[6:]) for line in curl(site, "/infill", asked | {"stream": True}).splitlines() if line]
    assert "".join(event["content"] for event in events) == whole["content"]


def test_ollamas_lines_join_to_the_answer_and_its_durations_can_be_divided_by(site: Site) -> None:
    asked = ASKED | {"options": {"temperature": 0, "num_predict": 24}}
    whole = json.loads(curl(site, "/api/generate", asked | {"stream": False}))
    lines = [json.loads(line) for line in curl(site, "/api/generate", asked).splitlines()]
    assert "".join(line["response"] for line in lines) == whole["response"]
    for told in (whole, lines[-1]):
        assert told["done"]
        assert told["eval_count"] / told["eval_duration"] > 0
        assert told["prompt_eval_duration"] > 0


@pytest.mark.engine
def test_a_client_that_goes_away_in_mid_stream_frees_the_engine_within_a_second(site: Site) -> None:
    body = {"prompt": "x", "max_tokens": 1_900, "ignore_eos": True, "n": 4, "stream": True}
    with httpx.stream(
        "POST", f"{site.url}/v1/completions", json=body, headers={"x-api-key": "right"}, timeout=SECONDS
    ) as answer:
        next(answer.iter_lines())
        assert site.running() == 4
    left = time.monotonic()
    until(lambda: site.running() == 0)
    assert time.monotonic() - left < 1.0


def test_load_balancers_may_ask_for_the_head_of_health(site: Site) -> None:
    with httpx.Client(base_url=site.url) as client:
        answer = client.head("/health")
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.get("/health").json() == {"status": "ok"}


def test_whoever_has_no_key_is_told_so_before_and_behind_a_large_body(site: Site) -> None:
    body = b'{"prompt":[' + b"[]," * 1_300_000 + b"[]]}"
    with httpx.Client(base_url=site.url) as client:
        assert client.post("/v1/completions", content=body).status_code == 401
        assert client.get("/health").status_code == 200
    host, _, port = site.url.removeprefix("http://").partition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 401 "), "and the connection is closed, though the body has not come"
