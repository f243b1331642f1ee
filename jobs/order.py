"""Locality by construction: neighbours share prompt prefixes, and micro-batches are cut where they share least."""

import array
import sys
from collections.abc import Sequence
from itertools import pairwise

TOKEN_BYTES = 4


def sort_key(token_ids: Sequence[int]) -> bytes:
    """Bytes that compare as the token ids do: big-endian, four bytes a token."""
    key = array.array("I", token_ids.tobytes() if isinstance(token_ids, array.array) else token_ids)
    if sys.byteorder == "little":
        key.byteswap()
    return key.tobytes()


def prefix_order(keys: Sequence[bytes]) -> list[int]:
    """The indices of ``keys`` so that those which share a prefix are neighbours."""
    return sorted(range(len(keys)), key=keys.__getitem__)


def shared_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two keys share."""
    low, high = 0, min(len(left), len(right)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * TOKEN_BYTES] == right[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def cut(keys: Sequence[bytes], order: Sequence[int], size: int) -> list[list[int]]:
    """Split ``order`` into micro-batches of at most ``size``, each ending where the next row shares the fewest tokens.

    No batch but the last is smaller than half of ``size``.
    """
    batches, start = [], 0
    while len(order) - start > size:
        ends = range(start + max(1, size // 2), start + size + 1)
        end = min(ends, key=lambda e: (shared_tokens(keys[order[e - 1]], keys[order[e]]), -e))
        batches.append(list(order[start:end]))
        start = end
    return [*batches, list(order[start:])] if start < len(order) else batches


def grouped(keys: Sequence[bytes], batches: Sequence[list[int]], block_size: int) -> list[list[list[int]]]:
    """Consecutive micro-batches in groups between which no block of ``block_size`` tokens is shared."""
    groups: list[list[list[int]]] = []
    last: int | None = None
    for batch in batches:
        if last is None or shared_tokens(keys[last], keys[batch[0]]) < block_size:
            groups.append([])
        groups[-1].append(batch)
        last = batch[-1]
    return groups


def ideal_cached_tokens(keys: Sequence[bytes], order: Sequence[int], block_size: int) -> list[int]:
    """For each row in ``order`` the prompt tokens that a prefix cache which forgets nothing would have for it.

    Sorted rows share the most with the one before them. Whole blocks count, and a prompt's last token is always
    computed, as in vLLM.
    """
    found = [0] if order else []
    for before, row in pairwise(order):
        shared = min(shared_tokens(keys[before], keys[row]), len(keys[row]) // TOKEN_BYTES - 1)
        found.append(max(0, shared) // block_size * block_size)
    return found
