"""Batch rows of several tenants in one engine: each row's priority is its tag (``serving.tenants.tags``)."""

from serving.protocol import BATCH_PRIORITY, Engine, MicroBatch, Request, Result
from serving.tenants.fair import W_IN, W_OUT
from serving.tenants.tags import Tags


async def generate(engine: Engine, tags: Tags, batch: MicroBatch, request: Request) -> Result:
    """Answer a request of a micro-batch, a batch row in its tenant's turn; raises what ``Engine.generate`` raises.

    A row is expected to make all the tokens that it may. Tenants are told apart as their prefix caches are.
    """
    if batch.priority < BATCH_PRIORITY:
        return await _answered(engine, batch, request, batch.priority)
    made = len(request.seeds) * batch.sampling.max_tokens
    tag, served = tags.open(batch.cache_salt or "", _service(request, made), weight=batch.weight), 0.0
    try:
        result = await _answered(engine, batch, request, tag.priority)
        served = _service(request, sum(len(completion.token_ids) for completion in result.completions))
    finally:
        tags.close(tag, served)
    return result


async def _answered(engine: Engine, batch: MicroBatch, request: Request, priority: int) -> Result:
    return await engine.generate(request, batch.sampling, priority=priority, cache_salt=batch.cache_salt)


def _service(request: Request, made: int) -> float:
    return W_IN * len(request.token_ids) + W_OUT * made
