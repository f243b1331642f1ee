"""A measuring instrument with the engine's interface: deterministic noise after a roofline clock, or at once.

It schedules as vLLM does (``serving.batching``: chunked prefill, priorities, a prefix cache of whole blocks) and takes
the time that ``serving.roofline`` says. It computes nothing: what it answers is noise, and everything made of it is
labelled ``simulated`` or ``instant``.
"""

import array
import asyncio
import hashlib
import itertools
import os
import random
import signal
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Ids
from contextlib import aclosing
from typing import Any

from serving.batching import Scheduler, Sequence
from serving.config import EngineConfig
from serving.engine_args import installed_version
from serving.errors import EngineDeadError
from serving.merging import merged
from serving.occupancy import Occupancy
from serving.protocol import (
    BATCH_PRIORITY,
    Alternatives,
    Completion,
    EngineInfo,
    EngineStats,
    Growth,
    Request,
    Result,
    Sampling,
)
from serving.watching import clip, stop_watches

NO_MORE = -1
NOISE = random.Random(0).choices(range(1_000, 21_000), k=1 << 16)
"""Ids that are ordinary text in every tokenizer that the known formats use; answers are slices of it."""


class SimulatedEngine:
    """One simulated engine; make it inside the event loop that uses it.

    Where ``beside`` is not None, so many batch rows go on while people are served, as ``serving.yielding`` says.
    """

    def __init__(self, config: EngineConfig, *, beside: int | None = None) -> None:
        roofline = config.roofline
        self._info = EngineInfo(
            kind=config.kind,
            model=config.model,
            max_model_len=config.max_model_len,
            max_num_seqs=roofline.max_num_seqs,
            block_size=roofline.block_size,
            kv_cache_tokens=roofline.kv_cache_tokens,
            device=config.kind,
            versions={name: installed_version(name) for name in ("ray", "spanfill")},
            settings=roofline.model_dump(include={"max_num_seqs", "max_num_batched_tokens", "block_size"}),
        )
        self._scheduler = Scheduler(roofline, beside=beside)
        self._roofline = roofline
        self._scale = roofline.time_scale
        self._instant = config.kind == "instant"
        self._occupancy = Occupancy()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dead: EngineDeadError | None = None
        self._hung = False
        self._output_tokens = self._steps = 0

    @property
    def info(self) -> EngineInfo:
        """What this engine imitates."""
        return self._info

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> Result:
        """Noise that depends on the prompt, the seed and the sampling alone."""
        await self._suffer(request)
        if message := self._refusal(request):
            return Result(request.key, error_code="engine_error", error_message=message)
        completions = await self._completions(request, sampling)
        cached = 0
        if not self._instant:
            cached = sum(await asyncio.gather(*(self._timed(request, c, priority, cache_salt) for c in completions)))
        self._count(completions)
        prompt = len(request.token_ids) - 1 if sampling.prompt_logprobs else None
        return Result(
            request.key,
            completions,
            cached,
            None if prompt is None else [-1.0] * prompt,
            None if prompt is None else _alternatives(prompt, sampling),
        )

    async def stream(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> AsyncGenerator[Growth, None]:
        """The same noise, a token a step."""
        await self._suffer(request)
        if message := self._refusal(request):
            yield Growth(request.key, 0, [], finish_reason="error", error_code="engine_error", error_message=message)
            return
        completions = await self._completions(request, sampling)
        samples = [
            self._grow(request, sample, completion, priority, cache_salt)
            for sample, completion in enumerate(completions)
        ]
        async with aclosing(merged(samples)) as growths:
            async for growth in growths:
                yield growth
        self._count(completions)

    def _refusal(self, request: Request) -> str | None:
        if len(request.token_ids) < self._info.max_model_len:
            return None
        return f"the prompt of {len(request.token_ids)} tokens leaves no room in {self._info.max_model_len}"

    async def _completions(self, request: Request, sampling: Sampling) -> tuple[Completion, ...]:
        watches = await stop_watches(request, sampling)
        made = [_noise(request.token_ids, seed, sampling) for seed in request.seeds]
        for completion, watch in zip(made, watches, strict=True):
            if watch is not None:
                watch.add(completion.token_ids)
        return tuple(clip(completion, watch) for completion, watch in zip(made, watches, strict=True))

    def _count(self, completions: tuple[Completion, ...]) -> None:
        self._output_tokens += sum(len(c.token_ids) for c in completions)
        self._steps += self._instant

    async def _grow(
        self, request: Request, sample: int, completion: Completion, priority: int, cache_salt: str | None
    ) -> AsyncGenerator[Growth, None]:
        """One sample, a token a step; of an instant engine all at once."""
        told = cached = 0
        if not self._instant:
            steps: asyncio.Queue[int] = asyncio.Queue()
            timed = asyncio.ensure_future(self._timed(request, completion, priority, cache_salt, steps))
            timed.add_done_callback(lambda _: steps.put_nowait(NO_MORE))
            try:
                while (made := await steps.get()) != NO_MORE:
                    if made > told:
                        yield Growth(request.key, sample, **_between(completion, told, made))
                        told = made
                cached = await timed
            finally:
                timed.cancel()
        yield Growth(
            request.key,
            sample,
            **_between(completion, told, len(completion.token_ids)),
            finish_reason=completion.finish_reason,
            stop_token_id=completion.stop_token_id,
            cached_tokens=cached,
        )

    async def _suffer(self, request: Request) -> None:
        """The faults that this engine was told to have when a prompt holds certain tokens."""
        if self._dead:
            raise self._dead
        if _holds(request.token_ids, self._roofline.kill_on):
            os.kill(os.getpid(), signal.SIGKILL)
        if _holds(request.token_ids, self._roofline.crash_on):
            self._die(EngineDeadError("the simulated engine crashed, as it was told to at these tokens."))
            raise EngineDeadError("the simulated engine crashed, as it was told to at these tokens.")
        if self._hung or _holds(request.token_ids, self._roofline.hang_on):
            self._hung = True
            await asyncio.Event().wait()

    def _die(self, error: EngineDeadError) -> None:
        self._dead = error
        if self._task is not None:
            self._task.cancel()
        for sequence in (*self._scheduler.running, *(s for _, s in self._scheduler.waiting)):
            if not sequence.done.done():
                sequence.done.set_exception(EngineDeadError(error.message))

    async def _timed(
        self,
        request: Request,
        completion: Completion,
        priority: int,
        cache_salt: str | None,
        made: "asyncio.Queue[int] | None" = None,
    ) -> int:
        """Wait until the clock says that it is done; ``made`` is told the tokens of each step but the last."""
        if self._dead:
            raise self._dead
        steps = len(completion.token_ids) + (completion.stop_token_id is not None)
        done = asyncio.get_running_loop().create_future()
        sequence = Sequence(request.token_ids, max(1, steps), cache_salt, done, told=made)
        self._scheduler.add(sequence, priority)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._wake.set()
        try:
            await sequence.done
        except asyncio.CancelledError:
            sequence.cancelled = True
            raise
        return sequence.cached

    async def _run(self) -> None:
        due = time.perf_counter()
        while True:
            if not self._scheduler.busy:
                self._wake.clear()
                await self._wake.wait()
                due = time.perf_counter()
            due += self._scheduler.step() / self._scale
            self._occupancy.tell(len(self._scheduler.running))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if self._hung:
                await asyncio.Event().wait()
            self._scheduler.finish_step()
            self._occupancy.tell(len(self._scheduler.running))
            self._steps += 1

    def stats(self) -> EngineStats:
        """The latest reading."""
        s = self._scheduler
        return EngineStats(
            len(s.running),
            len(s.waiting),
            s.used_tokens / self._info.kv_cache_tokens,
            s.queries,
            s.hits,
            self._output_tokens,
            self._steps,
            self._occupancy.busy_seconds,
            self._occupancy.row_seconds,
        )

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` after ``shutdown``, after a crash or when the clock has failed."""
        if self._dead:
            raise self._dead
        if self._task is not None and self._task.done():
            raise EngineDeadError("the simulated engine's clock has failed.")

    async def shutdown(self) -> None:
        """Stop the clock."""
        self._die(EngineDeadError("the simulated engine was shut down."))


def _holds(token_ids: Ids[int], wanted: Ids[int]) -> bool:
    """Whether ``wanted``, if there is any, stands somewhere in ``token_ids``."""
    if not wanted:
        return False
    ids, first, count = list(token_ids), list(wanted), len(wanted)
    return any(ids[i : i + count] == first for i in range(len(ids) - count + 1) if ids[i] == first[0])


def _between(completion: Completion, start: int, stop: int) -> dict[str, Any]:
    """What a part of a completion is made of."""
    return {
        "token_ids": completion.token_ids[start:stop],
        "logprobs": completion.logprobs and completion.logprobs[start:stop],
        "alternatives": completion.alternatives and completion.alternatives[start:stop],
    }


def _alternatives(places: int, sampling: Sampling) -> list[Alternatives] | None:
    """As many likely tokens a place as are wanted: noise, too."""
    likely = tuple((token, -1.0 - rank) for rank, token in enumerate(NOISE[: sampling.alternatives]))
    return [likely] * places if likely else None


def _noise(token_ids: Ids[int], seed: int, sampling: Sampling) -> Completion:
    sampled = (seed, sampling.temperature, sampling.top_p) if sampling.temperature else ()
    digest = hashlib.blake2b(array.array("i", token_ids).tobytes(), digest_size=8, key=repr(sampled).encode()[:64])
    number = int.from_bytes(digest.digest())
    length = 1 + number % sampling.max_tokens
    stops = not sampling.ignore_eos and sampling.stop_token_ids and length < sampling.max_tokens
    count = length if stops else sampling.max_tokens
    start = (number >> 20) % len(NOISE)
    ids = (
        list(itertools.islice(itertools.cycle(NOISE), start, start + count))
        if start + count > len(NOISE)
        else NOISE[start : start + count]
    )
    places = len(ids) + bool(stops)
    logprobs, likely = ([-1.0] * places, _alternatives(places, sampling)) if sampling.logprobs else (None, None)
    if stops:
        return Completion(ids, "stop", sampling.stop_token_ids[0], logprobs, likely)
    return Completion(ids, "length", None, logprobs, likely)
