"""Real vLLM, a step at a time, and batch rows that make way for people."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.config import EngineConfig
from serving.engine import VllmEngine
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY, Completion, Growth, Request, Result, Sampling

pytestmark = pytest.mark.engine
Await = Callable[[Coroutine[Any, Any, Any]], Any]
EOM = 50_318
PROMPT = list(range(1_000, 1_040))
FREE = Sampling(40, ignore_eos=True)


@pytest.fixture(scope="module")
def wait() -> Iterator[Await]:
    """One event loop for the module's engine."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def engine(checkpoint: Path, wait: Await) -> Iterator[VllmEngine]:
    """An engine that people and a job use: one batch row goes on beside people."""
    config = EngineConfig(model=str(checkpoint), max_model_len=512, dtype="float32", engine_args={"max_num_seqs": 8})
    started: VllmEngine = wait(VllmEngine.start(config, beside=1))
    yield started
    wait(started.shutdown())


async def collected(stream: AsyncIterator[Growth]) -> list[Growth]:
    """Everything that a stream gives."""
    return [growth async for growth in stream]


async def grown(engine: VllmEngine, request: Request, sampling: Sampling) -> list[Growth]:
    """Everything that comes of a request."""
    return await collected(engine.stream(request, sampling))


def whole(growths: list[Growth], sample: int) -> Completion:
    """One sample's growths as one completion."""
    own = [growth for growth in growths if growth.sample == sample]
    last = own[-1]
    assert [growth.finish_reason for growth in own[:-1]] == [None] * (len(own) - 1)
    assert last.finish_reason in ("stop", "length")
    return Completion(
        [token for growth in own for token in growth.token_ids],
        last.finish_reason,
        last.stop_token_id,
        [value for growth in own for value in growth.logprobs or ()] or None,
        [value for growth in own for value in growth.alternatives or ()] or None,
    )


@pytest.mark.parametrize(
    "sampling",
    [
        FREE,
        replace(FREE, logprobs=True, alternatives=3),
        Sampling(40, stop_token_ids=tuple(range(0, 51_200, 7))),
        Sampling(40, stop=("e", "the"), format="codegen25", tokenizer="codegen25"),
        replace(FREE, temperature=0.9, top_k=50, min_p=0.01, presence_penalty=0.5, repetition_penalty=1.1),
        replace(FREE, logit_bias=((1_234, 50.0),)),
    ],
)
def test_a_stream_is_the_answer_a_step_at_a_time(engine: VllmEngine, wait: Await, sampling: Sampling) -> None:
    request = Request(3, PROMPT, (1, 2) if sampling.temperature else (0,))
    answer = wait(engine.generate(request, sampling))
    growths = wait(grown(engine, request, sampling))
    assert {growth.key for growth in growths} == {3}
    for sample, completion in enumerate(answer.completions):
        found = whole(growths, sample)
        assert (found.token_ids, found.finish_reason, found.stop_token_id) == (
            completion.token_ids,
            completion.finish_reason,
            completion.stop_token_id,
        )
        if sampling.logprobs:
            assert found.logprobs == pytest.approx(completion.logprobs, abs=1e-4)
            assert [[token for token, _ in step] for step in found.alternatives or ()] == [
                [token for token, _ in step] for step in completion.alternatives or ()
            ]


def test_alternatives_are_the_likeliest_first(engine: VllmEngine, wait: Await) -> None:
    result = wait(
        engine.generate(Request(0, PROMPT), replace(FREE, logprobs=True, prompt_logprobs=True, alternatives=3))
    )
    (completion,) = result.completions
    for token, logprob, step in zip(completion.token_ids, completion.logprobs, completion.alternatives, strict=True):
        assert len(step) == 3
        assert step[0] == (token, logprob)  # Greedy: what was taken is the likeliest.
        assert sorted((value for _, value in step), reverse=True) == [value for _, value in step]
    assert len(result.prompt_alternatives) == len(PROMPT) - 1


