"""Parts of answers that several dialects have."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from pydantic import BaseModel

from serving.api.ask import Reason, Usage
from serving.tenants.caller import Caller

WhoCalls = Callable[..., Caller | Awaitable[Caller]]
"""A FastAPI dependency that tells who calls; it raises ``AuthenticationError``."""

Finish = Literal["stop", "length"]

FINISH: dict[Reason, Finish] = {"eom": "stop", "eos": "stop", "stop": "stop", "length": "length", "time": "length"}
"""Reasons as OpenAI and those who follow it know them; the finer one is an answer's ``spanfill_reason``."""


LIMIT_HEADERS: dict[str, Any] = {
    f"x-ratelimit-{part}-{of}": {"description": f"{meaning} {of} a minute.", "schema": {"type": kind}}
    for of in ("requests", "tokens")
    for part, meaning, kind in (
        ("limit", "The closer one of the tenant's and the key's limits of", "integer"),
        ("remaining", "What is left now of", "integer"),
        ("reset", "How long until all is left, as `12ms`, `1.2s` or `1m0.5s`, of", "string"),
    )
} | {
    f"x-ratelimit-{part}-concurrency": {"description": f"{meaning} requests at once.", "schema": {"type": "integer"}}
    for part, meaning in (
        ("limit", "The closer one of the tenant's and the key's limits of"),
        ("remaining", "What is left now of"),
    )
}
"""What OpenAPI tells of the headers that say how a caller with limits stands."""


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class TokenUsage(BaseModel):
    """Tokens of a request, in OpenAI's shape; of a line of a batch nobody knows what was cached."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None


def token_usage(usage: Usage, *, knows_cached: bool = True) -> TokenUsage:
    """``usage`` as OpenAI tells it."""
    return TokenUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens) if knows_cached else None,
    )


def new_id(kind: str) -> str:
    """A name that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"
