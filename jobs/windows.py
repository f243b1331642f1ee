"""A text that is longer than an engine's context is scored in windows, which come back in any order. Pure."""

import array
import math
from collections.abc import Sequence
from dataclasses import replace

from jobs.journal import Sample
from jobs.rows import to_samples
from serving.errors import EngineError
from serving.formats import Ids
from serving.protocol import Result

SPARE = 1
"""Places of a context that scoring leaves free: vLLM makes one token at least."""


def window_sizes(tokens: int, scored: int, max_context: int) -> list[int]:
    """How many of a row's ``scored`` last tokens, of ``tokens`` in all, each of its windows scores: see ``windows``."""
    room = max_context - SPARE - (tokens - scored)
    return [min(room, scored - start) for start in range(0, scored, room)]


def windows(token_ids: Sequence[int], scored: int, max_context: int) -> list[Ids]:
    """What an engine of ``max_context`` tokens must be asked so that each of the ``scored`` last tokens is scored once.

    A window is what stands before the text, then as much of the text as fits. Only a plain text has several: each but
    the first knows nothing of the one before it.
    """
    ids = array.array("i", token_ids)
    start = len(ids) - scored
    head, found = ids[:start], list[Ids]()
    for size in window_sizes(len(ids), scored, max_context):
        found.append(head + ids[start : start + size])
        start += size
    return found


def scored_sample(result: Result, row: int, scored: int, *, replica: str, attempts: int) -> Sample:
    """What must be kept of an engine's answer to one window: its error, or the sum over its ``scored`` last tokens.

    Raises ``EngineError`` when the engine told fewer logarithms than that.
    """
    if result.error_code is not None:
        return to_samples(result, row, replica=replica, attempts=attempts)[0]
    told = (result.prompt_logprobs or [])[-scored:]
    if len(told) < scored:
        raise EngineError(f"the engine told {len(told)} logarithms of {scored} tokens that it was to score.")
    sample = Sample(row, 0, [], cached_tokens=result.cached_tokens, replica=replica, attempts=attempts)
    sample.sum_logprob, sample.scored = math.fsum(told), scored
    return sample


def joined(parts: Sequence[Sample]) -> Sample:
    """A row's windows, in order, as one: the first error, or the sums."""
    if failed := next((part for part in parts if part.error_code is not None), None):
        return failed
    return replace(
        parts[0],
        sum_logprob=math.fsum(part.sum_logprob or 0.0 for part in parts),
        scored=sum(part.scored for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        attempts=max(part.attempts for part in parts),
    )


class Windows:
    """The windows that are there of rows that are not whole yet."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[int, Sample]] = {}

    def add(self, number: int, part: Sample, count: int) -> list[Sample]:
        """A row's sample once all ``count`` of its windows are there, until then nothing."""
        parts = self._parts.setdefault(part.row, {})
        parts[number] = part
        if len(parts) < count:
            return []
        del self._parts[part.row]
        return [joined([parts[number] for number in range(count)])]
