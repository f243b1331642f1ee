"""Errors as clients read them: what is wrong and what to do, in the words of the path's dialect.

OpenAI's shape is everybody's but llama.cpp's and Ollama's, whose clients look for their own.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serving.api.events import encoded, event
from serving.api.parts import LIMIT_HEADERS
from serving.errors import AuthenticationError, DatabaseAwayError, LimitError, SpanfillError, StorageError

logger = logging.getLogger(__name__)

UNAVAILABLE = 503
RETRY_SECONDS = 2.0
"""When to come again where nothing better is known: what is lost is seldom back sooner."""

MOST_TOLD = 3
"""Wrong fields named in one message."""

MEANINGS = {
    400: "A field is wrong, or what is asked cannot be done.",
    401: "There is no key, or it is unknown, revoked or expired.",
    403: "The key may not do this.",
    404: "There is nothing of that name for this key.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    416: "The file has no such range.",
    429: "A limit of the tenant or the key is reached.",
    500: "The engine or the server failed.",
    501: "The model cannot infill.",
    503: "Too many requests wait, or no engine is ready.",
}
POSTED = (400, 401, 403, 404, 408, 413, 429, 500, 503)
READ = (401, 403, 404, 429, 500, 503)
WAITS = {
    "Retry-After": {"description": "Whole seconds to wait.", "schema": {"type": "integer"}},
    "retry-after-ms": {"description": "Milliseconds to wait.", "schema": {"type": "integer"}},
}

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LLAMACPP_TYPES = {404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}

HTTP_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    416: "no_such_range",
}
HTTP_REMEDIES = {
    400: "Send one JSON object in UTF-8.",
    404: "GET /openapi.json lists the paths.",
    405: "Use a method that the Allow header names.",
    408: "Send it all at once.",
    413: "Send less at a time.",
    416: "The Content-Range header tells the size.",
}
FIELD_REMEDY = "Correct it, or leave it out where it is optional."
BODY_REMEDY = "Send a JSON object, with the header Content-Type: application/json."


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong with a request, before a dialect words it; the message holds the remedy."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class ErrorDetail(BaseModel):
    """An error in OpenAI's shape; ``param`` is the field that is wrong, where it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class LlamaCppErrorDetail(BaseModel):
    """An error in llama.cpp's shape; ``code`` is the status."""

    code: int
    message: str
    type: str


class LlamaCppErrorReply(BaseModel):
    """An error in llama.cpp's shape."""

    error: LlamaCppErrorDetail


class OllamaErrorReply(BaseModel):
    """An error in Ollama's shape."""

    error: str


def problem_of(error: Exception) -> Problem:
    """What an error is to a client; one that is not known is not told of, nor where the server keeps what it stores."""
    if isinstance(error, StorageError):
        logger.warning("%s", error)
        what = "database does not answer" if isinstance(error, DatabaseAwayError) else "storage fails"
        message = f"The server's {what}. Try again in a few seconds."
        return Problem(error.http_status, message, error.code, headers=_headers(error))
    if isinstance(error, SpanfillError):
        return Problem(error.http_status, str(error), error.code, headers=_headers(error))
    if isinstance(error, RequestValidationError):
        return _wrong_fields(error.errors())
    if isinstance(error, HTTPException):
        return _refused(error)
    return Problem(500, "The server failed unexpectedly. Try again; its log tells more.", "internal")


def _headers(error: SpanfillError) -> dict[str, str]:
    if isinstance(error, LimitError):
        return wait_headers(error.retry_after)
    if error.http_status == UNAVAILABLE:
        return wait_headers()
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, AuthenticationError) else {}


def wait_headers(seconds: float = RETRY_SECONDS) -> dict[str, str]:
    """When to come again; every 503 says so."""
    wait = max(0.0, seconds)
    return {"Retry-After": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(1_000 * wait))}


def _refused(error: HTTPException) -> Problem:
    message = f"{str(error.detail).rstrip('.')}. {HTTP_REMEDIES.get(error.status_code, '')}".strip()
    code = HTTP_CODES.get(error.status_code, "refused")
    return Problem(error.status_code, message, code, headers=error.headers or {})


def _wrong_fields(errors: Sequence[Mapping[str, Any]]) -> Problem:
    first = errors[0]
    if first["type"] == "json_invalid":
        place = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return Problem(400, f"The body is not JSON: {place}. {HTTP_REMEDIES[400]}", "bad_json")
    path = _path(first["loc"])
    sentences = [f"{_path(error['loc']) or 'body'}: {_decapitalised(error['msg'])}." for error in errors[:MOST_TOLD]]
    remedy = "Send it." if first["type"] == "missing" else FIELD_REMEDY if path else BODY_REMEDY
    return Problem(400, " ".join([*sentences, remedy]), "bad_field", path or None)


def _path(place: Sequence[str | int]) -> str:
    """``options.stop[2]`` of where pydantic found an error; the first step is ``body`` or ``path``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place[1:])
    return "".join(steps).removeprefix(".")


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]


def openai_error(problem: Problem) -> dict[str, Any]:
    """An ``ErrorReply``."""
    detail = {"message": problem.message, "type": _type(problem.status), "param": problem.param, "code": problem.code}
    return {"error": detail}


def llamacpp_error(problem: Problem) -> dict[str, Any]:
    """A ``LlamaCppErrorReply``."""
    kind = LLAMACPP_TYPES.get(problem.status) or _type(problem.status)
    return {"error": {"code": problem.status, "message": problem.message, "type": kind}}


def ollama_error(problem: Problem) -> dict[str, Any]:
    """An ``OllamaErrorReply``."""
    return {"error": problem.message}


def _type(status: int) -> str:
    return TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def apology(error: SpanfillError) -> str:
    """The event that tells of an error in the middle of a stream."""
    return event(openai_error(problem_of(error)))


def _wording(path: str) -> Callable[[Problem], dict[str, Any]]:
    if path.startswith("/api/"):
        return ollama_error
    return llamacpp_error if path == "/infill" else openai_error


def reply(request: Request, error: Exception) -> Response:
    """The answer that an error is, in the shape that the path's clients read."""
    problem = problem_of(error)
    body = encoded(_wording(request.url.path)(problem))
    return Response(body, problem.status, dict(problem.headers), media_type="application/json")


async def _handle(request: Request, error: Exception) -> Response:
    return reply(request, error)


def documented(*statuses: int, model: type[BaseModel] = ErrorReply) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the errors that a route may answer with."""
    waits = {429: {"headers": WAITS | LIMIT_HEADERS}, 503: {"headers": WAITS | LIMIT_HEADERS}}
    return {status: {"model": model, "description": MEANINGS[status], **waits.get(status, {})} for status in statuses}


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` in a dialect's shape, and describe it so: a wrong field is 400 and never 422."""
    for kind in (SpanfillError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _handle)
    describe = app.openapi

    def described() -> dict[str, Any]:
        description = describe()
        for operations in description["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            description.get("components", {}).get("schemas", {}).pop(name, None)
        return description

    app.openapi = described  # type: ignore[method-assign]
