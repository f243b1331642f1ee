"""Who calls, by the headers in which clients send their keys."""

from contextlib import closing
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from serving.api.door import OPEN_CALLER, Door
from serving.api.replies import install
from serving.errors import AuthenticationError
from serving.tenants.caller import Caller
from serving.tenants.store import open_store
from tests.serving.tenants.conftest import of_a_later_spanfill, sqlite_url

__all__ = ["sqlite_url"]


async def find(key: str) -> Caller:
    """One key is known."""
    if key != "right":
        raise AuthenticationError("the key is not valid.", remedy="Send another.")
    return Caller("acme", "k1")


def client_of(door: Door) -> TestClient:
    """An application that tells the caller's tenant."""
    app = FastAPI()
    install(app)

    @app.get("/")
    async def who(caller: Annotated[Caller, Depends(door)]) -> str:
        return caller.tenant

    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer right"},
        {"Authorization": "bearer  right "},
        {"X-API-Key": "right"},
        {"api-key": "right"},
        {"Authorization": "Basic abc", "x-api-key": "right"},
        {"Authorization": "Bearer right", "x-api-key": "wrong"},
        {"Authorization": "Bearer ", "x-api-key": "right"},
    ],
)
def test_a_key_may_come_in_several_headers(headers: dict[str, str]) -> None:
    assert client_of(Door(find)).get("/", headers=headers).json() == "acme"


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "no key was sent. Send Authorization: Bearer KEY."),
        ({"Authorization": "Bearer"}, "no key was sent."),
        ({"Authorization": "Basic right"}, "no key was sent."),
        ({"Authorization": "Bearer wrong"}, "the key is not valid."),
        ({"Authorization": "Bearer wrong", "x-api-key": "right"}, "the key is not valid."),
    ],
)
def test_without_a_valid_key_nobody_is_let_in(headers: dict[str, str], words: str) -> None:
    answer = client_of(Door(find)).get("/", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["message"].startswith(words)


def test_an_open_server_lets_anybody_in_with_whatever_key_until_there_is_a_tenant() -> None:
    tenants: list[str] = []
    client = client_of(Door(find, has_tenants=lambda: bool(tenants)))
    assert client.get("/").json() == OPEN_CALLER.tenant
    assert client.get("/", headers={"Authorization": "Bearer none"}).json() == OPEN_CALLER.tenant
    tenants.append("acme")
    assert client.get("/", headers={"Authorization": "Bearer none"}).status_code == 401
    assert client.get("/").status_code == 401
    assert client.get("/", headers={"Authorization": "Bearer right"}).json() == "acme"
    tenants.clear()
    assert client.get("/").status_code == 401, "closed is closed"


def test_an_open_server_whose_database_is_of_a_later_spanfill_asks_to_come_again(sqlite_url: str) -> None:
    with closing(open_store(sqlite_url)) as store:
        store.create_tenant("acme")
    with of_a_later_spanfill(sqlite_url), closing(open_store(sqlite_url)) as later:
        answer = client_of(Door(find, has_tenants=lambda: bool(later.tenants()))).get("/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_away")
    assert "Retry-After" in answer.headers
    assert "spanfill.db" not in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "vscode-webview://1c0ffee"}, 200),
        ({"Origin": "http://tauri.localhost"}, 200),
        ({"Host": "0.0.0.0:8000"}, 200),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "[evil"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_an_open_server_is_at_no_web_pages_service(headers: dict[str, str], status: int) -> None:
    answer = client_of(Door(find, has_tenants=lambda: False)).get("/", headers=headers)
    assert answer.status_code == status
    assert client_of(Door(find)).get("/", headers={"Authorization": "Bearer right", **headers}).status_code == 200


def test_openapi_knows_the_three_ways_to_send_a_key() -> None:
    description = client_of(Door(find)).get("/openapi.json").json()
    assert description["paths"]["/"]["get"]["security"] == [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
    schemes = description["components"]["securitySchemes"]
    assert schemes["bearer"] | {"description": ""} == {"type": "http", "scheme": "bearer", "description": ""}
    assert {schemes[name]["name"] for name in ("x-api-key", "api-key")} == {"x-api-key", "api-key"}
