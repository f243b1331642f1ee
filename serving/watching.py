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
    through, least = sampling.ignore_eos, sampling.min_tokens
    return [fmt.watch(sampling.stop, request.until, through=through, least=least) for _ in request.seeds]


def _load(key: tuple[str, str]) -> Format:
    with _loading:
        if key not in _formats:
            name, tokenizer = key
            _formats[key] = load_format(name, tokenizer_of=tokenizer or None)
        return _formats[key]


def clip(completion: Completion, watch: StopWatch | None, seen: int = 0) -> Completion:
    """A completion, or its part behind the first ``seen`` tokens, without what its watch found needless."""
    if watch is None or watch.count is None:
        return completion
    count = watch.count - seen
    kept = replace(
        completion,
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs and completion.logprobs[:count],
        alternatives=completion.alternatives and completion.alternatives[:count],
        finish_reason="stop",
        stop_token_id=None,
    )
    if watch.ended_by_control:
        return replace(kept, token_ids=kept.token_ids[:-1], stop_token_id=kept.token_ids[-1])
    return kept
