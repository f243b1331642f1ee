"""Schemathesis: whatever the OpenAPI description lets a client send has an answer that it names, and none is a 5xx."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.api import Api

pytestmark = pytest.mark.engine
EXAMPLES = {schemathesis.GenerationMode.POSITIVE: 20, schemathesis.GenerationMode.NEGATIVE: 10}
"""Of each operation; the real engine answers them."""

MOST = {"max_tokens": 4, "min_tokens": 4, "n_predict": 4, "num_predict": 4, "n": 2, "best_of": 2}
"""Good numbers beyond these would keep the engine busy for minutes."""


LENGTHS = {
    "/v1/completions": "max_tokens",
    "/beta/completions": "max_tokens",
    "/v1/fim/completions": "max_tokens",
    "/infill": "n_predict",
    "/api/generate": "num_predict",
}
"""How each dialect says how long an answer may be."""


def bounded(value: Any) -> Any:
    """A body that asks for little."""
    if isinstance(value, list):
        return [bounded(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: bounded(item) for name, item in value.items()}
    for name, most in MOST.items():
        if type(found.get(name)) is int and most < found[name] < 1_000:
            found[name] = most
    return found


def asked(case: Any) -> Any:
    """A case that asks for little, and says how little where it would be the server's own choice."""
    case.body = bounded(case.body)
    if isinstance(case.body, dict) and case.operation.path in LENGTHS:
        place = case.body
        if case.operation.path == "/api/generate":
            place = case.body.setdefault("options", {})
        if isinstance(place, dict):
            place.setdefault(LENGTHS[case.operation.path], 4)
    return case


def try_out(api: Api, operation: Any, mode: schemathesis.GenerationMode) -> None:
    """Send cases of an operation; raises for an answer that is not described, or a 5xx."""

    @settings(
        max_examples=EXAMPLES[mode],
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def attempt(case: Any) -> None:
        response = asked(case).call(headers=api.headers(), timeout=120)
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

    attempt()


@pytest.mark.parametrize("mode", EXAMPLES)
def test_every_answer_is_one_that_the_description_names(api: Api, mode: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 20
    for operation in operations:
        if operation.body or mode is schemathesis.GenerationMode.POSITIVE:
            try_out(api, operation, mode)
