"""vLLM behind ``generate``: token ids in, token ids out. The only module that imports vllm."""

import asyncio
import gc
import itertools
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from serving.config import EngineConfig
from serving.cores import available_cores
from serving.engine_args import check_engine_args, installed_version, vllm_arguments, yield_to_people
from serving.errors import ConfigError, EngineDeadError, EngineError
from serving.merging import merged
from serving.outputs import alternatives_of, completion_of, growth_of, is_enough, logprobs_of
from serving.protocol import (
    BATCH_PRIORITY,
    EngineInfo,
    EngineStats,
    Growth,
    Request,
    Result,
    Sampling,
)
from serving.readings import Readings
from serving.stopping import StopWatch
from serving.watching import clip, stop_watches


class VllmEngine:
    """One AsyncLLM. Make it with ``VllmEngine.start``; it belongs to the event loop that made it."""

    def __init__(self, llm: Any, info: EngineInfo, readings: Readings) -> None:
        self._llm = llm
        self._info = info
        self._readings = readings
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._ids = itertools.count()

    @classmethod
    async def start(
        cls, config: EngineConfig, *, cores: tuple[int, ...] = (), beside: int | None = None
    ) -> "VllmEngine":
        """Load the model; takes tens of seconds.

        ``cores`` are bound to the engine on a CPU (all that the process may use when empty). Where ``beside`` is not
        None, so many batch rows go on while people are served (``serving.scheduler``). Raises ``ConfigError`` for
        engine arguments that vLLM refuses and ``EngineError`` when it does not start.
        """
        check_engine_args(config.engine_args)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        bound = cores or tuple(available_cores())
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _core_binding(bound, config.tensor_parallel_size)
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = current_platform.is_cpu()
        # Without a context vLLM's batch is the smallest that it knows, whatever the GPU could hold.
        context = UsageContext.LLM_CLASS if beside is None else UsageContext.OPENAI_API_SERVER
        try:
            vllm_config = AsyncEngineArgs(**vllm_arguments(config, on_cpu=on_cpu)).create_engine_config(context)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"vLLM refuses its configuration: {error}", remedy="Change the engine arguments."
            ) from error
        if beside is not None:
            yield_to_people(vllm_config, beside)
        readings = Readings()
        try:
            llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[readings.logger])
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM did not start: {error}", remedy="Its own messages above say why.") from error
        cache_config, scheduler_config = vllm_config.cache_config, vllm_config.scheduler_config
        info = EngineInfo(
            kind="vllm",
            model=config.model,
            max_model_len=vllm_config.model_config.max_model_len,
            max_num_seqs=scheduler_config.max_num_seqs,
            block_size=cache_config.block_size,
            kv_cache_tokens=(cache_config.num_gpu_blocks or 0) * cache_config.block_size,
            dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
            device=current_platform.device_name if on_cpu else current_platform.get_device_name(),
            cores=bound if on_cpu else (),
            versions={name: installed_version(name) for name in ("vllm", "torch", "ray", "spanfill")},
            settings={
                "max_num_seqs": scheduler_config.max_num_seqs,
                "max_num_batched_tokens": scheduler_config.max_num_batched_tokens,
                "enable_chunked_prefill": scheduler_config.enable_chunked_prefill,
                "async_scheduling": bool(scheduler_config.async_scheduling),
                "block_size": cache_config.block_size,
            },
        )
        engine = cls(llm, info, readings)
        del llm  # An import's traceback may keep this frame, and the finaliser must not wait for it: see shutdown.
        return engine

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> Result:
        """Answer one request, its samples side by side; what vLLM refuses comes back as the result's error."""
        if refused := self._refused(request):
            return refused
        watches = await stop_watches(request, sampling)
        token_ids = list(request.token_ids)
        further = replace(sampling, prompt_logprobs=False)  # vLLM computes the whole prompt for them, cached or not.
        try:
            with _translated(self._llm):
                outputs = await asyncio.gather(
                    *(
                        self._sample(token_ids, further if sample else sampling, seed, watch, priority, cache_salt)
                        for sample, (seed, watch) in enumerate(zip(request.seeds, watches, strict=True))
                    )
                )
        except EngineDeadError:
            raise
        except EngineError as error:
            return Result(request.key, error_code=error.code, error_message=error.message)
        prompt = outputs[0] if sampling.prompt_logprobs else None
        return Result(
            request.key,
            tuple(clip(completion_of(o, sampling), watch) for o, watch in zip(outputs, watches, strict=True)),
            sum(output.num_cached_tokens or 0 for output in outputs),
            logprobs_of(prompt.prompt_logprobs[1:], prompt.prompt_token_ids[1:]) if prompt else None,
            alternatives_of(prompt.prompt_logprobs[1:], sampling) if prompt else None,
        )

    async def stream(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> AsyncGenerator[Growth, None]:
        """As ``generate``, a step at a time, without the prompt's logprobs. Closing it aborts what is left."""
        if refused := self._refused(request):
            yield _failed(refused.key, str(refused.error_code), str(refused.error_message))
            return
        watches = await stop_watches(request, sampling)
        token_ids = list(request.token_ids)
        samples = [
            self._grow(request.key, sample, token_ids, sampling, seed, watch, priority, cache_salt)
            for sample, (seed, watch) in enumerate(zip(request.seeds, watches, strict=True))
        ]
        try:
            with _translated(self._llm):
                async with aclosing(merged(samples)) as growths:
                    async for growth in growths:
                        yield growth
        except EngineDeadError:
            raise
        except EngineError as error:
            yield _failed(request.key, error.code, error.message)

    def _refused(self, request: Request) -> Result | None:
        # Without a tokenizer vLLM checks no ids, and one beyond the embedding kills the engine.
        ids = request.token_ids
        if ids and 0 <= min(ids) <= max(ids) < self._vocab_size:
            return None
        message = f"the prompt is empty or holds a token id outside 0 to {self._vocab_size - 1}"
        return Result(request.key, error_code="bad_token_ids", error_message=message)

    async def _sample(
        self,
        token_ids: list[int],
        sampling: Sampling,
        seed: int,
        watch: StopWatch | None,
        priority: int,
        cache_salt: str | None,
    ) -> Any:
        """The last output of one sample; what is left of it is aborted once its watch needs no more."""
        final = None
        params = sampling_params(sampling, seed, kind="FINAL_ONLY" if watch is None else "CUMULATIVE")
        async with aclosing(self._outputs(token_ids, params, priority, cache_salt)) as outputs:
            async for output in outputs:
                final = output
                if watch is not None and is_enough(output, watch):
                    break
        return final

    async def _grow(
        self,
        key: int,
        sample: int,
        token_ids: list[int],
        sampling: Sampling,
        seed: int,
        watch: StopWatch | None,
        priority: int,
        cache_salt: str | None,
    ) -> AsyncGenerator[Growth, None]:
        """One sample, a step at a time."""
        params = sampling_params(sampling, seed, kind="DELTA")
        async with aclosing(self._outputs(token_ids, params, priority, cache_salt)) as outputs:
            async for output in outputs:
                growth = growth_of(key, sample, output, sampling, watch)
                yield growth
                if growth.finish_reason:
                    break

    async def _outputs(
        self, token_ids: list[int], params: Any, priority: int, cache_salt: str | None
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one sample; closing it early aborts the request."""
        from vllm.inputs import tokens_input

        prompt = tokens_input(token_ids, cache_salt=cache_salt)
        async with aclosing(self._llm.generate(prompt, params, str(next(self._ids)), priority=priority)) as outputs:
            async for output in outputs:
                yield output

    def stats(self) -> EngineStats:
        """The reading after the latest engine step."""
        return self._readings.stats

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if vLLM's engine core is gone."""
        if self._llm.errored:
            raise EngineDeadError("the vLLM engine core has died.", remedy="Its replica is started again.")

    async def shutdown(self) -> None:
        """End the engine core and its workers; the engine answers nothing after."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
            # Its finaliser fails when it runs as late as the interpreter's end: let the task that holds it end now.
            await asyncio.sleep(0)
            del llm
            gc.collect()


def _core_binding(cores: tuple[int, ...], ranks: int) -> str:
    """vLLM's ``VLLM_CPU_OMP_THREADS_BIND``: a list of cores for each tensor-parallel rank, separated by bars."""
    share = max(1, len(cores) // ranks)
    groups = (cores[rank * share : (rank + 1) * share] or cores for rank in range(ranks))
    return "|".join(",".join(map(str, group)) for group in groups)


def sampling_params(sampling: Sampling, seed: int, *, kind: str) -> Any:
    """vLLM's parameters of one sample; ``kind`` names how its outputs come (``RequestOutputKind``)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.alternatives if sampling.logprobs else None,
        prompt_logprobs=sampling.alternatives if sampling.prompt_logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind[kind],
        skip_clone=True,
    )


@contextmanager
def _translated(llm: Any) -> Iterator[None]:
    """Raise what vLLM raises as ``EngineDeadError`` where the engine is gone, else as ``EngineError``."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
    from vllm.v1.engine.exceptions import EngineGenerateError

    try:
        yield
    except (VllmDeadError, VLLMClientError, EngineGenerateError, ValueError) as error:
        if llm.errored or isinstance(error, VllmDeadError):
            raise EngineDeadError(f"the vLLM engine died: {error}", remedy="Its replica is started again.") from error
        raise EngineError(str(error.__cause__ or error)) from error


def _failed(key: int, code: str, message: str) -> Growth:
    return Growth(key, 0, [], finish_reason="error", error_code=code, error_message=message)
