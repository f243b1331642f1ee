import json
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from starlette.testclient import TestClient

from serving.api.replies import MEANINGS, install, problem_of
from serving.errors import (
    AuthenticationError,
    ConfigError,
    DatabaseAwayError,
    EngineDeadError,
    EngineError,
    ForbiddenError,
    LimitError,
    OverloadedError,
    PromptTooLongError,
    ResourceError,
    SpanfillError,
    StorageError,
)
from tests.serving.api.scripted import Scripted, app_of, client_of


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (ConfigError("Wrong.", remedy="Mend it."), 400, "invalid_request_error", "bad_config"),
        (AuthenticationError("Wrong.", remedy="Mend it."), 401, "authentication_error", "invalid_api_key"),
        (ForbiddenError("Wrong.", remedy="Mend it."), 403, "permission_error", "forbidden"),
        (LimitError("Wrong.", remedy="Mend it."), 429, "rate_limit_error", "rate_limit_exceeded"),
        (OverloadedError("Wrong.", remedy="Mend it."), 503, "server_error", "overloaded"),
        (EngineError("Wrong.", remedy="Mend it."), 500, "server_error", "engine_error"),
        (EngineDeadError("Wrong.", remedy="Mend it."), 503, "server_error", "engine_dead"),
        (ResourceError("Wrong.", remedy="Mend it."), 503, "server_error", "no_resources"),
        (PromptTooLongError("Wrong.", remedy="Mend it."), 400, "invalid_request_error", "prompt_too_long"),
    ],
)
def test_every_error_has_its_status_type_and_code(error: SpanfillError, status: int, kind: str, code: str) -> None:
    answer = client_of(Scripted(refuse=error)).post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"error": {"message": "Wrong. Mend it.", "type": kind, "param": None, "code": code}}
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_where_the_server_keeps_what_it_stores_is_not_told() -> None:
    for error, status, told in (
        (DatabaseAwayError("postgresql://spanfill@10.0.0.7 is silent."), 503, "The server's database does not answer."),
        (StorageError("/srv/files/x cannot be written."), 500, "The server's storage fails."),
    ):
        answer = client_of(Scripted(refuse=error)).post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == status
        assert answer.json()["error"] == {
            "message": f"{told} Try again in a few seconds.",
            "type": "server_error",
            "param": None,
            "code": error.code,
        }
        assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/completions", {"message", "type", "param", "code"}),
        ("/v1/fim/completions", {"message", "type", "param", "code"}),
        ("/infill", {"code", "message", "type"}),
    ],
)
def test_an_error_that_nobody_expected_tells_nothing_of_itself(path: str, error: set[str]) -> None:
    service = Scripted(refuse=RuntimeError("secret"))
    sent = {"prompt": "a", "input_prefix": "a", "input_suffix": "b"}
    answer = client_of(service).post(path, json=sent)
    assert answer.status_code == 500
    assert answer.json()["error"].keys() == error
    assert "secret" not in answer.text


def test_an_unknown_path_and_method_are_told_in_the_paths_shape() -> None:
    client = client_of(Scripted())
    missing = client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert missing.json()["error"]["message"] == "Not Found. GET /openapi.json lists the paths."
    assert isinstance(client.get("/api/nothing").json()["error"], str)
    wrong = client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    wrong = client.get("/infill")
    assert wrong.json()["error"]["code"] == 405


def test_headers_of_an_http_error_are_kept() -> None:
    problem = problem_of(HTTPException(413, "Too large.", headers={"Connection": "close"}))
    assert (problem.status, problem.headers) == (413, {"Connection": "close"})
    assert problem.message == "Too large. Send less at a time."


def test_a_message_that_is_no_unicode_can_be_told() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    async def fail() -> None:
        raise ConfigError("half \ud800", remedy="of a pair")

    answer = TestClient(app).get("/")
    assert answer.status_code == 400
    assert answer.text.isascii()


def test_text_of_a_wrong_field_is_not_repeated() -> None:
    answer = client_of(Scripted()).post("/v1/completions", json={"prompt": "a", "n": "my secret", "stop": ["x"] * 99})
    assert "my secret" not in answer.text


LIMITS = {f"x-ratelimit-{part}-{of}" for part in ("limit", "remaining", "reset") for of in ("requests", "tokens")}
LIMITS |= {"x-ratelimit-limit-concurrency", "x-ratelimit-remaining-concurrency"}


def described() -> dict[str, Any]:
    description: dict[str, Any] = app_of(Scripted()).openapi()
    return description


def test_openapi_knows_every_path() -> None:
    assert described()["paths"].keys() == {
        "/v1/completions",
        "/beta/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/fim/completions",
        "/infill",
        "/api/generate",
        "/api/tags",
        "/api/show",
        "/api/version",
    }


def test_openapi_describes_every_status_but_422_which_never_comes() -> None:
    description = described()
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            statuses = operation["responses"].keys()
            assert "422" not in statuses
            assert {"200", "401", "403", "429", "500", "503"} <= statuses, path
            assert ("400" in statuses) == (method == "post" or path == "/v1/models/{name}")
            assert ("501" in statuses) == (path == "/infill")
            assert all(each["description"] for each in operation["responses"].values())
            assert operation["description"], path
            assert operation["tags"]
    assert "HTTPValidationError" not in json.dumps(description)
    assert description == app_of(Scripted()).openapi()


@pytest.mark.parametrize(
    ("path", "streamed", "error"),
    [
        ("/v1/completions", "text/event-stream", "ErrorReply"),
        ("/v1/fim/completions", "text/event-stream", "ErrorReply"),
        ("/infill", "text/event-stream", "LlamaCppErrorReply"),
        ("/api/generate", "application/x-ndjson", "OllamaErrorReply"),
    ],
)
def test_openapi_describes_both_kinds_of_answer_and_the_errors_shape(path: str, streamed: str, error: str) -> None:
    responses = described()["paths"][path]["post"]["responses"]
    assert responses["200"]["content"].keys() == {"application/json", streamed}
    assert responses["429"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{error}")
    assert responses["429"]["headers"].keys() == {"Retry-After", "retry-after-ms", *LIMITS}
    assert responses["200"]["headers"].keys() == LIMITS


def test_openapi_tells_the_bounds_of_fields() -> None:
    fields = described()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"type": "integer", "maximum": 128, "minimum": 1} in fields["n"]["anyOf"]
    assert {"type": "number", "maximum": 2.0, "minimum": 0.0} in fields["temperature"]["anyOf"]


def test_every_status_that_is_documented_has_a_meaning() -> None:
    assert set(MEANINGS) == {400, 401, 403, 404, 408, 413, 416, 429, 500, 501, 503}
