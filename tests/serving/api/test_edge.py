"""What surrounds every request, around a service that answers as it is told."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import APIRouter, Depends, Request
from starlette.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from serving.api import edge
from serving.api.application import application
from serving.api.ask import Answer, Ask
from serving.api.door import Door
from serving.api.edge import MOST_BODY, noted
from serving.api.metrics import Metrics
from serving.errors import DatabaseAwayError, EngineError
from serving.tenants.caller import Caller
from tests.serving.api.scripted import Scripted, who_calls

COMPLETE = "/v1/completions"
KEY = {"Authorization": "Bearer ada"}
UNKNOWN = "The key is unknown. Ask for one."
RAW_KEY = (b"authorization", b"Bearer ada")


class Gateway:
    """All routes, two of them with bodies of up to 10 MB, the keys that were looked up, and the figures."""

    def __init__(self, service: Scripted | None = None) -> None:
        self.keys: list[str] = []
        routes = APIRouter()
        door = Door(self.find)

        @routes.post("/large")
        @routes.post("/guarded", dependencies=[Depends(door)])
        async def large(request: Request) -> int:
            return len(await request.body())

        @routes.get("/limited")
        async def limited() -> str:
            about = noted.get()
            assert about is not None
            about.headers["x-ratelimit-limit-tokens"] = "7"
            raise EngineError("It failed.")

        self.metrics = Metrics("one")
        self.app = application(
            service or Scripted(),
            door,
            self.metrics,
            is_healthy=lambda: True,
            routers=[routes],
            larger={"/large": 10 << 20, "/guarded": 10 << 20},
        )
        self.client = TestClient(self.app, raise_server_exceptions=False, headers=KEY)

    async def find(self, key: str) -> Caller:
        """As ``who_calls``, but ``bob`` is of another tenant; of the key ``unknowable`` nobody can say anything now."""
        self.keys.append(key)
        if key == "unknowable":
            raise DatabaseAwayError("Keys cannot be looked up at the moment.", remedy="Try again in a few seconds.")
        return Caller("zeta", "bob") if key == "bob" else await who_calls(key)

    def counted(self, route: str) -> dict[str, float]:
        """How many requests of a route had which status."""
        found = {}
        for line in self.metrics.text().decode().splitlines():
            if line.startswith(f'spanfill_requests_total{{gateway="one",route="{route}"'):
                labels, count = line.rsplit(" ", 1)
                found[labels.split('"')[5]] = float(count)
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

        headers = [(b"content-type", b"application/json"), RAW_KEY, *told]
        await asyncio.wait_for(Gateway().app(scope(COMPLETE, headers), receive, send), 60)
        return statuses, read

    statuses, read = asyncio.run(run())
    assert statuses == [413]
    assert read == MOST_BODY + (1 << 20)


def test_a_path_may_take_more() -> None:
    client = Gateway().client
    assert client.post("/large", content=b" " * (MOST_BODY + 1)).json() == MOST_BODY + 1
    assert client.post("/large", content=b" " * ((10 << 20) + 1)).status_code == 413


async def unread() -> Message:
    """A body that nobody may ask for."""
    pytest.fail("the body is read")


def answered_unread(gateway: Gateway, asked: dict[str, Any]) -> tuple[int, dict[bytes, bytes], Any]:
    """Status, headers and JSON of what is answered without the body."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(gateway.app(asked, unread, send))
    start, *rest = sent
    return start["status"], dict(start["headers"]), json.loads(b"".join(part["body"] for part in rest))


def test_nothing_of_a_body_is_read_from_whoever_has_no_key() -> None:
    gateway, asked_for_keys = Gateway(), []
    description = gateway.client.get("/openapi.json").json()
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            if operation.get("security"):
                asked = scope(path, [(b"content-length", b"3900000")]) | {"method": method.upper()}
                status, headers, told = answered_unread(gateway, asked)
                assert (status, headers[b"connection"]) == (401, b"close"), path
                assert headers[b"www-authenticate"] == b"Bearer"
                assert "no key was sent." in json.dumps(told)
                asked_for_keys.append(path)
    assert {COMPLETE, "/infill", "/api/generate", "/v1/fim/completions"} <= set(asked_for_keys)
    assert gateway.keys == []


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (COMPLETE, {"message": UNKNOWN, "type": "authentication_error", "param": None, "code": "invalid_api_key"}),
        ("/infill", {"code": 401, "message": UNKNOWN, "type": "authentication_error"}),
        ("/api/generate", UNKNOWN),
    ],
)
def test_whoever_has_no_key_is_told_so_in_the_paths_words(path: str, error: Any) -> None:
    status, _, told = answered_unread(Gateway(), scope(path, [(b"authorization", b"Bearer nobody")]))
    assert (status, told) == (401, {"error": error})


