"""One pool of threads, a core each, for work that releases the GIL."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


_spent = [0.0]
_lock = threading.Lock()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="tokenizer")


def on_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of each item, in order; a single item is done at once. The function must not call this."""
    if len(items) < 2:
        return [function(item) for item in items]

    def counted(item: T) -> R:
        started = time.thread_time()
        try:
            return function(item)
        finally:
            with _lock:
                _spent[0] += time.thread_time() - started

    return list(_pool().map(counted, items))


def pool_seconds() -> float:
    """CPU seconds that the pool's threads have worked so far."""
    return _spent[0]
