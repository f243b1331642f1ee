"""A client that goes away frees its engine's slot within a second, through HTTP and Serve, of a simulated engine.

The same of a real one is in ``api/test_tenants.py``.
"""

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.server import Server, running_server

pytestmark = pytest.mark.engine
BODY = {"prompt": "x = ", "max_tokens": 900, "ignore_eos": True, "n": 4, "temperature": 1.0}
LOOK_SECONDS = 2.0
"""How often the gateway reads the engines."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine takes 4 ms a token."""
    arguments = ("--engine", "simulated", "--model", "demo-codegen25")
    with running_server(tmp_path_factory.mktemp("away"), *arguments) as server:
        httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 4}, timeout=60).raise_for_status()
        yield server


def reading(server: Server, name: str) -> float:
    """One of the engines' figures, read after now."""
    time.sleep(2 * LOOK_SECONDS + 0.5)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith(f'spanfill_engine{{reading="{name}"}}')]
    return float(found.split()[-1])


@pytest.mark.parametrize("streams", [True, False])
def test_whoever_goes_away_frees_the_engine_within_a_second(server: Server, streams: bool) -> None:
    whole = time.monotonic()
    httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=120).raise_for_status()
    whole = time.monotonic() - whole
    before, began = reading(server, "busy_seconds"), time.monotonic()
    if streams:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=whole / 8)
    stayed = time.monotonic() - began
    worked = reading(server, "busy_seconds") - before
    assert worked < stayed + 1.0
    assert reading(server, "running") == 0
    assert stayed < whole / 2