def test_a_malformed_body_without_a_key_is_a_matter_of_the_key() -> None:
    client = Gateway().client
    for key, status in (("nobody", 401), ("ada", 400)):
        assert client.post(COMPLETE, content=b"{", headers={"Authorization": f"Bearer {key}"}).status_code == status


def test_nothing_of_a_body_is_read_while_keys_cannot_be_looked_up() -> None:
    gateway = Gateway()
    asked = scope(COMPLETE, [(b"authorization", b"Bearer unknowable"), (b"transfer-encoding", b"chunked")])
    status, headers, told = answered_unread(gateway, asked)
    assert (status, headers[b"connection"], told["error"]["code"]) == (503, b"close", "database_away")
    assert int(headers[b"retry-after"]) > 0
    assert gateway.counted(COMPLETE) == {"503": 1}


def test_a_key_is_looked_up_once_a_request() -> None:
    gateway = Gateway()
    assert gateway.client.post(COMPLETE, json={"prompt": "a"}).status_code == 200
    assert gateway.client.post("/api/generate", json={"model": "demo", "prompt": "a"}).status_code == 200
    assert gateway.keys == ["ada", "ada"]
    assert gateway.client.post("/guarded", content=b" " * (MOST_BODY + 1)).json() == MOST_BODY + 1
    assert gateway.keys == ["ada"] * 3


def test_a_connection_whose_request_had_no_body_is_kept() -> None:
    answer = Gateway().client.get("/v1/models", headers={"Authorization": "Bearer nobody"})
    assert answer.status_code == 401
    assert "connection" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("POST", "/v1/nothing", 404),
        ("GET", COMPLETE, 405),
        ("HEAD", COMPLETE, 405),
        ("OPTIONS", COMPLETE, 405),
        ("PUT", "/v1/models", 405),
    ],
)
def test_what_asks_for_no_key_is_answered_without_one(method: str, path: str, status: int) -> None:
    gateway = Gateway()
    assert TestClient(gateway.app).request(method, path).status_code == status
    assert gateway.keys == []


def test_websockets_lead_nowhere() -> None:
    client = TestClient(Gateway().app)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(COMPLETE):
        pytest.fail("nothing is accepted")


async def answered(gateway: Gateway, parts: Sequence[bytes], *, key: bytes = b"ada", length: int = 1_000) -> list[int]:
    """The status of what is asked in these parts, behind which nothing comes."""
    statuses: list[int] = []
    coming = iter(parts)

    async def receive() -> Message:
        if (part := next(coming, None)) is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"authorization", b"Bearer " + key), (b"content-length", str(length).encode())]
    await gateway.app(scope(COMPLETE, headers), receive, send)
    return statuses


@pytest.mark.parametrize("parts", [[], [b"{"], [b" " * 900]])
def test_a_body_that_does_not_come_is_not_waited_for(parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.05)
    gateway = Gateway()
    assert asyncio.run(asyncio.wait_for(answered(gateway, parts), 30)) == [408]
    assert gateway.counted(COMPLETE) == {"408": 1}


def test_a_slow_body_has_time_by_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.05)

    async def run(rate: int) -> str:
        monkeypatch.setattr(edge, "BODY_RATE", rate)
        sent: list[Message] = []
        parts = iter([b'{"prompt": "', b"a" * 1_000, b'"}'])

        async def receive() -> Message:
            part = next(parts)
            if part == b'"}':
                await asyncio.sleep(0.2)
            return {"type": "http.request", "body": part, "more_body": part != b'"}'}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), RAW_KEY, (b"content-length", b"1014")]
        await Gateway().app(scope(COMPLETE, headers), receive, send)
        return f"{sent[0]['status']}"

    assert asyncio.run(run(100)) == "200"
    assert asyncio.run(run(1 << 20)) == "408"


def test_a_tenant_sends_so_many_bodies_at_once_and_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "COMING_BODIES", 2)

    async def run() -> None:
        gateway = Gateway()
        first, second = (asyncio.ensure_future(answered(gateway, [b"{"])) for _ in range(2))
        await asyncio.sleep(0.05)
        assert await answered(gateway, []) == [503]
        assert (await asyncio.to_thread(gateway.client.get, "/v1/models")).status_code == 200
        other = asyncio.ensure_future(answered(gateway, [], key=b"bob"))
        await asyncio.sleep(0.05)
        assert not other.done()
        first.cancel()
        await asyncio.sleep(0.05)
        third = asyncio.ensure_future(answered(gateway, [b"{"]))
        await asyncio.sleep(0.05)
        assert not third.done()
        for task in (second, third, other):
            task.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(run())


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
    told = gateway.metrics.text().decode()
    assert "/v1/completions" in told
    assert "secret" not in told
    assert "some" not in told


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

        headers = [(b"content-type", b"application/json"), RAW_KEY]
        task = asyncio.ensure_future(gateway.app(scope(COMPLETE, headers), receive, send))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return gateway.counted(COMPLETE)

    assert asyncio.run(run()) == {"499": 1}
