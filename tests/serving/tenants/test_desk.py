"""The desk as gateways use it: two of them in this process, each with its own way to one actor."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import ray

from serving.errors import LimitError, OverloadedError, UsageError
from serving.lifeline import NAMESPACE
from serving.tenants.admission import LEASE_SECONDS
from serving.tenants.caller import Caller, Limits
from serving.tenants.desk import SETTLE_SECONDS, Desk, end_clerk, find_clerk
from serving.tenants.tickets import USUAL_BOUNDS, Capacity, Demand, Ticket, Used

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
NONE = Limits()
ONE = Capacity(1, 1_000)
TWO = Capacity(2, 1_000)


def demand(tenant: str = "acme", limits: Limits = NONE, *, patience: float = 30.0, output: int = 10) -> Demand:
    return Demand(Caller(tenant, "ana", limits=limits), 10, output, patience=patience)


@asynccontextmanager
async def desks(count: int, capacity: Capacity) -> AsyncIterator[list[Desk]]:
    """Gateways of one application; what they forgot to close is closed."""
    app = f"test-{uuid.uuid4().hex[:8]}"
    opened = [Desk(app, capacity) for _ in range(count)]
    try:
        yield opened
    finally:
        for desk in opened:
            await desk.close()
        end_clerk(app)


async def waits(task: "asyncio.Task[Ticket]", seconds: float = 0.7) -> bool:
    """Whether nothing has come of it after some seconds."""
    done, _ = await asyncio.wait([task], timeout=seconds)
    return not done


async def serves(desk: Desk, requests: int) -> bool:
    """Whether so many are served within some seconds, by what the gateway is told."""
    for _ in range(200):
        if desk.serving == requests:
            return True
        await asyncio.sleep(0.05)
    return False


def test_a_request_waits_for_room_and_gets_it_when_another_gateway_gives_it_back() -> None:
    async def main() -> None:
        async with desks(2, ONE) as (desk, other):
            first = await desk.admit(demand())
            second = asyncio.create_task(other.admit(demand()))
            assert await waits(second)
            started = time.monotonic()
            desk.charge(first, 5)
            desk.leave(first, Used(10, 5))
            other.leave(await second)
            assert time.monotonic() - started < 1

    asyncio.run(main())


def test_a_large_request_waits_for_nothing_but_its_portions_do_and_its_limits_hold_across_gateways() -> None:
    async def main() -> None:
        async with desks(2, Capacity(0, 0)) as (desk, other):
            unknown = desk.share
            assert unknown is None
            desk.resize(Capacity(4, 1_000))
            assert desk.share == Capacity(1, 250)
            desk.resize(Capacity(0, 0))
            assert desk.share == Capacity(1, 250), "of the engines that were there last"
            large = replace(demand(limits=Limits(concurrency=1)), runs=False)
            whole = await desk.admit(large)
            waiting = asyncio.create_task(desk.admit(replace(demand(), claims=False)))
            assert await waits(waiting)
            with pytest.raises(LimitError, match="1 requests at once"):
                await other.admit(large)
            desk.resize(Capacity(4, 1_000))
            desk.leave(await waiting, Used(10, 5))
            desk.leave(whole, Used(10, 5))
            assert await serves(desk, 0)
            other.leave(await other.admit(large))

    asyncio.run(main())


def test_limits_hold_across_gateways() -> None:
    async def main() -> None:
        async with desks(2, TWO) as (desk, other):
            limits = Limits(tokens_per_minute=100, concurrency=1)
            ticket = await desk.admit(demand(limits=limits))
            with pytest.raises(LimitError, match="1 requests at once"):
                await other.admit(demand(limits=limits))
            with pytest.raises(UsageError, match="1,010 tokens"):
                await other.admit(demand(limits=limits, output=1_000))
            desk.leave(ticket, Used(10, 2))
            await asyncio.sleep(0.5)
            admitted = await other.admit(demand(limits=limits))
            assert admitted.standing.tokens
            assert 68 <= admitted.standing.tokens.remaining <= 80
            standing = await desk.standing(admitted.demand.caller)
            assert standing.tokens
            assert standing.tokens.limit == 100

    asyncio.run(main())


def test_who_waits_beyond_his_patience_is_refused() -> None:
    async def main() -> None:
        async with desks(1, ONE) as (desk,):
            await desk.admit(demand())
            started = time.monotonic()
            with pytest.raises(OverloadedError, match="the request waited for"):
                await desk.admit(demand(patience=0.5))
            assert 0.5 <= time.monotonic() - started < 20

    asyncio.run(main())


def test_a_cancelled_wait_leaves_the_queue() -> None:
    async def main() -> None:
        async with desks(1, ONE) as (desk,):
            first = await desk.admit(demand("other"))
            limited = demand(limits=Limits(concurrency=1))
            given_up = asyncio.create_task(desk.admit(limited))
            assert await waits(given_up)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            await asyncio.sleep(0.5)
            next_one = asyncio.create_task(desk.admit(limited))
            assert await waits(next_one), "the first is still served, and the one given up holds no limit"
            desk.leave(first)
            desk.leave(await next_one)
            assert await serves(desk, 0)

    asyncio.run(main())


def test_engines_that_come_are_used_at_once() -> None:
    async def main() -> None:
        async with desks(1, Capacity(0, 0)) as (desk,):
            waiting = asyncio.create_task(desk.admit(demand()))
            assert await waits(waiting, SETTLE_SECONDS + 1)
            desk.resize(ONE)
            assert not await waits(waiting, 20)
            assert await serves(desk, 1)

    asyncio.run(main())


def test_what_a_dead_gateway_held_is_given_back() -> None:
    async def main() -> None:
        async with desks(2, ONE) as (dead, alive):
            await dead.admit(demand())
            dead._reports.cancel()
            started = time.monotonic()
            alive.leave(await alive.admit(demand(patience=3 * LEASE_SECONDS)))
            assert LEASE_SECONDS - 3 < time.monotonic() - started < LEASE_SECONDS + 5

    asyncio.run(main())


@pytest.mark.parametrize("for_good", [False, True])
def test_a_lost_actor_is_made_again_and_learns_what_runs(for_good: bool) -> None:
    async def main() -> None:
        async with desks(2, TWO) as (desk, other):
            limited = demand(limits=Limits(concurrency=2))
            first, second = await desk.admit(limited), await other.admit(demand("other"))
            third = asyncio.create_task(other.admit(limited))
            assert await waits(third)
            ray.kill(desk._clerk, no_restart=for_good)
            assert await waits(third, 10), "both that were served still are"
            with pytest.raises(LimitError):
                await desk.admit(limited)
            desk.leave(first, Used(10, 10))
            other.leave(await third)
            other.leave(second)
            assert await serves(desk, 0)

    asyncio.run(main())


class Gateway:
    """A gateway in a process of its own, with one request that runs."""

    async def open(self, app: str) -> None:
        self._desk = Desk(app, TWO)
        await self._desk.admit(demand(limits=Limits(requests_per_minute=2)))


def test_the_actor_outlives_the_gateway_that_made_it_and_remembers_what_was_used() -> None:
    app = f"test-{uuid.uuid4().hex[:8]}"
    gateway = ray.remote(Gateway).options(num_cpus=0).remote()
    ray.get(gateway.open.remote(app), timeout=60)
    made = ray.get_actor(f"{app}-desk", NAMESPACE)
    ray.kill(gateway)

    async def main() -> None:
        desk = Desk(app, TWO)
        wanted = demand(limits=Limits(requests_per_minute=2))
        desk.leave(await desk.admit(wanted))
        with pytest.raises(LimitError, match="2 requests a minute"):
            await desk.admit(wanted)
        await desk.close()

    asyncio.run(main())
    assert ray.get_actor(f"{app}-desk", NAMESPACE) == made
    end_clerk(app)


def test_an_actor_to_which_nobody_reports_ends_and_is_made_again_when_somebody_does() -> None:
    app = f"test-{uuid.uuid4().hex[:8]}"
    find_clerk(app, USUAL_BOUNDS, SETTLE_SECONDS + 1)

    def is_there() -> bool:
        try:
            ray.get_actor(f"{app}-desk", NAMESPACE)
        except ValueError:
            return False
        return True

    async def main() -> None:
        desk = Desk(app, ONE)
        desk.leave(await desk.admit(demand()))
        await asyncio.sleep(SETTLE_SECONDS + 2)
        assert is_there(), "a gateway reports to it"
        await desk.close()
        for _ in range(300):
            if not is_there():
                break
            await asyncio.sleep(0.1)
        assert not is_there()
        again = Desk(app, ONE)
        again.leave(await again.admit(demand()))
        await again.close()

    asyncio.run(main())
    end_clerk(app)


def test_many_requests_are_all_admitted_and_nothing_is_left() -> None:
    async def main() -> None:
        async with desks(2, Capacity(8, 1_000)) as opened:

            async def serve(number: int) -> None:
                desk = opened[number % 2]
                ticket = await desk.admit(demand())
                for made in range(1, 4):
                    await asyncio.sleep(0.001)
                    desk.charge(ticket, made)
                desk.leave(ticket, Used(10, 3))

            await asyncio.gather(*(serve(number) for number in range(150)))
            assert await serves(opened[0], 0)
            assert await serves(opened[1], 0)

    asyncio.run(main())
