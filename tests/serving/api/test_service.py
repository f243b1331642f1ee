"""The service on a simulated engine in this process: what is asked, admitted, written and metered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest

from serving.api.ask import Answer, Ask, Decoding, End, Piece, ServedModel, Usage
from serving.api.metrics import Metrics
from serving.api.service import Engines, FleetService
from serving.config import EngineConfig, RooflineConfig
from serving.errors import EngineError, LimitError, ModelNotFoundError, PromptTooLongError, UsageError
from serving.formats import load_format
from serving.merging import merged
from serving.protocol import INTERACTIVE_PRIORITY, Growth, MicroBatch, MicroBatchResult
from serving.simulated import SimulatedEngine
from serving.tenants.caller import Caller
from serving.tenants.limits import Standing
from serving.tenants.tickets import Demand, Place, Ticket, Used

FORMAT = load_format("codegen25")
MODEL = ServedModel("demo", "codegen25", 256, can_infill=True)
ACME = Caller("acme", "k1")
INFILL = Ask(prefix="def f():\n    return ", suffix="\n", max_tokens=20)
SAMPLED = Decoding(temperature=0.8)


@dataclass
class Desk:
    """Admits everybody, or nobody; remembers who left with what."""

    refuses: bool = False
    demands: list[Demand] = field(default_factory=list)
    left: list[Used | None] = field(default_factory=list)

    async def admit(self, demand: Demand) -> Ticket:
        """As the desk."""
        if self.refuses:
            raise LimitError("too many.", retry_after=2.0)
        self.demands.append(demand)
        return Ticket(Place("here", len(self.demands)), demand, Standing())

    async def standing(self, caller: Caller) -> Standing:
        """As the desk."""
        return Standing()

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """As the desk."""

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """As the desk."""
        self.left.append(used)


class House:
    """A service on one engine; make it inside an event loop."""

    def __init__(self, *, instant: bool = True, desk: Desk | None = None, **roofline: float) -> None:
        config = EngineConfig(
            kind="instant" if instant else "simulated",
            model="demo",
            max_model_len=MODEL.context,
            roofline=RooflineConfig(**roofline),  # type: ignore[arg-type]
        )
        self.engine = SimulatedEngine(config)
        self.batches: list[MicroBatch] = []
        self.used: list[tuple[str, Usage]] = []
        self.desk = desk or Desk()
        engines = Engines(MODEL, FORMAT, "codegen25", self._whole, self._stream)
        self.service = FleetService(engines, self.desk, self._meter, Metrics())

    def _meter(self, caller: Caller, model: str, usage: Usage) -> None:
        self.used.append((caller.tenant, usage))

    async def _whole(self, batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        self.batches.append(batch)
        results = [await self.engine.generate(r, batch.sampling, cache_salt=batch.cache_salt) for r in batch.requests]
        yield MicroBatchResult("here", tuple(results))

    async def _stream(self, batch: MicroBatch) -> AsyncIterator[list[Growth]]:
        self.batches.append(batch)
        sources = [self.engine.stream(r, batch.sampling, priority=batch.priority) for r in batch.requests]
        growths = merged(sources)
        try:
            async for growth in growths:
                yield [growth]
        finally:
            await growths.aclose()


def answered(*asks: Ask, house: House | None = None) -> Answer:
    """The answer to asks."""

    async def run() -> Answer:
        return await (house or House()).service.answer(asks, ACME, "demo")

    return asyncio.run(run())


async def streamed(house: House, *asks: Ask) -> tuple[dict[int, str], list[Piece], End]:
    """The texts, pieces and end of a stream."""
    texts: dict[int, str] = {}
    pieces: list[Piece] = []
    end = None
    async for item in house.service.stream(asks, ACME, "demo"):
        if isinstance(item, End):
            end = item
            continue
        pieces.append(item)
        texts[item.index] = texts.get(item.index, "") + item.text
    assert end is not None
    return texts, pieces, end


@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize(
    "ask",
    [
        INFILL,
        replace(INFILL, n=3, seed=7, decoding=SAMPLED),
        Ask(prefix="x = 1\n", max_tokens=20),
        Ask(token_ids=tuple(FORMAT.tokenizer.encode("y = 2\n")), max_tokens=20),
        replace(INFILL, behind="x + "),
        replace(INFILL, echo=True),
    ],
)
def test_a_stream_joins_to_the_answer(ask: Ask, instant: bool) -> None:
    async def run() -> None:
        fast = {} if instant else {"time_scale": 1_000.0}
        whole = await House(instant=instant, **fast).service.answer([ask, INFILL], ACME, "demo")
        texts, pieces, end = await streamed(House(instant=instant, **fast), ask, INFILL)
        assert [texts[index] for index in sorted(texts)] == [choice.text for choice in whole.choices]
        last = {piece.index: piece.reason for piece in pieces if piece.reason}
        assert [last[index] for index in sorted(last)] == [choice.reason for choice in whole.choices]
        assert len(whole.choices) == ask.n + 1
        assert replace(end.usage, cached_tokens=0) == replace(whole.usage, cached_tokens=0)
        assert end.prompts == whole.prompts

    asyncio.run(run())


def test_a_seed_gives_the_same_samples_again_and_none_gives_others() -> None:
    sampled = replace(INFILL, n=4, seed=1, decoding=SAMPLED)
    first = [choice.text for choice in answered(sampled).choices]
    assert [choice.text for choice in answered(sampled).choices] == first
    assert len(set(first)) > 1
    assert [choice.text for choice in answered(replace(sampled, seed=None)).choices] != first


def test_the_engine_is_asked_for_the_formats_prompt_with_the_tenants_salt_before_batch_rows() -> None:
    async def run() -> None:
        house = House()
        await house.service.answer([INFILL], ACME, "demo")
        (batch,) = house.batches
        prompt = FORMAT.prompt(INFILL.prefix, INFILL.suffix, max_tokens=20, max_context=256)
        assert list(batch.requests[0].token_ids) == list(prompt.token_ids)
        assert (batch.cache_salt, batch.priority) == (ACME.cache_salt, INTERACTIVE_PRIORITY)
        assert batch.sampling.stop_token_ids == FORMAT.stop_token_ids

    asyncio.run(run())


def test_what_is_used_is_demanded_before_and_metered_after() -> None:
    async def run() -> None:
        house = House()
        answer = await house.service.answer([INFILL, replace(INFILL, n=2, decoding=SAMPLED)], ACME, "demo")
        (demand,) = house.desk.demands
        assert demand.prompt_tokens == answer.usage.prompt_tokens
        assert (demand.output_tokens, demand.samples) == (60, 3)
        assert house.used == [("acme", answer.usage)]
        assert house.desk.left == [Used(answer.usage.prompt_tokens, answer.usage.completion_tokens)]
        assert 0 < answer.usage.completion_tokens <= 60

    asyncio.run(run())


def test_logprobs_are_told_with_alternatives_and_an_echo_has_the_prompts() -> None:
    ask = Ask(prefix="x = 1\n", max_tokens=5, logprobs=2, echo=True, decoding=Decoding(ignore_eos=True))
    (choice,) = answered(ask).choices
    assert choice.text.startswith("x = 1\n")
    assert "".join(token.text for token in choice.tokens) == choice.text
    assert choice.tokens[0].logprob is None
    assert all(token.logprob == -1.0 and len(token.top) == 2 for token in choice.tokens[1:])


def test_no_tokens_are_generated_where_none_are_wanted() -> None:
    answer = answered(Ask(prefix="x = 1\n", max_tokens=0, logprobs=0, echo=True))
    (choice,) = answer.choices
    assert (choice.text, choice.reason) == ("x = 1\n", "length")
    assert answer.usage.completion_tokens == 0


def test_texts_that_do_not_fit_are_cut_and_that_is_told() -> None:
    answer = answered(replace(INFILL, prefix="x = 1\n" * 400))
    assert answer.truncated
    assert answer.usage.prompt_tokens <= 256 - 20


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (Ask(token_ids=(1,) * 250, max_tokens=20), PromptTooLongError),
        (Ask(prefix="x = 1\n" * 400, echo=True), PromptTooLongError),
        (Ask(token_ids=(), max_tokens=20), UsageError),
        (Ask(token_ids=(60_000,), max_tokens=20), UsageError),
        (Ask(prefix="x", max_tokens=300), UsageError),
        (Ask(prefix="x", suffix="y", behind="z" * 3_000, max_tokens=20), UsageError),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_admitted(ask: Ask, error: type[Exception]) -> None:
    async def run() -> None:
        house = House()
        with pytest.raises(error):
            await house.service.answer([ask], ACME, "demo")
        assert not house.desk.demands

    asyncio.run(run())


def test_what_is_not_admitted_never_reaches_the_engine() -> None:
    async def run() -> None:
        house = House(desk=Desk(refuses=True))
        with pytest.raises(LimitError):
            await house.service.answer([INFILL], ACME, "demo")
        with pytest.raises(LimitError):
            await streamed(house, INFILL)
        assert not house.batches
        assert not house.used

    asyncio.run(run())


def test_whoever_goes_away_frees_the_engine_and_pays_for_what_was_made() -> None:
    async def run() -> None:
        house = House(instant=False)
        long = replace(INFILL, max_tokens=200, decoding=Decoding(ignore_eos=True))
        stream = house.service.stream([long], ACME, "demo")
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        assert house.engine.stats().running == 0
        assert len(house.desk.left) == 1
        ((_, usage),) = house.used
        assert 0 < usage.completion_tokens < 200

    asyncio.run(run())


def test_a_cancelled_answer_frees_the_engine() -> None:
    async def run() -> None:
        house = House(instant=False, time_scale=0.01)
        task = asyncio.ensure_future(house.service.answer([INFILL], ACME, "demo"))
        await asyncio.sleep(0.2)
        assert house.engine.stats().running + house.engine.stats().waiting == 1
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.5)
        assert len(house.desk.left) == 1

    asyncio.run(run())


def test_an_engines_refusal_is_an_error() -> None:
    async def run() -> None:
        house = House()
        house.engine._info = replace(house.engine.info, max_model_len=4)
        with pytest.raises(EngineError, match="leaves no room"):
            await house.service.answer([INFILL], ACME, "demo")
        with pytest.raises(EngineError, match="leaves no room"):
            await streamed(house, INFILL)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["other", "demo2"])
def test_another_model_is_not_found(name: str) -> None:
    async def run() -> None:
        with pytest.raises(ModelNotFoundError):
            House().service.model(name, ACME)

    asyncio.run(run())


def test_a_tenant_sees_only_its_models() -> None:
    async def run() -> None:
        service = House().service
        assert service.model(None, ACME).name == "demo"
        assert service.model("demo", replace(ACME, models=("demo",))).name == "demo"
        with pytest.raises(ModelNotFoundError):
            service.model("demo", replace(ACME, models=("other",)))

    asyncio.run(run())


def test_an_answer_is_cut_once_its_time_is_over_and_it_has_a_line() -> None:
    async def run() -> None:
        house = House(instant=False, time_scale=0.05)
        ask = replace(INFILL, max_tokens=200, seconds=0.05, decoding=Decoding(ignore_eos=True))
        answer = await house.service.answer([ask], ACME, "demo")
        (choice,) = answer.choices
        if choice.reason == "time":
            assert "\n" in choice.text
            assert answer.usage.completion_tokens < 200

    asyncio.run(run())
