"""Bare vLLM, ``LLM.generate`` on token ids: in file order with a sliding window, aligned, and aligned and sorted."""

import time
from typing import Any

from jobs.measured import occupancy
from jobs.order import prefix_order, sort_key
from jobs.process import since_birth
from jobs.tally import Tally
from serving.engine import sampling_params
from serving.formats import load_format
from serving.protocol import EngineInfo, EngineStats, Sampling
from tests.benchmarks.peers.figures import Measured, until_stop
from tests.benchmarks.peers.inputs import FORMAT, Row, make_prompts
from tests.benchmarks.peers.setting import Setting


def run_bare(rows: list[Row], setting: Setting, *, align: int, ordered: bool) -> Measured:
    """Give all rows' prompts to ``LLM.generate`` at once."""
    prompts = make_prompts(rows, setting, align=align)
    order = prefix_order([sort_key(prompt) for prompt in prompts]) if ordered else list(range(len(prompts)))
    llm = _engine(setting)
    startup, started = since_birth(), time.monotonic()
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[row]} for row in order],
        [_greedy(setting) for _ in order],
        use_tqdm=False,
    )
    busy = time.monotonic() - started
    stops = load_format(FORMAT).stop_token_ids
    answers = {row: until_stop(out.outputs[0].token_ids, stops) for row, out in zip(order, outputs, strict=True)}
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    different = sum(out.prompt_token_ids != prompts[row] for row, out in zip(order, outputs, strict=True))
    config = llm.llm_engine.vllm_config
    told = _limits(config) | _engines(outputs, config, busy)
    return Measured(startup, busy, [prompts[row] for row in order], answers, cached, different=different, extra=told)


def _engine(setting: Setting) -> Any:
    from vllm import LLM

    return LLM(**setting.engine_arguments())


def _greedy(setting: Setting) -> Any:
    """The very sampling parameters that spanfill gives its engine."""
    stops = load_format(FORMAT).stop_token_ids
    return sampling_params(Sampling(setting.max_tokens, stop_token_ids=stops), 0, kind="FINAL_ONLY")


def _engines(outputs: list[Any], config: Any, seconds: float) -> dict[str, Any]:
    """How full the engine was, told as spanfill's manifest tells it; nothing unless vLLM keeps statistics.

    A row runs from when vLLM first scheduled it to its last token.
    """
    stamps = [output.metrics for output in outputs]
    if not stamps or None in stamps:
        return {}
    starts, ends = [stamp.scheduled_ts for stamp in stamps], [stamp.last_token_ts for stamp in stamps]
    stats = EngineStats(busy_seconds=max(ends) - min(starts), row_seconds=sum(ends) - sum(starts))
    model, cache = config.model_config, config.cache_config
    kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    most = config.scheduler_config.max_num_seqs
    info = EngineInfo("vllm", model.model, model.max_model_len, most, cache.block_size, kv_tokens)
    tally = Tally(
        samples=len(outputs),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        completion_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
    )
    return {"engines": {"replicas": 1, **occupancy(info, {}, {"llm": stats}, seconds, tally)}}


def _limits(config: Any) -> dict[str, Any]:
    """What vLLM made of its arguments, to be seen beside the figures."""
    scheduler, cache = config.scheduler_config, config.cache_config
    return {
        "block_size": cache.block_size,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "prefix_caching": cache.enable_prefix_caching,
        "enforce_eager": config.model_config.enforce_eager,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
    }
