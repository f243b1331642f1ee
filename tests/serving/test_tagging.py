"""Jobs of several tenants in one engine, which is simulated and runs a few rows at a time."""

import asyncio
import itertools
from collections import Counter

import pytest

from serving.config import EngineConfig, RooflineConfig
from serving.protocol import INTERACTIVE_PRIORITY, Engine, MicroBatch, Request, Result, Sampling
from serving.simulated import SimulatedEngine
from serving.tagging import generate
from serving.tenants.tags import Tags

SHORT, LONG = 4, 40
PROMPT = 20
WINDOW = 32
"""Rows that each job has in the engine."""


def engine() -> SimulatedEngine:
    roofline = RooflineConfig(max_num_seqs=4, time_scale=1_000.0)
    return SimulatedEngine(EngineConfig(kind="simulated", model="demo", max_model_len=2_048, roofline=roofline))


def batch(tenant: str, *, tokens: int, weight: float = 1.0, priority: int | None = None) -> MicroBatch:
    """A micro-batch of no requests yet, each of which makes so many tokens."""
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    made = MicroBatch((), sampling, cache_salt=f"tenant:{tenant}", weight=weight)
    return made if priority is None else MicroBatch((), sampling, priority, f"tenant:{tenant}")


async def shares(*jobs: MicroBatch, service: int) -> Counter[str]:
    """The service that each tenant has had when it is so much in all; each job always has rows that wait."""
    tags, made, numbers = Tags(), Counter[str](), itertools.count(10)
    simulated = engine()

    async def job(of: MicroBatch) -> None:
        while made.total() < service:
            result = await generate(simulated, tags, of, Request(0, [next(numbers)] * PROMPT))
            if made.total() < service:
                made[str(of.cache_salt)] += PROMPT + 2 * sum(len(c.token_ids) for c in result.completions)

    await asyncio.gather(*(job(of) for of in jobs for _ in range(WINDOW)))
    await simulated.shutdown()
    return made


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_are_served_by_weight_whatever_their_rows_are_like(weight: float) -> None:
    jobs = batch("a", tokens=SHORT, weight=weight), batch("b", tokens=LONG)
    made = asyncio.run(shares(*jobs, service=60_000))
    assert made["tenant:a"] / made["tenant:b"] == pytest.approx(weight, rel=0.3)


def test_two_jobs_of_a_tenant_have_its_share_and_no_more() -> None:
    jobs = batch("a", tokens=SHORT), batch("a", tokens=SHORT), batch("b", tokens=SHORT)
    made = asyncio.run(shares(*jobs, service=60_000))
    assert made["tenant:a"] / made["tenant:b"] == pytest.approx(1, rel=0.3)


class Recording:
    """An engine that says what it was asked for, and can be told to fail."""

    def __init__(self) -> None:
        self.priorities: list[int] = []
        self.salts: list[str | None] = []
        self.fails = False

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int, cache_salt: str | None = None
    ) -> Result:
        self.priorities.append(priority)
        self.salts.append(cache_salt)
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("as it was told to")
        return Result(request.key)


def recorded(*asked: MicroBatch, tags: Tags, fails: bool = False) -> Recording:
    """What an engine is asked for by one request of each micro-batch, all at once."""
    recording = Recording()
    recording.fails = fails

    async def ask() -> None:
        of_engine: Engine = recording  # type: ignore[assignment]
        requests = [generate(of_engine, tags, of, Request(0, [1] * 50)) for of in asked]
        await asyncio.gather(*requests, return_exceptions=fails)

    asyncio.run(ask())
    return recording


def test_people_are_not_tagged() -> None:
    person = batch("a", tokens=10, priority=INTERACTIVE_PRIORITY)
    assert recorded(person, person, tags=Tags()).priorities == [INTERACTIVE_PRIORITY] * 2


def test_rows_that_fail_cost_their_tenant_nothing() -> None:
    tags = Tags()
    row = batch("a", tokens=10)
    failed = recorded(row, row, tags=tags, fails=True)
    assert recorded(row, row, tags=tags).priorities == failed.priorities
    assert set(failed.salts) == {"tenant:a"}
