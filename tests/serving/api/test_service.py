"""The service on a simulated engine in this process: what is asked, admitted, written and metered."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.exceptions import RequestCancelledError

from serving.api import service
from serving.api.ask import Ask, Decoding, End, Piece
from serving.api.calls import Call
from serving.api.checks import MOST_CHOICES, MOST_TEXT
from serving.api.edge import Noted, noted
from serving.api.prompts import Rendered
from serving.api.service import LARGE_CHARS
from serving.errors import (
    EngineDeadError,
    EngineError,
    LimitError,
    ModelNotFoundError,
    NoInfillError,
    OverloadedError,
    PromptTooLongError,
    UsageError,
)
from serving.formats import Format
from serving.protocol import INTERACTIVE_PRIORITY, Completion, Growth, MicroBatch, MicroBatchResult, Result
from serving.tenants.caller import Caller
from serving.tenants.tickets import Capacity, Used
from tests.serving.api.house import ACME, FORMAT, MODEL, NO_ROOM, ROOM, Desk, House, answered, streamed, telling

INFILL = Ask(prefix="def f():\n    return ", suffix="\n", max_tokens=20)
SAMPLED = Decoding(temperature=0.8)
PLAIN = Ask(prefix="x = 1\n", max_tokens=20)


def grows(text: str, *, end: bool = True) -> list[Growth]:
    """A text as it grows, a token at a time."""
    ids = FORMAT.tokenizer.encode(text)
    last = [Growth(0, 0, [], finish_reason="length", cached_tokens=2)] if end else []
    return [*(Growth(0, 0, [token_id]) for token_id in ids), *last]


@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize(
    "ask",
    [
        INFILL,
        replace(INFILL, n=3, seed=7, decoding=SAMPLED),
        Ask(prefix="x = 1\n", max_tokens=20),
        Ask(token_ids=tuple(FORMAT.tokenizer.encode("y = 2\n")), max_tokens=20),
        replace(INFILL, behind="x + "),
        replace(PLAIN, echo=True),
        replace(INFILL, reported=True, seconds=60.0),
    ],
)
def test_a_stream_joins_to_the_answer(ask: Ask, instant: bool) -> None:
    async def run() -> None:
        whole = await House(instant=instant, time_scale=1_000.0).service.answer([ask, INFILL], ACME, "demo")
        texts, pieces, end = await streamed(House(instant=instant, time_scale=1_000.0), ask, INFILL)
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
    assert all(token.logprob == -1.0 for token in choice.tokens[1:])
    # The engine's likeliest two, and the token itself where it is none of them.
    assert {len(token.top) for token in choice.tokens[1:]} <= {2, 3}
    assert all(token.text in dict(token.top) for token in choice.tokens[1:4])


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


def test_a_long_stream_is_metered_in_pieces_and_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "METER_SECONDS", 0.0)

    async def run() -> None:
        house = House(instant=False, time_scale=1_000.0)
        _, _, end = await streamed(house, INFILL)
        assert house.requests == [1] + [0] * (len(house.used) - 1)
        assert len(house.used) > 1
        assert all(usage.total_tokens for _, usage in house.used)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
            assert sum(getattr(usage, name) for _, usage in house.used) == getattr(end.usage, name)

    asyncio.run(run())


def test_whoever_goes_away_frees_the_engine_and_pays_for_what_was_made() -> None:
    async def run() -> None:
        house = House(instant=False)
        long = replace(INFILL, max_tokens=200, decoding=Decoding(ignore_eos=True))
        stream = house.service.stream([long], ACME, "demo")
        await anext(stream)
        await stream.aclose()
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


MADE = "a = 1\n"
MADE_COUNT = len(FORMAT.tokenizer.encode(MADE))


def then(*last: BaseException | None, made: asyncio.Event | None = None) -> Call[list[Growth]]:
    """A replica that makes ``MADE``, says so and then does this, call by call: None makes no more, for ever."""
    ends = iter(last)

    async def stream(batch: MicroBatch) -> AsyncGenerator[list[Growth], None]:
        end = next(ends)
        for growth in grows(MADE, end=False):
            yield [growth]
        if made is not None:
            made.set()
        if end is not None:
            raise end
        await asyncio.Event().wait()

    return stream


@pytest.mark.parametrize("cancelled_by_serve", [True, False])
def test_whoever_gives_up_an_answer_pays_for_what_was_made(cancelled_by_serve: bool) -> None:
    async def run() -> None:
        made = asyncio.Event()
        house = House(stream=then(RequestCancelledError() if cancelled_by_serve else None, made=made))
        task = asyncio.ensure_future(house.service.answer([INFILL], ACME, "demo"))
        await asyncio.wait_for(made.wait(), 10)
        if not cancelled_by_serve:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ((_, usage),) = house.used
        assert usage.completion_tokens == MADE_COUNT
        assert usage.prompt_tokens > 0
        assert house.desk.left == [Used(usage.prompt_tokens, MADE_COUNT)]

    asyncio.run(run())


def test_an_answer_that_loses_its_replica_is_made_by_another_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "WAIT_SECONDS", 0)

    async def run() -> None:
        calls: list[Call[list[Growth]]] = [then(EngineDeadError("gone")), telling(grows("b = 2\n"))]
        house = House(stream=lambda batch: calls.pop(0)(batch))
        (choice,) = (await house.service.answer([INFILL], ACME, "demo")).choices
        assert (choice.text, choice.reason) == ("b = 2\n", "length")
        ((_, usage),) = house.used
        assert usage.completion_tokens == len(FORMAT.tokenizer.encode("b = 2\n"))

    asyncio.run(run())


def test_an_answer_that_loses_every_replica_is_an_error_and_what_the_last_made_is_metered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "WAIT_SECONDS", 0)

    async def run() -> None:
        house = House(stream=then(*(EngineDeadError("gone") for _ in range(3))))
        with pytest.raises(EngineDeadError):
            await house.service.answer([INFILL], ACME, "demo")
        assert [usage.completion_tokens for _, usage in house.used] == [MADE_COUNT]

    asyncio.run(run())


def test_of_answers_that_come_whole_those_are_metered_that_came_before_one_failed() -> None:
    scored = Ask(prefix="x = 1\n", max_tokens=5, logprobs=0, echo=True)

    async def whole(batch: MicroBatch) -> AsyncGenerator[MicroBatchResult, None]:
        yield MicroBatchResult("here", (Result(0, (Completion([5, 6, 7], "length"),)),))
        raise EngineError("broken")

    async def run() -> None:
        house = House(whole=whole)
        with pytest.raises(EngineError, match="broken"):
            await house.service.answer([scored, scored], ACME, "demo")
        assert [usage.completion_tokens for _, usage in house.used] == [3]
        assert house.desk.charged == [3]

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


@pytest.mark.parametrize(
    ("seconds", "text", "reason"),
    [
        (1e-9, "a = 1\n", "time"),
        (3_600.0, "a = 1\nb = 2\nc", "length"),
        (None, "a = 1\nb = 2\nc", "length"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_is_cut_once_its_time_is_over_and_it_has_a_line(
    seconds: float | None, text: str, reason: str, whole: bool
) -> None:
    async def run() -> None:
        house = House(stream=telling(grows("a = 1\nb = 2\nc")))
        ask = replace(INFILL, seconds=seconds, reported=True)
        if whole:
            (choice,) = (await house.service.answer([ask], ACME, "demo")).choices
            assert (choice.text, choice.reason) == (text, reason)
        else:
            texts, pieces, _ = await streamed(house, ask)
            assert (texts, pieces[-1].reason) == ({0: text}, reason)
        ((_, usage),) = house.used
        assert usage.completion_tokens == len(FORMAT.tokenizer.encode(text))

    asyncio.run(run())


@pytest.mark.parametrize(("indent", "made"), [(0, "  a = 1\n  b = 2\nc = 3\nd"), (2, "  a = 1\n  b = 2\nc")])
def test_nothing_is_made_behind_the_block_that_an_answer_began_in(indent: int, made: str) -> None:
    async def run() -> None:
        house = House(stream=telling(grows("  a = 1\n  b = 2\nc = 3\nd")))
        (choice,) = (await house.service.answer([replace(INFILL, indent=indent)], ACME, "demo")).choices
        ((_, usage),) = house.used
        assert choice.text == made
        assert usage.completion_tokens == len(FORMAT.tokenizer.encode(made))

    asyncio.run(run())


def test_what_the_cache_held_is_known_of_an_answer_that_is_cut() -> None:
    async def run() -> None:
        told = [replace(growth, cached_tokens=3) for growth in grows("a = 1\nb")]
        answer = await House(stream=telling(told)).service.answer([replace(INFILL, seconds=1e-9)], ACME, "demo")
        assert (answer.choices[0].reason, answer.usage.cached_tokens) == ("time", 3)
        answer = await House(stream=telling(told)).service.answer([replace(INFILL, seconds=60.0)], ACME, "demo")
        assert (answer.choices[0].reason, answer.usage.cached_tokens) == ("length", 3)

    asyncio.run(run())


def test_a_time_limit_ends_what_the_engine_still_makes() -> None:
    async def run() -> None:
        closed = asyncio.Event()

        async def endless() -> AsyncGenerator[list[Growth], None]:
            try:
                while True:
                    for growth in grows("x\n", end=False):
                        yield [growth]
                    await asyncio.sleep(0)
            finally:
                closed.set()

        house = House(stream=lambda batch: endless())
        (choice,) = (await house.service.answer([replace(INFILL, seconds=0.05)], ACME, "demo")).choices
        assert choice.reason == "time"
        await asyncio.wait_for(closed.wait(), 10)

    asyncio.run(run())


def test_a_prompt_alone_may_have_a_time_limit() -> None:
    warming = Ask(suffix="", max_tokens=0, seconds=0.001, reported=True)
    answer = answered(warming)
    assert [(choice.text, choice.reason) for choice in answer.choices] == [("", "length")]
    assert answer.prompts == ("<mask_1><|endoftext|><sep><mask_1>",)
    assert answer.usage.completion_tokens == 0


def test_what_is_reported_tells_its_prompt_and_the_time_to_its_first_token() -> None:
    async def run() -> None:
        house = House(instant=False)
        asked = replace(INFILL, reported=True, decoding=Decoding(ignore_eos=True))
        began = time.monotonic()
        answer = await house.service.answer([asked], ACME, "demo")
        took = time.monotonic() - began
        assert answer.prompts == ("def f():\n    return <mask_1>\n<|endoftext|><sep><mask_1>",)
        assert answer.timing.prompt > 0
        assert answer.timing.completion > 0
        assert answer.timing.prompt + answer.timing.completion <= took
        assert (await house.service.answer([INFILL], ACME, "demo")).prompts == ()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (replace(INFILL, n=2), "n = 2 at temperature 0"),
        (replace(INFILL, echo=True), "echo and suffix"),
        (replace(INFILL, suffix="", echo=True), "echo and suffix"),
        (replace(PLAIN, n=MOST_CHOICES + 1, decoding=SAMPLED), "completions, and 1,024 are the most"),
        (replace(PLAIN, prefix="x" * (MOST_TEXT + 1)), "characters, .* and 4,194,304 are the most"),
        (replace(INFILL, suffix="x" * MOST_TEXT), "characters, its suffix once for each prompt"),
        (replace(INFILL, behind="x" * MOST_TEXT), "are the most"),
        (replace(PLAIN, decoding=Decoding(logit_bias=((51_200, 1.0),))), "token id 51200"),
    ],
)
def test_what_no_dialect_may_ask_is_refused_with_a_remedy(ask: Ask, words: str) -> None:
    async def run() -> None:
        house = House()
        with pytest.raises(UsageError, match=words) as refused:
            await house.service.answer([PLAIN, ask], ACME, "demo")
        assert refused.value.remedy
        with pytest.raises(UsageError, match=words):
            await streamed(house, ask)
        assert not house.desk.demands

    asyncio.run(run())


def test_what_many_prompts_make_of_one_suffix_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "render", lambda *_: pytest.fail("it is tokenised"))

    async def run() -> None:
        with pytest.raises(UsageError, match=r"its suffix once for each prompt.*Send fewer prompts"):
            await House().service.answer([replace(INFILL, suffix="x" * (MOST_TEXT // 128))] * 128, ACME, "demo")

    asyncio.run(run())


@pytest.mark.parametrize("suffix", ["", "x"])
def test_a_model_that_cannot_infill_takes_no_suffix(suffix: str) -> None:
    async def run() -> None:
        house = House(model=replace(MODEL, can_infill=False))
        with pytest.raises(NoInfillError, match=r"demo cannot infill\. Leave the suffix out") as refused:
            await house.service.answer([replace(INFILL, suffix=suffix)], ACME, "demo")
        assert (refused.value.http_status, refused.value.code) == (400, "no_infill")
        assert (await house.service.answer([PLAIN], ACME, "demo")).choices

    asyncio.run(run())


def test_how_the_caller_stands_goes_out_with_the_answer_and_with_the_refusal() -> None:
    async def run(desk: Desk) -> dict[str, str]:
        about = Noted()
        noted.set(about)
        with suppress(LimitError):
            await House(desk=desk).service.answer([INFILL], ACME, "demo")
        return about.headers

    assert asyncio.run(run(Desk())) == ROOM.headers()
    assert asyncio.run(run(Desk(refuses=True))) == NO_ROOM.headers()
    assert ROOM.headers() == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "24s",
    }


def test_a_request_of_which_nothing_came_costs_nothing_and_one_that_broke_off_what_came() -> None:
    async def run(made: list[Growth]) -> House:
        house = House(stream=telling(made))
        with pytest.raises(EngineError):
            await streamed(house, INFILL)
        return house

    refused = asyncio.run(run([Growth(0, 0, [], finish_reason="error", error_code="bad", error_message="bad")]))
    assert (refused.used, refused.desk.left) == ([], [Used()])
    broken = asyncio.run(run(grows("a = 1\n", end=False)))
    ((_, usage),) = broken.used
    assert usage.completion_tokens == len(FORMAT.tokenizer.encode("a = 1\n"))
    assert usage.prompt_tokens > 0
    assert broken.desk.left == [Used(usage.prompt_tokens, usage.completion_tokens)]


@pytest.mark.parametrize("ask", [INFILL, replace(PLAIN, echo=True)])
def test_an_engines_refusal_comes_before_any_piece(ask: Ask) -> None:
    async def run() -> None:
        refusal = Growth(0, 0, [], finish_reason="error", error_code="bad", error_message="bad")
        with pytest.raises(EngineError, match="bad"):
            await anext(House(stream=telling([refusal])).service.stream([ask], ACME, "demo"))

    asyncio.run(run())


def test_an_answer_that_ends_before_it_is_whole_is_an_error() -> None:
    async def run() -> None:
        with pytest.raises(EngineDeadError, match="before it was whole"):
            await streamed(House(stream=telling(grows("a", end=False))), INFILL)

    asyncio.run(run())


def test_tokens_are_charged_as_they_come() -> None:
    async def run() -> None:
        house = House(stream=telling(grows("a = 1\nb = 2\nc")))
        await streamed(house, INFILL)
        assert house.desk.charged[0] == 1
        assert house.desk.charged == sorted(house.desk.charged)
        assert house.desk.charged[-1] == len(FORMAT.tokenizer.encode("a = 1\nb = 2\nc"))

    asyncio.run(run())


def test_the_cache_is_parted_by_tenant() -> None:
    async def run() -> None:
        house = House(instant=False)
        ask = replace(PLAIN, prefix="x = 1  # " * 20, max_tokens=1)
        found = []
        for caller in (ACME, ACME, Caller("other", "k2"), Caller("acme", "k3")):
            found.append((await house.service.answer([ask], caller, "demo")).usage.cached_tokens > 0)
        assert found == [False, True, False, True]
        found = []
        for caller in (Caller("third", "k4"), Caller("third", "k5")):
            async for item in house.service.stream([ask], caller, "demo"):
                if isinstance(item, End):
                    found.append(item.usage.cached_tokens > 0)
        assert found == [False, True]

    asyncio.run(run())


def test_large_texts_are_tokenised_one_at_a_time_and_others_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    most: list[int] = []
    small = threading.Event()

    def slowly(ask: Ask, fmt: Format, context: int) -> Rendered:
        if len(ask.prefix) < 1_000:
            small.set()
        else:
            running.append(1)
            most.append(len(running))
            assert small.wait(60), "a small one passes the large ones"
            time.sleep(0.02)
            running.pop()
        return Rendered(ask, (1,), truncated=False)

    monkeypatch.setattr(service, "render", slowly)

    async def run() -> None:
        house = House()
        large = replace(INFILL, prefix="x" * (LARGE_CHARS + 1))
        tasks = [asyncio.ensure_future(house.service.answer([large], ACME, "demo")) for _ in range(3)]
        await asyncio.sleep(0)
        await house.service.answer([INFILL], ACME, "demo")
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert most == [1, 1, 1]


def test_large_texts_of_a_tenant_take_turns_with_those_of_others_and_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    held = threading.Event()

    def slowly(ask: Ask, fmt: Format, context: int) -> Rendered:
        assert held.wait(60)
        order.append(ask.behind)
        return Rendered(ask, (1,), truncated=False)

    monkeypatch.setattr(service, "render", slowly)

    async def run() -> None:
        house = House()

        def large(tenant: str) -> "asyncio.Task[Any]":
            ask = replace(INFILL, prefix="x" * LARGE_CHARS, behind=tenant)
            return asyncio.ensure_future(house.service.answer([ask], Caller(tenant, "k"), "demo"))

        tasks = [large("a"), large("a"), large("a"), large("b")]
        await asyncio.sleep(0.01)
        monkeypatch.setattr(service, "PATIENCE_SECONDS", 0.01)
        with pytest.raises(OverloadedError, match="texts wait to be tokenised"):
            await large("c")
        held.set()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "a", "a"]
        await large("c")

    asyncio.run(run())


def test_a_large_text_whose_client_is_gone_keeps_its_turn_until_its_thread_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running: list[int] = []
    most: list[int] = []
    begun, held = threading.Event(), threading.Event()

    def slowly(ask: Ask, fmt: Format, context: int) -> Rendered:
        running.append(1)
        most.append(len(running))
        begun.set()
        assert held.wait(60)
        running.pop()
        return Rendered(ask, (1,), truncated=False)

    monkeypatch.setattr(service, "render", slowly)

    async def run() -> None:
        house = House()
        ask = replace(INFILL, prefix="x" * (LARGE_CHARS + 1))
        gone = asyncio.ensure_future(house.service.answer([ask], ACME, "demo"))
        assert await asyncio.to_thread(begun.wait, 60)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        waiting = [
            asyncio.ensure_future(house.service.answer([ask], caller, "demo")) for caller in (ACME, Caller("b", "k"))
        ]
        await asyncio.sleep(0.05)
        assert most == [1]
        held.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())
    assert most == [1, 1, 1]


@pytest.mark.parametrize("text", ["<eom>", "<mask_1>", "<|endoftext|>", "a<sep>b<fim_prefix>"])
@pytest.mark.parametrize("place", ["prefix", "suffix", "behind"])
def test_control_tokens_in_texts_stay_texts(text: str, place: str) -> None:
    async def run() -> None:
        house = House()
        plain: dict[str, Any] = {"prefix": "", "suffix": "", "behind": ""}
        await house.service.answer([Ask(**plain | {place: text})], ACME, "demo")
        await house.service.answer([Ask(**plain)], ACME, "demo")
        special = FORMAT.tokenizer.special_ids
        spelt, empty = (list(batch.requests[0].token_ids) for batch in house.batches)
        assert [i for i in spelt if i in special] == [i for i in empty if i in special]
        assert FORMAT.decode(spelt) == text

    asyncio.run(run())


def test_an_echo_and_its_logprobs_come_in_one_piece_of_a_stream() -> None:
    async def run() -> None:
        ask = Ask(prefix="x = 1\n", max_tokens=3, logprobs=1, echo=True, decoding=Decoding(ignore_eos=True))
        texts, pieces, _ = await streamed(House(), ask)
        (whole,) = (await House().service.answer([ask], ACME, "demo")).choices
        assert pieces == [Piece(0, whole.text, whole.tokens, whole.reason)]
        assert texts == {0: whole.text}

    asyncio.run(run())


@pytest.mark.parametrize(("most", "samples"), [(0, [1]), (4, [3])])
def test_a_prompt_alone_is_computed_once_however_many_choices_show_it(most: int, samples: list[int]) -> None:
    async def run() -> None:
        house = House()
        ask = Ask(prefix="x = 1\n", max_tokens=most, n=3, logprobs=1, echo=True, decoding=Decoding(temperature=1.0))
        answer = await house.service.answer([ask], ACME, "demo")
        assert [len(request.seeds) for batch in house.batches for request in batch.requests] == samples
        assert len(answer.choices) == 3
        assert all(choice.text.startswith("x = 1\n") for choice in answer.choices)
        assert len({choice.tokens[1].logprob for choice in answer.choices}) == 1
        assert house.desk.demands[0].samples == sum(samples)

    asyncio.run(run())


def test_a_prompt_is_scored_for_several_choices_whatever_the_temperature() -> None:
    ask = Ask(prefix="x = 1\n", max_tokens=0, n=2, logprobs=1, echo=True, decoding=Decoding(temperature=0.0))
    first, second = answered(ask).choices
    assert first == second


def test_a_prompts_logprobs_are_asked_of_its_first_portion_alone() -> None:
    async def run() -> None:
        house = House(desk=Desk(share=Capacity(2, 10_000)))
        ask = Ask(prefix="x = 1\n", max_tokens=4, n=5, logprobs=1, echo=True, decoding=Decoding(temperature=1.0))
        answer = await house.service.answer([ask], ACME, "demo")
        assert [batch.sampling.prompt_logprobs for batch in house.batches] == [True, False, False]
        assert len({choice.tokens[:3] for choice in answer.choices}) == 1
        assert len(answer.choices) == 5

    asyncio.run(run())


def test_a_tenants_longer_texts_take_no_more_than_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    begun, held = threading.Semaphore(0), threading.Event()

    def slowly(ask: Ask, fmt: Format, context: int) -> Rendered:
        if len(ask.prefix) > service.FEW_CHARS:
            running.append(1)
            begun.release()
            assert held.wait(60)
        return Rendered(ask, (1,), truncated=False)

    monkeypatch.setattr(service, "render", slowly)
    monkeypatch.setattr(service, "RENDERS", 2)

    async def run() -> None:
        house = House()
        longer = replace(INFILL, prefix="x" * (service.FEW_CHARS + 1))
        tasks = [asyncio.ensure_future(house.service.answer([longer], ACME, "demo")) for _ in range(5)]
        assert await asyncio.to_thread(lambda: begun.acquire(timeout=60) and begun.acquire(timeout=60))
        await house.service.answer([INFILL], ACME, "demo")
        other = asyncio.ensure_future(house.service.answer([longer], Caller("b", "k"), "demo"))
        assert await asyncio.to_thread(begun.acquire, timeout=60)
        await asyncio.sleep(0.05)
        assert len(running) == 3
        held.set()
        await asyncio.gather(*tasks, other)

    asyncio.run(run())
    assert len(running) == 6