def test_a_refused_prompt_is_one_growth_with_its_error(engine: VllmEngine, wait: Await) -> None:
    (growth,) = wait(grown(engine, Request(5, [10**6]), FREE))
    assert (growth.key, growth.finish_reason, growth.error_code) == (5, "error", "bad_token_ids")
    (growth,) = wait(grown(engine, Request(6, [1] * 600), FREE))
    assert (growth.key, growth.finish_reason, growth.error_code) == (6, "error", "engine_error")


@pytest.mark.parametrize("ended", ["closed", "cancelled"])
def test_a_stream_that_nobody_reads_frees_its_slots_within_a_second(
    engine: VllmEngine, wait: Await, ended: str
) -> None:
    async def run() -> None:
        stream = engine.stream(Request(0, PROMPT, (1, 2)), replace(FREE, max_tokens=400, temperature=1.0))
        await anext(stream)
        while engine.stats().running < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if ended == "closed":
            await stream.aclose()
        else:
            upcoming = asyncio.ensure_future(collected(stream))
            await asyncio.sleep(0.05)
            upcoming.cancel()
            await asyncio.wait((upcoming,))
        async with asyncio.timeout(1.0):
            while engine.stats().running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    wait(run())


def test_rows_stand_still_while_a_person_is_served_and_their_answers_are_the_same(
    engine: VllmEngine, wait: Await
) -> None:
    long = replace(FREE, max_tokens=120)
    requests = [Request(number, [token + number for token in PROMPT]) for number in range(4)]

    async def followed(request: Request, made: list[int]) -> list[int]:
        ids: list[int] = []
        async for growth in engine.stream(request, long, priority=BATCH_PRIORITY):
            ids += growth.token_ids
            made[request.key] = len(ids)
        return ids

    async def run() -> tuple[list[int], list[int], list[list[int]]]:
        made = [0] * 4
        tasks = [asyncio.ensure_future(followed(request, made)) for request in requests]
        while min(made) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        started = False
        before = list(made)
        async for growth in engine.stream(Request(9, PROMPT), FREE, priority=INTERACTIVE_PRIORITY):
            if not started:
                started, before = True, list(made)
            after = list(made)
            assert growth.key == 9
        return before, after, await asyncio.gather(*tasks)

    before, after, ids = wait(run())
    grew = sorted(now - then for then, now in zip(before, after, strict=True))
    assert max(grew[:3]) <= 1  # A step that was planned before the person came may still be told.
    assert grew[3] >= 30
    for request, found in zip(requests, ids, strict=True):
        (alone,) = wait(engine.generate(request, long)).completions
        assert found == alone.token_ids


def test_a_place_is_kept_free_for_people(engine: VllmEngine, wait: Await) -> None:
    async def run() -> float:
        long = replace(FREE, max_tokens=300)
        rows = [asyncio.ensure_future(engine.generate(Request(n, [t + n for t in PROMPT]), long)) for n in range(20)]
        while engine.stats().running < 7:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        most = engine.stats().running
        await engine.generate(Request(99, PROMPT), replace(FREE, max_tokens=3), priority=INTERACTIVE_PRIORITY)
        assert not any(row.done() for row in rows)
        for row in rows:
            row.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        return most

    assert wait(run()) == 7


def test_rows_that_left_for_people_go_on_and_their_answers_are_the_same(engine: VllmEngine, wait: Await) -> None:
    sampled = replace(FREE, max_tokens=120, temperature=0.9)
    rows = [Request(n, [token + n for token in PROMPT], (n,)) for n in range(7)]
    people = [Request(n, [token + 100 + n for token in PROMPT]) for n in range(6)]

    async def run() -> tuple[int, list[Result]]:
        tasks = [asyncio.ensure_future(engine.generate(row, sampled)) for row in rows]
        while engine.stats().running < 7:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        asked = [engine.generate(person, FREE, priority=INTERACTIVE_PRIORITY) for person in people]
        served = asyncio.gather(*asked)
        most = 0
        while not served.done():
            most = max(most, engine.stats().waiting)
            await asyncio.sleep(0.005)
        assert not any(task.done() for task in tasks)
        return most, await asyncio.gather(*tasks)

    most, found = wait(run())
    assert most == 5
    for row, result in zip(rows, found, strict=True):
        assert result.completions == wait(engine.generate(row, sampled)).completions
