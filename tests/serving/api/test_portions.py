"""Large requests: cut into portions, answered as ever, and no lock on the door for others."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.ask import Ask, Decoding
from serving.api.portions import portions_of
from serving.api.prompts import Rendered
from serving.errors import EngineError, OverloadedError, SpanfillError
from serving.protocol import Growth, MicroBatch
from serving.tenants.admission import Admission
from serving.tenants.caller import Caller, Limits
from serving.tenants.limits import Standing
from serving.tenants.tickets import Capacity, Demand, Place, Ticket, Used
from tests.serving.api.house import ACME, Desk, House, streamed

SAMPLED = Decoding(temperature=0.8)
ASKS = (
    Ask(prefix="x = 1\n", max_tokens=12, n=5, seed=3, decoding=SAMPLED),
    Ask(prefix="y = 2\n", max_tokens=9, n=2, seed=4, decoding=SAMPLED),
    Ask(prefix="z = 3\n", max_tokens=9, n=1, seed=5, decoding=SAMPLED),
)
SMALL = Capacity(2, 10_000)
ENGINES = Capacity(8, 4_000)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=6),
    share=st.builds(Capacity, st.integers(0, 8), st.integers(0, 90)),
)
def test_portions_are_all_samples_once_in_order_and_none_exceeds_its_share(
    sizes: list[tuple[int, int, int]], share: Capacity
) -> None:
    rendered = [Rendered(Ask(max_tokens=most, n=n), (1,) * length, truncated=False) for length, most, n in sizes]
    portions = portions_of(rendered, share)
    found = [(key, sample) for p in portions for key, samples in p.samples.items() for sample in samples]
    assert found == [(key, sample) for key, (_, most, n) in enumerate(sizes) for sample in range(n if most else 1)]
    for portion in portions:
        demand = portion.demand(rendered, ACME, 30.0)
        fits = demand.samples <= share.samples and demand.tokens <= share.tokens
        assert fits or demand.samples == 1
    assert len(portions_of(rendered, None)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"logprobs": 2},
        {"max_tokens": 0, "echo": True, "logprobs": 0},
        {"stop": ("e",)},
    ],
)
def test_an_answer_in_portions_is_the_answer(change: dict[str, object]) -> None:
    asks = [replace(ask, **change) for ask in ASKS]  # type: ignore[arg-type]

    async def run() -> None:
        expected = await House().service.answer(asks, ACME, "demo")
        house = House(desk=Desk(share=SMALL))
        answer = await house.service.answer(asks, ACME, "demo")
        assert answer.choices == expected.choices
        assert replace(answer.usage, cached_tokens=0) == replace(expected.usage, cached_tokens=0)
        texts, pieces, end = await streamed(House(desk=Desk(share=SMALL)), *asks)
        assert [texts[index] for index in sorted(texts)] == [choice.text for choice in expected.choices]
        reasons = {piece.index: piece.reason for piece in pieces if piece.reason}
        assert [reasons[index] for index in sorted(reasons)] == [choice.reason for choice in expected.choices]
        assert replace(end.usage, cached_tokens=0) == replace(expected.usage, cached_tokens=0)
        sizes = [2, 1] if change.get("max_tokens") == 0 else [2, 2, 2, 2]  # A prompt alone is one sample.
        assert len(house.batches) == len(sizes)
        whole, *portions = house.desk.demands
        assert (whole.runs, whole.claims, whole.samples) == (False, True, sum(sizes))
        assert [(each.runs, each.claims, each.samples) for each in portions] == [(True, False, size) for size in sizes]
        assert [usage for _, usage in house.used] == [answer.usage]
        assert house.desk.left[-1] == Used(answer.usage.prompt_tokens, answer.usage.completion_tokens)

    asyncio.run(run())


def test_what_fits_a_share_is_asked_for_at_once() -> None:
    house_desk = Desk(share=Capacity(8, 10_000))

    async def run() -> House:
        house = House(desk=house_desk)
        await house.service.answer(ASKS, ACME, "demo")
        return house

    assert len(asyncio.run(run()).batches) == 1
    (demand,) = house_desk.demands
    assert (demand.runs, demand.claims) == (True, True)


class Door(Desk):
    """A desk that goes by an ``Admission`` in this process."""

    def __init__(self) -> None:
        super().__init__(share=ENGINES.share)
        self.admission = Admission()
        self.admission.resize("here", ENGINES)
        self._issued = 0
        self._waiters: dict[Place, asyncio.Future[Ticket]] = {}

    async def admit(self, demand: Demand) -> Ticket:
        """As the desk."""
        self._issued += 1
        ticket = self.admission.ask(demand, Place("here", self._issued))
        if demand.runs:
            waiter = self._waiters[ticket.place] = asyncio.get_running_loop().create_future()
            self._decide()
            await waiter
        return ticket

    async def standing(self, caller: Caller) -> Standing:
        """As the desk."""
        return self.admission.standing(caller)

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """As the desk."""
        self.admission.charge(ticket.place, output_tokens)

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """As the desk."""
        self.admission.leave(ticket.place, used)
        self._decide()

    def _decide(self) -> None:
        for decision in self.admission.decide():
            waiter = self._waiters.pop(decision.ticket.place)
            if decision.refusal is None:
                waiter.set_result(decision.ticket)
            else:
                waiter.set_exception(decision.refusal)


HUGE = Ask(prefix="x = 1\n", max_tokens=100, n=32, decoding=SAMPLED)
LITTLE = Ask(prefix="y = 2\n", max_tokens=4)
OTHER = Caller("other", "k2")


@pytest.mark.parametrize("streams", [True, False])
def test_while_one_runs_what_is_larger_than_all_engines_others_are_answered(streams: bool) -> None:
    async def run() -> None:
        begun, goes_on = asyncio.Event(), asyncio.Event()

        async def stream(batch: MicroBatch) -> AsyncGenerator[list[Growth], None]:
            if len(batch.requests[0].seeds) > 1:
                begun.set()
                await goes_on.wait()
            for request in batch.requests:
                yield [Growth(request.key, i, [5], finish_reason="length") for i in range(len(request.seeds))]

        desk = Door()
        house = House(desk=desk, stream=stream)

        async def ask_for_much() -> int:
            if streams:
                return len((await streamed(house, *[HUGE] * 8))[0])
            return len((await house.service.answer([HUGE] * 8, ACME, "demo")).choices)

        huge = asyncio.ensure_future(ask_for_much())
        await asyncio.wait_for(begun.wait(), 30)
        for _ in range(3):
            answer = await asyncio.wait_for(house.service.answer([LITTLE], OTHER, "demo"), 10)
            assert answer.usage.completion_tokens == 1
        assert not huge.done()
        goes_on.set()
        assert await huge == 256
        assert (desk.admission.serving, desk.admission.waiting) == (0, 0)

    asyncio.run(run())


def test_a_large_request_is_held_to_its_limits_before_any_of_it_runs() -> None:
    async def run() -> None:
        house = House(desk=Door())
        caller = Caller("poor", "k3", limits=Limits(tokens_per_minute=1_000))
        with pytest.raises(SpanfillError, match="1,000 a minute"):
            await house.service.answer([HUGE], caller, "demo")
        assert not house.batches
        assert not house.used

    asyncio.run(run())


@pytest.mark.parametrize("error", [EngineError("broken"), OverloadedError("full"), asyncio.CancelledError()])
def test_when_a_later_portion_fails_those_before_it_are_paid_for(error: BaseException) -> None:
    async def run() -> None:
        calls: list[MicroBatch] = []

        async def stream(batch: MicroBatch) -> AsyncGenerator[list[Growth], None]:
            calls.append(batch)
            if len(calls) > 2:
                raise error
            for request in batch.requests:
                yield [Growth(request.key, i, [5, 6], finish_reason="length") for i in range(len(request.seeds))]

        house = House(desk=Desk(share=Capacity(1, 10_000)), stream=stream)
        with pytest.raises(SpanfillError):
            await house.service.answer([replace(LITTLE, prefix=f"{i}") for i in range(9)], ACME, "demo")
        ((_, usage),) = house.used
        assert usage.completion_tokens == 4
        prompts = [len(batch.requests[0].token_ids) for batch in calls[:3]]
        assert usage.prompt_tokens == sum(prompts)
        assert house.desk.left[-1] == Used(sum(prompts), 4)

    asyncio.run(run())
