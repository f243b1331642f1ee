"""vLLM's schedulers, in which batch rows make way for people (``serving.yielding``).

vLLM's priorities decide who begins first; they neither stop a row that runs nor keep a place free. These classes are
named to vLLM by ``scheduler_cls``, which it does not hold for a stable interface: they use ``running``, ``waiting``,
``current_step``, ``max_num_active_reqs``, the block pool and ``Request.next_decode_eligible_step`` of vLLM 0.32.
Imported in the engine's process alone, besides by tests.
"""

from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from serving.protocol import BATCH_PRIORITY
from serving.yielding import SEATS, turn

BESIDE = "spanfill_rows_beside"
"""The key of vLLM's ``additional_config`` that says how many batch rows run beside people."""


def _is_of_people(request: Any) -> bool:
    return bool(request.priority < BATCH_PRIORITY)


class _Yielding:
    """What both have: rows beyond their turn are not eligible in the next step, and as many begin as may."""

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        """Plan a step."""
        me: Any = self
        rows = [request for request in me.running if not _is_of_people(request)]
        waiting = sum(1 for _ in takewhile(_is_of_people, me.waiting))
        people = len(me.running) - len(rows) + waiting
        pool = me.kv_cache_manager.block_pool
        now = turn(
            people=people,
            rows=len(rows),
            beside=int(me.vllm_config.additional_config[BESIDE]),
            places=me.max_num_running_reqs,
            is_full=pool.get_num_free_blocks() < pool.num_gpu_blocks // SEATS,
        )
        for request in rows[now.going :]:
            # ``schedule`` counts the step before it looks.
            request.next_decode_eligible_step = me.current_step + 2
        me.max_num_active_reqs = min(me.max_num_running_reqs, len(me.running) + waiting + now.beginning)
        return super().schedule(*arguments, **named)  # type: ignore[misc]


class YieldingScheduler(_Yielding, Scheduler):  # type: ignore[misc]
    """For engines that schedule a step when the one before has ended."""


class AsyncYieldingScheduler(_Yielding, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step ahead."""
