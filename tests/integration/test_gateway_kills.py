"""Two gateways with their tenants in PostgreSQL: killed, without the database, and with more to do than they can."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.api.service import METER_SECONDS
from tests.server import GATEWAY, Server, is_healthy, running_server
from tests.serving.tenants.postgres import Postgres, own_server

pytestmark = pytest.mark.engine

SLOW = ("--engine", "simulated", "--engine-arg", "max_num_seqs=8", "--gateways", "2")
SHORT: dict[str, Any] = {"prompt": "def f(x):", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with own_server() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:  # For the commands that make keys, too.
        patch.setenv("SPANFILL_DATABASE_URL", postgres.new_database())
        with running_server(tmp_path_factory.mktemp("gateways"), *SLOW) as found:
            yield found


def ask(server: Server, key: str, **body: Any) -> httpx.Response:
    """A request of a connection of its own, so that either gateway may get it."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=SHORT | body, headers=headers, timeout=60)


def kill_gateways(server: Server) -> None:
    """SIGKILL both, and wait until others answer."""
    found = server.called(GATEWAY)
    assert len(found) == 2
    for process in found:
        process.kill()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if is_healthy(server.url):
            return
        time.sleep(0.2)
    raise TimeoutError(server.told[-2_000:])


def used(server: Server, tenant: str, requests: int) -> Counter[str]:
    """What a tenant's usage adds up to, once so many requests are counted, or a while later."""
    deadline, sums = time.monotonic() + 30, Counter[str]()
    while sums["requests"] < requests and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = json.loads(server.command("tenants", "usage", "--tenant", tenant, "--json"))["usage"]
        sums = Counter()
        for line in lines:
            sums.update({name: line[name] for name in ("prompt_tokens", "completion_tokens", "requests")})
    return sums


def test_what_was_answered_is_metered_though_all_gateways_are_killed_at_once(server: Server) -> None:
    key = server.new_tenant("metered")
    told = Counter[str]()
    for turn in range(20):
        answer = ask(server, key, max_tokens=1 + turn)
        assert answer.status_code == 200, answer.text
        told.update({name: answer.json()["usage"][name] for name in ("prompt_tokens", "completion_tokens")})
    kill_gateways(server)
    assert used(server, "metered", 20) == told | Counter(requests=20)


def test_a_stream_is_metered_although_its_gateway_is_killed(server: Server) -> None:
    """But for what its last seconds brought."""
    key = server.new_tenant("streaming")
    body = SHORT | {"max_tokens": 1_000, "n": 16, "temperature": 1, "stream": True}  # Twice what runs at once.
    headers, asked, early, first = {"Authorization": f"Bearer {key}"}, time.monotonic(), 0, math.inf
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            now = time.monotonic()
            early += line.startswith("data:") and now < asked + METER_SECONDS
            first = min(first, now)
            if now > first + METER_SECONDS + 1:  # The gateway's seconds began between the two.
                break
        assert early
        kill_gateways(server)
    sums = used(server, "streaming", 1)
    assert sums["requests"] == 1
    assert sums["prompt_tokens"] > 0
    assert early <= sums["completion_tokens"] < 16_000


def test_a_limit_holds_though_all_gateways_are_killed(server: Server) -> None:
    key = server.new_tenant("limited", "--requests-per-minute", "30")
    began = time.monotonic()
    first = [ask(server, key).status_code for _ in range(40)]
    assert first.count(429) >= 40 - 30 - (time.monotonic() - began) / 2 - 1
    kill_gateways(server)
    statuses = first + [ask(server, key).status_code for _ in range(40)]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 30 + (time.monotonic() - began) / 2 + 1


def test_a_database_that_is_away_locks_nobody_out_who_was_in(server: Server, postgres: Postgres) -> None:
    key, stranger = server.new_tenant("inside"), server.new_tenant("outside")
    for _ in range(10):  # Both gateways are to know the key.
        assert ask(server, key).status_code == 200
    with postgres.away():
        ends = time.monotonic() + 15
        while time.monotonic() < ends:
            answer = ask(server, key)
            assert answer.status_code == 200, answer.text
        refused = ask(server, stranger)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_away")
    for known in (key, stranger):
        assert ask(server, known).status_code == 200


def test_tenants_who_want_more_than_there_is_are_served_by_their_weights(server: Server) -> None:
    keys = {"heavy": server.new_tenant("heavy", "--weight", "3"), "light": server.new_tenant("light")}

    async def main() -> Counter[str]:
        served = Counter[str]()
        begins, ends = time.monotonic() + 3, time.monotonic() + 18
        limits = httpx.Limits(max_connections=None)

        async def person(client: httpx.AsyncClient, tenant: str, tokens: int) -> None:
            body = SHORT | {"max_tokens": tokens}
            headers = {"Authorization": f"Bearer {keys[tenant]}"}
            while time.monotonic() < ends:
                answer = await client.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                if begins < time.monotonic() < ends:
                    served[tenant] += answer.json()["usage"]["completion_tokens"]

        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            people = [person(client, "heavy", 32) for _ in range(24)] + [person(client, "light", 64) for _ in range(24)]
            await asyncio.gather(*people)
        return served

    served = asyncio.run(main())
    assert served["heavy"] / served["light"] == pytest.approx(3, rel=0.25)
