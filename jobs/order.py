"""Locality by construction: neighbours share prompt prefixes, and micro-batches are cut where they share least."""

import array
import sys
from collections.abc import Sequence

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
