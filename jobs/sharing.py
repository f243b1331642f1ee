"""How much of a set of prompts a prefix cache can save. Pure."""

import array
from collections.abc import Collection, Iterable, Sequence


def ideal_cached_share(prompts: Iterable[Sequence[int]], block_size: int) -> float:
    """The share of all prompt tokens that a perfect, unbounded prefix cache of whole blocks serves, in this order.

    The last token of a prompt is always computed, so a prompt of n tokens hits (n - 1) // ``block_size`` blocks at
    most. Another order changes the share only where prompts end where a block does.
    """
    children: dict[tuple[int, bytes], int] = {}
    hits = tokens = 0
    for prompt in prompts:
        tokens += len(prompt)
        hits += min(_add(children, prompt, block_size), max(0, len(prompt) - 1) // block_size)
    return hits * block_size / tokens if tokens else 0.0


def share_inside(groups: Collection[Sequence[Sequence[int]]], block_size: int) -> float:
    """The ideal share when prompts share inside their group alone."""
    tokens = [sum(map(len, group)) for group in groups]
    shared = sum(ideal_cached_share(g, block_size) * count for g, count in zip(groups, tokens, strict=True))
    return shared / sum(tokens)


def _add(children: dict[tuple[int, bytes], int], prompt: Sequence[int], block_size: int) -> int:
    """Put a prompt's whole blocks into the tree; returns how many of them were there, counted from the start."""
    node = known = 0
    for start in range(0, len(prompt) - block_size + 1, block_size):
        key = node, array.array("i", prompt[start : start + block_size]).tobytes()
        known += key in children
        node = children.setdefault(key, len(children) + 1)
    return known
