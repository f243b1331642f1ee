"""Stop watches for an engine's requests: the format that reads their tokens, loaded once a process."""

import asyncio
import threading
from dataclasses import replace

from serving.formats import Format, load_format
from serving.protocol import Completion, Request, Sampling
from serving.stopping import StopWatch

_formats: dict[tuple[str, str], Format] = {}
_loading = threading.Lock()


async def stop_watches(request: Request, sampling: Sampling) -> list[StopWatch | None]:
    """One watch for each sample of a request; None where nothing but token ids ends it."""
    if not sampling.stop and request.until is None:
        return [None] * len(request.seeds)
    key = sampling.format, sampling.tokenizer
    # A tokenizer may take seconds to load: not on the engine's event loop.
    fmt = _formats[key] if key in _formats else await asyncio.to_thread(_load, key)
    return [fmt.watch(sampling.stop, request.until) for _ in request.seeds]


def _load(key: tuple[str, str]) -> Format:
    with _loading:
        if key not in _formats:
            name, tokenizer = key
            _formats[key] = load_format(name, tokenizer_of=tokenizer or None)
        return _formats[key]


def clip(completion: Completion, watch: StopWatch | None) -> Completion:
    """A completion that ran on, without what its watch found needless."""
    if watch is None or watch.count is None:
        return completion
    count, logprobs = watch.count, completion.logprobs
    kept = completion.token_ids[:count]
    logprobs = None if logprobs is None else logprobs[:count]
    if watch.ended_by_control:
        return Completion(kept[:-1], "stop", kept[-1], logprobs)
    return replace(completion, token_ids=kept, finish_reason="stop", stop_token_id=None, logprobs=logprobs)
