"""What vLLM tells of its requests, as what crosses processes: its objects are read, vllm is not imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.protocol import Alternatives, Completion, Growth, Sampling
from serving.stopping import StopWatch
from serving.watching import clip


def is_enough(output: Any, watch: StopWatch) -> bool:
    """Show a watch the tokens that it has not seen; a stop token is none of the completion's."""
    sample = output.outputs[0]
    stop = len(sample.token_ids) - (sample.finish_reason == "stop")
    return watch.add(sample.token_ids[watch.seen : stop]) is not None


def completion_of(output: Any, sampling: Sampling) -> Completion:
    """An output's sample, whole or a delta; a stop token, which vLLM leaves in its ids, apart."""
    sample = output.outputs[0]
    token_ids = list(sample.token_ids)
    logprobs = logprobs_of(sample.logprobs, token_ids) if sampling.logprobs else None
    alternatives = alternatives_of(sample.logprobs, sampling) if sampling.logprobs else None
    if sample.finish_reason != "stop":
        return Completion(token_ids, "length", None, logprobs, alternatives)
    return Completion(token_ids[:-1], "stop", token_ids[-1], logprobs, alternatives)


def growth_of(key: int, sample: int, output: Any, sampling: Sampling, watch: StopWatch | None) -> Growth:
    """One of vLLM's deltas, cut where the watch needs no more of it."""
    seen = watch.seen if watch else 0
    completion, ends = completion_of(output, sampling), output.outputs[0].finish_reason is not None
    if watch is not None and watch.add(completion.token_ids) is not None:
        completion, ends = clip(completion, watch, seen), True
    return Growth.of(key, sample, completion, output.num_cached_tokens or 0, ends=ends)


def logprobs_of(steps: Sequence[Mapping[int, Any]], token_ids: Sequence[int]) -> list[float]:
    """The natural logarithm of each token."""
    return [step[token].logprob for step, token in zip(steps, token_ids, strict=True)]


def alternatives_of(steps: Sequence[Mapping[int, Any]], sampling: Sampling) -> list[Alternatives] | None:
    """The likeliest tokens of each step; vLLM adds the one that was taken where it is none of them."""
    most = sampling.alternatives
    if not most:
        return None
    ranked = (sorted(step.items(), key=lambda item: item[1].rank)[:most] for step in steps)
    return [tuple((token, found.logprob) for token, found in step if found.rank <= most) for step in ranked]
