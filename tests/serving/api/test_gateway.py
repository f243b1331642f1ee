"""What a gateway knows of its replicas."""

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from serving.api import gateway
from serving.api.gateway import Watch
from serving.api.metrics import Metrics
from serving.protocol import EngineInfo, EngineStats
from serving.tenants.tickets import Capacity

INFO = EngineInfo("simulated", "demo", max_model_len=100, max_num_seqs=8, block_size=16, kv_cache_tokens=1_000)
NOTHING = Capacity(0, 0, 0)


class Replicas:
    """A handle on replicas whose engines are alive, dead, or slow (None)."""

    def __init__(self, *alive: bool | None) -> None:
        self.alive: Sequence[bool | None] = alive
        self.describe = SimpleNamespace(remote=self._describe)
        self.stats = SimpleNamespace(remote=self._stats)

    async def _describe(self) -> tuple[str, EngineInfo]:
        return "fingerprint", INFO

    async def _stats(self, lane: int) -> tuple[str, EngineStats]:
        alive = self.alive[lane]
        if alive is None:
            await asyncio.sleep(60)
        return f"replica {lane}", EngineStats(is_alive=bool(alive))


def looked(watch: Watch) -> Capacity:
    return asyncio.run(watch.capacity())


def is_healthy(watch: Watch) -> bool:
    return watch.is_healthy


def test_a_gateway_is_healthy_while_an_engine_lives_and_not_once_all_that_answer_are_dead() -> None:
    replicas: Any = Replicas(True, True)
    watch = Watch(replicas, 2, Metrics("one"))
    assert not is_healthy(watch)
    assert looked(watch) == Capacity(16, 2_000, 2)
    assert is_healthy(watch)
    replicas.alive = (True, False)
    assert looked(watch) == Capacity(8, 1_000, 1)
    assert is_healthy(watch)
    replicas.alive = (False, False)
    assert looked(watch) == NOTHING
    assert not is_healthy(watch)
    replicas.alive = (False, True)
    looked(watch)
    assert is_healthy(watch)


def test_engines_that_are_slow_to_answer_are_believed_in_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "LOOK_SECONDS", 0.05)
    replicas: Any = Replicas(True)
    watch = Watch(replicas, 1, Metrics("one"))
    looked(watch)
    replicas.alive = (None,)
    assert looked(watch) == NOTHING
    assert is_healthy(watch)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + gateway.STALE_SECONDS)
    assert not is_healthy(watch)
