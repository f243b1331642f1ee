"""What surrounds every request, around a service that answers as it is told."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import APIRouter, Request
from starlette.testclient import TestClient
from starlette.types import Message

from serving.api.application import application
from serving.api.ask import Answer, Ask
from serving.api.edge import MOST_BODY, noted
from serving.api.metrics import Metrics
from serving.errors import EngineError
from serving.tenants.caller import Caller
from tests.serving.api.scripted import Scripted, who_calls

COMPLETE = "/v1/completions"


class Gateway:
    """All routes, one of them with bodies of up to 10 MB, and the figures of them."""

    def __init__(self, service: Scripted | None = None) -> None:
        routes = APIRouter()

        @routes.post("/large")
        async def large(request: Request) -> int:
            return len(await request.body())

        @routes.get("/limited")
        async def limited() -> str:
            about = noted.get()
            assert about is not None
            about.headers["x-ratelimit-limit-tokens"] = "7"
            raise EngineError("It failed.")

        self.metrics = Metrics()
        self.app = application(
            service or Scripted(),
            who_calls,
            self.metrics,
            is_healthy=lambda: True,
            routers=[routes],
            larger={"/large": 10 << 20},
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def counted(self, route: str) -> dict[str, float]:
        """How many requests of a route had which status."""
        found = {}
        for line in self.metrics.text().decode().splitlines():
            if line.startswith(f'spanfill_requests_total{{route="{route}"'):
                labels, count = line.rsplit(" ", 1)
                found[labels.split('"')[3]] = float(count)
        return found


def test_a_body_that_says_that_it_is_too_large_is_refused_in_the_paths_words() -> None:
    client = Gateway().client
    for path, wording in ((COMPLETE, ["error", "code"]), ("/infill", ["error", "type"]), ("/api/generate", ["error"])):
        answer = client.post(path, content=b" " * (MOST_BODY + 1), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        told: Any = answer.json()
        for step in wording:
            told = told[step]
        assert isinstance(told, str)
        assert f"The body is larger than {MOST_BODY:,} bytes. Send less at a time." in answer.text


@pytest.mark.parametrize("told", [[], [(b"content-length", b"2")]])
def test_a_body_without_a_length_or_with_a_wrong_one_is_read_no_further_than_it_may_be(
    told: list[tuple[bytes, bytes]],
) -> None:
    async def run() -> tuple[list[int], int]:
        statuses: list[int] = []
        read = 0

        async def receive() -> Message:
            nonlocal read
            read += 1 << 20
            return {"type": "http.request", "body": b" " * (1 << 20), "more_body": True}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json"), *told]
        await asyncio.wait_for(Gateway().app(scope(COMPLETE, headers), receive, send), 60)
        return statuses, read

    statuses, read = asyncio.run(run())
    assert statuses == [413]
    assert read == MOST_BODY + (1 << 20)


def test_a_path_may_take_more() -> None:
    client = Gateway().client
    assert client.post("/large", content=b" " * (MOST_BODY + 1)).json() == MOST_BODY + 1
    assert client.post("/large", content=b" " * ((10 << 20) + 1)).status_code == 413


def scope(path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """A POST."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("here", 1),
        "server": ("here", 2),
    }


def test_what_is_noted_goes_out_with_an_error_too() -> None:
    answer = Gateway().client.get("/limited")
    assert (answer.status_code, answer.headers["x-ratelimit-limit-tokens"]) == (500, "7")
    assert noted.get() is None


def test_requests_are_counted_by_route_and_status() -> None:
    gateway = Gateway()
    gateway.client.post(COMPLETE, json={"prompt": "a"})
    gateway.client.post(COMPLETE, json={"prompt": 1})
    gateway.client.post(COMPLETE, json={"prompt": "a"}, headers={"Authorization": "Bearer nobody"})
    gateway.client.get("/v1/models/some/name")
    gateway.client.get("/some/secret")
    assert gateway.counted(COMPLETE) == {"200": 1, "400": 1, "401": 1}
    assert "secret" not in gateway.client.get("/metrics").text
    assert "some" not in gateway.client.get("/metrics").text


def test_what_nobody_expected_counts_as_a_failure() -> None:
    gateway = Gateway(Scripted(refuse=RuntimeError("oh")))
    assert gateway.client.post(COMPLETE, json={"prompt": "a"}).status_code == 500
    assert gateway.counted(COMPLETE) == {"500": 1}


def test_a_client_that_went_away_is_no_failure() -> None:
    class Slow(Scripted):
        async def answer(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError

    waiting = asyncio.Event()

    async def run() -> dict[str, float]:
        gateway = Gateway(Slow())
        body = json.dumps({"prompt": "a"}).encode()

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            pytest.fail("nothing is answered")

        headers = [(b"content-type", b"application/json")]
        task = asyncio.ensure_future(gateway.app(scope(COMPLETE, headers), receive, send))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return gateway.counted(COMPLETE)

    assert asyncio.run(run()) == {"499": 1}
