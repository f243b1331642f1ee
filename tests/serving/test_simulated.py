import asyncio
from typing import Any

import pytest

from serving.config import EngineConfig
from serving.errors import EngineDeadError
from serving.protocol import Request, Result, Sampling
from serving.roofline import bound_rows_per_second
from serving.simulated import SimulatedEngine

SAMPLING = Sampling(16, stop_token_ids=(50_318,))


def config(**roofline: Any) -> EngineConfig:
    return EngineConfig.parse(
        {"kind": "simulated", "model": "m", "max_model_len": 2048, "roofline": {"time_scale": 1e6} | roofline}
    )


async def answers(engine: SimulatedEngine, requests: list[Request], sampling: Sampling = SAMPLING) -> list[Result]:
    return await asyncio.gather(*(engine.generate(r, sampling) for r in requests))


def test_the_answer_depends_on_the_prompt_alone_when_greedy() -> None:
    async def main() -> None:
        first = await answers(SimulatedEngine(config()), [Request(0, [1, 2, 3], (5,))])
        second = await answers(SimulatedEngine(config(max_num_seqs=1)), [Request(0, [1, 2, 3], (6,))])
        other = await answers(SimulatedEngine(config()), [Request(0, [1, 2, 4], (5,))])
        assert first[0].completions == second[0].completions
        assert first[0].completions != other[0].completions

    asyncio.run(main())


def test_seeds_part_the_samples_when_sampling() -> None:
    async def main() -> None:
        warm = Sampling(16, temperature=1.0, stop_token_ids=(50_318,))
        engine = SimulatedEngine(config())
        result, again = await answers(engine, [Request(0, [1, 2], (1, 2, 1)), Request(1, [1, 2], (1,))], warm)
        assert result.completions[0] == result.completions[2] == again.completions[0]
        assert result.completions[0] != result.completions[1]

    asyncio.run(main())


def test_a_repeated_prompt_is_found_in_the_cache_but_not_across_salts() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config())
        prompt = list(range(100))
        await engine.generate(Request(0, prompt), SAMPLING, cache_salt="a")
        same = await engine.generate(Request(0, prompt), SAMPLING, cache_salt="a")
        other = await engine.generate(Request(0, prompt), SAMPLING, cache_salt="b")
        assert (same.cached_tokens, other.cached_tokens) == (96, 0)
        assert engine.stats().prefix_cache_hits == 96

    asyncio.run(main())


def test_every_request_is_answered_whatever_the_limits() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config(max_num_seqs=3, kv_cache_tokens=64, max_num_batched_tokens=7))
        results = await answers(engine, [Request(i, [i] * (i % 50 + 1)) for i in range(60)])
        assert [r.key for r in results] == list(range(60))
        assert all(r.completions for r in results)
        assert engine.stats().running == engine.stats().waiting == 0

    asyncio.run(main())


def test_a_saturated_engine_comes_near_the_bound() -> None:
    """In simulated seconds, so that the machine's speed decides nothing."""
    from serving.batching import Scheduler, Sequence

    async def main() -> None:
        roofline = config(step_overhead_seconds=0.0).roofline
        scheduler = Scheduler(roofline)
        loop = asyncio.get_running_loop()
        for i in range(600):
            scheduler.add(Sequence([i] * 1_000, 64, None, loop.create_future()), 0)
        seconds = 0.0
        while scheduler.busy:
            seconds += scheduler.step()
            scheduler.finish_step()
        bound = bound_rows_per_second(roofline, prompt_tokens=1_000, output_tokens=64)
        assert 0.7 * bound < 600 / seconds <= bound * 1.02
        assert bound == pytest.approx(40, rel=0.05)

    asyncio.run(main())


def test_a_cancelled_request_frees_its_slot() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config(max_num_seqs=1, time_scale=1.0))
        long = asyncio.create_task(engine.generate(Request(0, [1] * 500), Sampling(2_000, ignore_eos=True)))
        await asyncio.sleep(0.05)
        long.cancel()
        await engine.generate(Request(1, [2]), Sampling(1))
        assert engine.stats().running == 0

    asyncio.run(main())


def test_after_shutdown_it_is_dead() -> None:
    async def main() -> None:
        engine = SimulatedEngine(config())
        await engine.check_health()
        await engine.shutdown()
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        with pytest.raises(EngineDeadError):
            await engine.generate(Request(0, [1]), SAMPLING)

    asyncio.run(main())
