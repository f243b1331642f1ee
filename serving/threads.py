"""One pool of threads, a core each, for work that releases the GIL."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="tokenizer")


def on_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of each item, in order; a single item is done at once. The function must not call this."""
    return [function(item) for item in items] if len(items) < 2 else list(_pool().map(function, items))
