"""The whole application: what it describes of itself, and that it does nothing else, whatever is sent."""

from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from serving.api.application import application
from serving.api.door import Door
from serving.errors import AuthenticationError
from serving.tenants.caller import Caller
from tests.serving.api.house import House

KEY = {"Authorization": "Bearer right"}
OPERATION = ("/health",)


async def find(key: str) -> Caller:
    """Two keys are known, one of an admin."""
    if key not in ("right", "admin"):
        raise AuthenticationError("the key is not valid.", remedy="Send another.")
    return Caller("acme", "k1", role="admin" if key == "admin" else "user")


def app_of(*, healthy: bool = True) -> FastAPI:
    """The application on an instant engine."""
    house = House()
    return application(house.service, Door(find), house.metrics, is_healthy=lambda: healthy)


schema = schemathesis.openapi.from_asgi("/openapi.json", app_of())


@schema.parametrize()
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_request_is_answered_otherwise_than_described(case: "schemathesis.Case[Any]") -> None:
    """Valid data may be refused: that a text fits its context no schema can say."""
    case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance])


def test_health_says_whether_an_engine_answers() -> None:
    for healthy, status, word in ((True, 200, "ok"), (False, 503, "loading model")):
        answer = TestClient(app_of(healthy=healthy)).get("/health")
        assert (answer.status_code, answer.json()) == (status, {"status": word})
        assert ("retry-after" in answer.headers) == (status == 503)


def test_a_text_behind_the_gap_that_is_too_long_is_named_with_what_there_is_room_for() -> None:
    """Not the tokens of the answer, of which few were asked for; what fits is not refused."""
    client = TestClient(app_of())
    for words, status in ((100, 200), (1_000, 400)):
        sent = {"input_prefix": "a", "input_suffix": "b", "prompt": " x" * words, "n_predict": 2}
        answer = client.post("/infill", json=sent, headers=KEY)
        assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith(
        "prompt: its 1,000 tokens stand behind the gap, where a context of 256 tokens has room for "
    )
    assert "beside 2 of the answer" in message
    assert "max_tokens" not in message


def test_metrics_are_prometheus_and_for_admins() -> None:
    client = TestClient(app_of())
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers=KEY)
    assert client.get("/metrics", headers=KEY).status_code == 403
    answer = client.get("/metrics", headers={"Authorization": "Bearer admin"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'spanfill_requests_total{gateway="one",route="/v1/completions",status="200"} 1.0' in answer.text
    assert 'spanfill_tokens_total{gateway="one",kind="prompt"} 1.0' in answer.text


def test_every_route_but_the_operators_asks_for_a_key_and_says_so() -> None:
    app = app_of()
    description, client = app.openapi(), TestClient(app)
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert bool(operation.get("security")) == (path not in OPERATION), path
            if path not in OPERATION:
                body = {"model": "demo", "prompt": "a", "input_prefix": "", "input_suffix": ""}
                answer = client.request(method, path, json=body if method == "post" else None)
                assert answer.status_code == 401, path


def test_every_error_of_the_description_has_its_shape() -> None:
    for path, operations in app_of().openapi()["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert response["description"]
                if int(status) >= 400:
                    (content,) = response["content"].values()
                    assert "$ref" in content["schema"], (path, status)
