"""How much of its prompts a job could have from a perfect prefix cache."""

from collections.abc import Sequence
from itertools import takewhile


def ideal_cached_share(prompts: Sequence[Sequence[int]], block_size: int) -> float:
    """The share of prompt tokens that a cache of whole blocks serves which forgets nothing; 0 where there are none.

    A prompt hits the blocks that earlier prompts began with alike, at most ``(len - 1) // block_size`` of them: the
    engine computes the last token at least, since it needs its logits.
    """
    known: set[int] = set()
    tokens = cached = 0
    for prompt in prompts:
        blocks = _blocks(prompt, block_size)
        hits = sum(1 for _ in takewhile(known.__contains__, blocks))
        cached += min(hits, (len(prompt) - 1) // block_size) * block_size if prompt else 0
        tokens += len(prompt)
        known.update(blocks)
    return cached / tokens if tokens else 0.0


def _blocks(prompt: Sequence[int], size: int) -> list[int]:
    """One hash a whole block, of the block and all before it."""
    hashes, parent = [], 0
    for start in range(0, len(prompt) - size + 1, size):
        parent = hash((parent, tuple(prompt[start : start + size])))
        hashes.append(parent)
    return hashes
